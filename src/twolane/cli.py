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
from twolane.config import ProxySettings, Settings
from twolane.errors import ConfigError, TwoLaneError
from twolane.flags import EPILOG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG, console, with_settings
from twolane.launch import commands
from twolane.launch import status as status_of
from twolane.launch.configuration import Configuration, load
from twolane.launch.control import Files
from twolane.launch.logwriter import rotate
from twolane.launch.menu import language, run_menu
from twolane.launch.plan import load_plan
from twolane.launch.role import run_role
from twolane.launch.supervisor import Supervisor

LOG_FORMAT = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
Index = Annotated[int, typer.Option(min=1, help="Which instance of the role, where there are several.")]
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
    """Stop everything that `twolane up` started in this folder, and wait until it is gone.

    Example: twolane down
    """
    commands.down(Settings(), console())  # a configuration that has become wrong must not keep it from stopping


@app.command(epilog=EPILOG)
def restart(role: Annotated[str, typer.Argument(help="proxy, prefill, decode, all or a name")]) -> None:
    """Start a role's instances again, one after the other, or one instance. Also one that was given up.

    Example: twolane restart decode-2
    """
    commands.restart(Settings(), role, console())


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
def proxy(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on (TWOLANE_HOST).")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the OpenAI server (HTTP_PROXY_PORT).")] = None,
    discovery_host: Annotated[
        str, typer.Option(help="Address at which instances register.")
    ] = ProxySettings.discovery_host,
    discovery_port: Annotated[int | None, typer.Option(help="Port at which instances register (PROXY_PORT).")] = None,
    registration_secret_file: Annotated[
        Path | None, typer.Option(help="The secret that registrations are signed with; needed off loopback.")
    ] = None,
    allow_network: Annotated[
        list[str] | None, typer.Option(help="CIDR of registered instances (repeatable). Default: loopback.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="URL[=control host:port] of a prefill instance (repeatable).")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="URL[=control host:port] of a decode instance (repeatable).")
    ] = None,
    kv: Annotated[str, typer.Option(help="Kind of those: twolane, nixl or p2pnccl.")] = "twolane",
    policy: Annotated[str, typer.Option(help="least_loaded, round_robin or prefix_affinity.")] = ProxySettings.policy,
    min_prefill_tokens: Annotated[
        int, typer.Option(min=0, help="Shorter prompts go to a decode instance alone; 0: never.")
    ] = 0,
    max_prefill_queue: Annotated[
        int, typer.Option(min=0, help="So do all, while every prefill instance has so many requests; 0: never.")
    ] = 0,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests served at once.")] = ProxySettings.max_in_flight,
    max_queued: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for their turn; more get 429.")
    ] = ProxySettings.max_queued,
    queue_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a request waits for its turn.")
    ] = ProxySettings.queue_timeout_s,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="TWOLANE_API_KEY", help="Clients need one of these (repeatable).")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="More of them, one a line.")] = None,
    upstream_api_key: Annotated[
        str, typer.Option(envvar="TWOLANE_UPSTREAM_API_KEY", help="What the instances were given as --api-key.")
    ] = "",
) -> None:
    """Run the proxy in the foreground.

    Example: twolane proxy --http-port 8080
    Example: twolane proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --kv nixl
    """
    from twolane.proxy import flags as proxy_flags  # noqa: PLC0415 - the other commands start faster without it
    from twolane.proxy.service import run, tune_collector  # noqa: PLC0415

    made = load({"host": host}).settings
    log_requests_to_stderr(made.log_dir / "proxy.log" if sys.stderr.isatty() else None, made.log_max_mb * 1_000_000)
    secrets = proxy_flags.read_keys(registration_secret_file) if registration_secret_file else ("",)
    settings = ProxySettings(
        host=made.host,
        http_port=http_port or made.http_proxy_port,
        discovery_host=discovery_host,
        discovery_port=discovery_port or made.proxy_port,
        registration_secret=secrets[0],
        allowed_networks=tuple(allow_network or ProxySettings.allowed_networks),
        instances=proxy_flags.parse_instances(prefill or [], decode or [], kv),
        api_keys=proxy_flags.all_keys(api_key or [], api_key_file),
        upstream_api_key=upstream_api_key,
        policy=proxy_flags.parse_policy(policy),
        min_prefill_tokens=min_prefill_tokens,
        max_prefill_queue=max_prefill_queue,
        max_in_flight=max_in_flight,
        max_queued=max_queued,
        queue_timeout_s=queue_timeout,
    )
    tune_collector()
    raise typer.Exit(run(settings))


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
