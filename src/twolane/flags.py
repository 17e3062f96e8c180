"""What all commands share: exit codes, the console, and one flag for every setting."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from twolane.launch.configuration import ALIASES, KEYS, Configuration, flag, load, variable
from twolane.launch.keys import HELP

EXIT_OK, EXIT_FAILED, EXIT_WRONG, EXIT_INTERRUPTED = 0, 1, 2, 130
REPEATABLE = frozenset(("api_key", "allow_network"))
EPILOG = (
    "Exit codes: 0 ok (also: a role in the foreground ended by Ctrl+C), 1 failed, 2 wrong setting, 130 interrupted."
)


def console() -> Console:
    """Standard output; lines are not wrapped, so that they can be copied and searched."""
    return Console(highlight=False, soft_wrap=True)


def with_settings(keys: Collection[str] = KEYS) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command's first parameter becomes a Configuration; its command line gets a flag for each of `keys`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            command(_load({key: given.pop(key) for key in keys}), **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [_parameter(key) for key in keys]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *added)]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _parameter(key: str) -> inspect.Parameter:
    names = [flag(key), *([ALIASES[key]] if key in ALIASES else [])]
    option = typer.Option(*names, help=f"{HELP[key]} ({variable(key)})", metavar="VALUE", show_default=False)
    value: Any = list[str] if key in REPEATABLE else str
    annotation = Annotated[Optional[value], option]  # noqa: UP045 - typer reads it at run time
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _load(given: dict[str, object]) -> Configuration:
    made = load({key: value or None for key, value in given.items()})  # a repeatable flag that isn't there is []
    for warning in made.warnings:
        typer.echo(f"twolane: {warning}", err=True)
    return made
