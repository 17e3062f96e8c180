"""Commands, logging set-up, exit codes. Every other part raises TwoLaneError; here it becomes one sentence."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from twolane import cli_tools
from twolane.config import Settings
from twolane.errors import ConfigError, TwoLaneError
from twolane.flags import EPILOG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG, console, with_settings
from twolane.launch import commands, terminals
from twolane.launch import status as status_of
from twolane.launch.configuration import PROXY_KEYS, Configuration
from twolane.launch.control import Files
from twolane.launch.logwriter import rotate
from twolane.launch.menu import language, run_menu
from twolane.launch.plan import load_plan
from twolane.launch.role import run_role
from twolane.launch.state import ServiceState
from twolane.launch.supervisor import Supervisor

LOG_FORMAT = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
Index = Annotated[int, typer.Option(min=1, help="Which instance of the role, where there are several.")]
Instances = Annotated[
    list[str] | None, typer.Option(metavar="URL[=HOST:PORT]", help="An instance, its control address (repeatable).")
]
Count = Annotated[int | None, typer.Option(metavar="N", help="How many of them there shall be; left out: as many.")]
Drain = Annotated[
    float | None,
    typer.Option(min=1, metavar="S", help="Seconds to end requests in; left out: drain_seconds of `up` (60)."),
]
VllmOptions = Annotated[list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="More options for vLLM.")]

app = typer.Typer(
    help="Serves an LLM in two lanes: prefill and decode instances of vLLM behind a proxy, the KV cache crossing over.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _menu_or_help(context)


@app.command(epilog=EPILOG)
def menu(context: typer.Context) -> None:
    """Choose from a menu: what `twolane` alone shows on a terminal. LANG=zh_CN.UTF-8 makes it Chinese.

    Example: twolane menu
    """
    _menu_or_help(context)


def _menu_or_help(context: typer.Context) -> None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        run_menu(console(), language(os.environ))
    else:
        typer.echo(context.find_root().get_help())


@app.command(epilog=EPILOG)
@with_settings()
def up(
    made: Configuration,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, show the logs; Ctrl+C stops all.")] = False,
) -> None:
    """Start all services in the background and send a first request through both lanes; only what isn't running yet.

    Example: twolane up --model /models/qwen3-4b --prefill 2 --decode 2
    """
    commands.up(made.settings, console())
    if foreground:
        commands.stay(made.settings, console())


@app.command(epilog=EPILOG)
def down() -> None:
    """Stop what `twolane up` and the roles in terminals run in this folder, and wait until it is gone.

    Example: twolane down
    """
    commands.down(Settings(), console())  # a configuration that has become wrong must not keep it from stopping


@app.command(epilog=EPILOG)
def restart(
    role: Annotated[str, typer.Argument(help="proxy, prefill, decode, all or a name")], drain_seconds: Drain = None
) -> None:
    """Start a role's instances again, one after the other, or one instance. Also one that was given up.

    Each first ends the requests that it has; the others of its role go on.

    Example: twolane restart decode-2
    """
    commands.restart(Settings(), role, drain_seconds, console())


@app.command(epilog=EPILOG)
def scale(prefill: Count = None, decode: Count = None, drain_seconds: Drain = None) -> None:
    """Add instances to what runs, or take some away: the highest numbers, once they have ended their requests.

    The others serve on meanwhile. Ctrl+C leaves it to go on in the background.

    Example: twolane scale --prefill 3 --decode 2
    """
    commands.scale(Settings(), prefill, decode, drain_seconds, console())


@app.command(epilog=EPILOG)
@with_settings(("host", "http_proxy_port"))
def status(made: Configuration, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show what runs in this folder. Exit code 1 if nothing does.

    Example: twolane status --json
    """
    report = status_of.status(made.settings)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        status_of.print_status(report, console())
    raise typer.Exit(EXIT_OK if report["services"] else EXIT_FAILED)


