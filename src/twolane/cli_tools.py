"""Commands that look and measure, and start nothing: logs, trace, config, doctor, test, bench. cli.py adds
them to its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twolane.flags import EPILOG, EXIT_FAILED, EXIT_OK, console, with_settings
from twolane.launch import diagnosis, keys
from twolane.launch import logs as log_files
from twolane.launch.benchmark import Load, bench_command
from twolane.launch.checks import run_checks
from twolane.launch.configuration import FILE_NAME, Configuration
from twolane.launch.plan import proxy_address
from twolane.launch.story import Asked, print_story

app = typer.Typer()


@app.command(epilog=EPILOG)
@with_settings(("log_dir",))
def logs(
    made: Configuration,
    role: Annotated[
        str | None, typer.Argument(help="proxy, prefill, decode, supervisor or a name; all if left out")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until Ctrl+C.")] = False,
    count: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many lines of each log.")] = 40,
) -> None:
    """Show the services' logs, interleaved, each line with its service before it.

    Example: twolane logs decode -f
    """
    files = log_files.files_of(made.settings, role)
    for line in log_files.tail(files, count):
        typer.echo(line)
    if follow:
        log_files.follow(files, sys.stdout.write, flushed)


@app.command(epilog=EPILOG)
@with_settings(("host", "http_proxy_port", "api_key", "api_key_file"))
def trace(
    made: Configuration,
    request: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Request id or transfer id; the newest if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show where a request's time went: what the proxy and both engines noted of it, as a timeline.

    Example: twolane trace
    Example: twolane trace 0f3a5c7e9b1d42f68a0c2e4f6a8b0c1d --json
    """
    from twolane.proxy.flags import all_keys  # noqa: PLC0415 - the other commands start faster without it

    keys_given = all_keys(made.settings.api_key, made.settings.api_key_file)
    story = Asked(proxy_address(made.settings), keys_given[0] if keys_given else "").story(request or "")
    if as_json:
        typer.echo(json.dumps(story, indent=2))
    else:
        print_story(story, console())


@app.command(epilog=EPILOG)
@with_settings()
def config(
    made: Configuration,
    write: Annotated[bool, typer.Option("--write", help="Make a commented twolane.toml of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the settings and where each came from: flags, environment, twolane.toml, defaults, in this order.

    Example: PREFILL_GPU=0+1 twolane config --write
    """
    if write:
        keys.write(made, Path(FILE_NAME), console())
    elif as_json:
        typer.echo(json.dumps(keys.as_dict(made), indent=2))
    else:
        typer.echo("\n".join(keys.table(made)))
        typer.echo("\nto change one: twolane.toml (`twolane config --write` makes one), the environment, or a flag")


@app.command(epilog=EPILOG)
@with_settings()
def doctor(made: Configuration) -> None:
    """Check machine, model and settings before a start; a remedy for each finding. Exit code 1 if one is an error.

    Example: twolane doctor --model /models/qwen3-4b
    """
    findings = diagnosis.findings(made.settings, console())
    diagnosis.print_findings(findings, console())
    raise typer.Exit(EXIT_FAILED if any(finding.level == "error" for finding in findings) else EXIT_OK)


@app.command(epilog=EPILOG)
@with_settings(("host", "http_proxy_port"))
def test(made: Configuration) -> None:
    """Check what runs, through the proxy: answers, streams, eight at once, and that the KV cache moved.

    Example: twolane test
    """
    passed = run_checks(proxy_address(made.settings), lambda *result: report_check(console(), *result))
    raise typer.Exit(EXIT_OK if passed else EXIT_FAILED)


@app.command(epilog=EPILOG)
@with_settings()
def bench(
    made: Configuration,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 100,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = float("inf"),
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Result file; logs/bench-DATE.json if left out.")] = None,
) -> None:
    """Run `vllm bench serve` with random prompts against the proxy and save the result, with versions and settings.

    Example: twolane bench --input-len 1024 --output-len 128 --request-rate 2 --num-prompts 50
    """
    asked = Load(input_len, output_len, num_prompts, request_rate, seed)
    num_failed = bench_command(made.settings, asked, out, console())
    raise typer.Exit(EXIT_FAILED if num_failed else EXIT_OK)


def report_check(out: Console, passed: bool, name: str, detail: str) -> None:
    out.print(f"{'pass' if passed else 'FAIL'}  {name:<10}  {detail}", markup=False)


def flushed() -> bool:
    """Between two looks at the logs: what was written is shown. Always true."""
    sys.stdout.flush()
    return True