@app.command(epilog=EPILOG)
@with_settings()
def prefill(made: Configuration, index: Index = 1, vllm_options: VllmOptions = None) -> None:
    """Run a prefill instance in the foreground. Options after `--` go to vLLM unchanged.

    Example: twolane prefill --prefill-gpu 0 -- --max-num-seqs 64
    """
    run_role(made.settings, "prefill", index, vllm_options or [], console())


@app.command(epilog=EPILOG)
@with_settings()
def decode(made: Configuration, index: Index = 1, vllm_options: VllmOptions = None) -> None:
    """Run a decode instance in the foreground. Options after `--` go to vLLM unchanged.

    Example: twolane decode --decode-gpu 1 -- --max-num-seqs 64
    """
    run_role(made.settings, "decode", index, vllm_options or [], console())


@app.command(epilog=EPILOG)
@with_settings(PROXY_KEYS)
def proxy(made: Configuration, prefill: Instances = None, decode: Instances = None) -> None:
    """Run the proxy in the foreground. Instances register, or are named with --prefill and --decode.

    Example: twolane proxy --http-port 8080
    Example: twolane proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --kv nixl
    """
    from twolane.proxy.flags import proxy_settings  # noqa: PLC0415 - the other commands start faster without it
    from twolane.proxy.service import run, tune_collector  # noqa: PLC0415

    settings = made.settings
    in_terminal = sys.stderr.isatty()
    log_requests_to_stderr(settings.log_dir / "proxy.log" if in_terminal else None, settings.log_max_mb * 1_000_000)
    parsed = proxy_settings(settings, prefill or [], decode or [])
    tune_collector()
    me = ServiceState("proxy", "proxy", settings.http_proxy_port, str(settings.log_dir / "proxy.log"))
    with terminals.recorded(settings.state_dir, me):
        code = run(parsed)
    raise typer.Exit(code)


@app.command(hidden=True)
def supervise(state_dir: Annotated[Path, typer.Option()] = Path(".twolane")) -> None:
    """What `up` leaves in the background. Reads plan.json, keeps state.json.

    Example: twolane supervise --state-dir .twolane
    """
    log_to_stderr()
    files = Files(Settings(state_dir=state_dir))
    raise typer.Exit(asyncio.run(_supervise(files)))


async def _supervise(files: Files) -> int:
    return await Supervisor(load_plan(files.plan), files.state).run()


app.add_typer(cli_tools.app)


def log_to_stderr() -> None:
    """This and the next are the only places where logging is configured."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)


def log_requests_to_stderr(also: Path | None, max_bytes: int) -> None:
    """The same lines for a process that writes thousands a second: in batches, without what the format doesn't show.

    `also`: a file that gets the same lines, and moves aside when it holds `max_bytes`.
    """
    from twolane.proxy.logs import BatchingHandler, SecondsFormatter  # noqa: PLC0415

    handlers: list[logging.Handler] = [BatchingHandler(sys.stderr)]
    if also:
        also.parent.mkdir(parents=True, exist_ok=True)
        rotate(str(also))
        handlers.append(RotatingFileHandler(also, maxBytes=max_bytes, backupCount=1))
    for handler in handlers:
        handler.setFormatter(SecondsFormatter(LOG_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    # As in the standard library's logging guide, "Optimization".
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def main() -> None:
    """Entry point. Never returns: exits with one of the documented codes."""
    try:
        code = app(standalone_mode=False)
    except ConfigError as error:
        _fail(str(error), EXIT_WRONG)
    except TwoLaneError as error:
        _fail(str(error), EXIT_FAILED)
    except OSError as error:  # a folder that can't be written, a full disk: the message names the file
        _fail(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (`twolane --help` tells more)", EXIT_WRONG)  # typer's usage errors
    if code == EXIT_INTERRUPTED:  # typer's answer to Ctrl+C
        _fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"twolane: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
