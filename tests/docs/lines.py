"""Whether a shell line of the docs could run: programs, flags, settings, plans, addresses, JSON. Nothing is started."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import httpx
import typer.main

from tests.docs.pages import ROOT
from twolane.cli import app
from twolane.config import ProxySettings
from twolane.connector.settings import parse_settings
from twolane.launch.configuration import KEYS, VARIABLES, resolve
from twolane.launch.plan import Machine, ServedModel, make_plan
from twolane.proxy.flags import proxy_settings
from twolane.proxy.service import Service

# Programs that aren't ours: their flags are not looked at.
FOREIGN = frozenset(
    (
        "ray",
        *("git", "docker", "systemctl", "journalctl", "nvidia-smi", "pip", "apt", "nginx", "openssl", "kill", "pkill"),
        *(
            "cd",
            "cp",
            "tar",
            "grep",
            "head",
            "echo",
            "df",
            "ulimit",
            "chmod",
            "mv",
            "mkdir",
            "rm",
            "test",
            ".",
            "lscpu",
        ),
        *("caddy", "prometheus", "promtool", "ls", "scp", "jq"),
    )
)
ENVIRONMENT = frozenset(
    (
        "LANG",
        "PYTHON",
        "CUDA_VISIBLE_DEVICES",
        "VLLM_LOGGING_LEVEL",
        "PIP_INDEX_URL",
        "PIP_NO_INDEX",
        "PIP_FIND_LINKS",
        "TMPDIR",
        "TWOLANE_GPU_MODEL",
    )
)
EIGHT_GPUS = Machine("cuda", "python", 64, tuple(range(8)))
CPU = Machine("cpu", "python", 8)
PROXY_PORTS = ("10001", "10002")
ASSIGNMENT = re.compile(r"([A-Za-z_]+)=(.*)", re.S)
SEPARATORS = frozenset(("|", "||", "&&", ";", "&"))


class WrongLineError(AssertionError):
    """Says what of a line would not work."""


def check(line: str) -> None:
    """Raises WrongLineError, or what the part that reads these words raises."""
    for command in split(line):
        assignments = list(itertools.takewhile(bool, map(ASSIGNMENT.fullmatch, command)))
        env = {match[1]: match[2] for match in assignments if match}
        words = command[len(assignments) :]
        if unknown := set(env) - set(VARIABLES) - ENVIRONMENT:
            raise WrongLineError(f"no such variable: {unknown}")
        if words:
            _check_program(words[words[0] == "sudo" :], env)


def split(line: str) -> list[list[str]]:
    """The commands of a line, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip or word in {">", ">>", "<"}:
            skip = not skip
        elif word in SEPARATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def _check_program(words: list[str], env: dict[str, str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    checks: dict[str, Callable[[list[str], dict[str, str]], None]] = {
        "twolane": _check_twolane,
        "vllm": _check_vllm,
        "python": _check_python,
        "python3": _check_python,
        "make": _check_make,
        "curl": _check_curl,
    }
    if program in checks:
        checks[program](words[1:], env)
    elif program.startswith("./") or program == "source":
        if not (ROOT / words[0]).exists():
            raise WrongLineError(f"{words[0]} does not exist")
    elif program not in FOREIGN:
        raise WrongLineError(f"nobody here knows the program {program}")


def _check_twolane(words: list[str], env: dict[str, str]) -> None:
    """Flags exist, settings parse, and what would be started can be planned, on a machine with 8 GPUs or on none."""
    group: Any = typer.main.get_command(app)
    if not words:
        return
    command = group.commands.get(words[0])
    if command is None:
        raise WrongLineError(f"no command twolane {words[0]}")
    if "--help" in words:
        return
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    try:
        context = command.make_context(words[0], list(own))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors, of its own copy of click
            raise
        raise WrongLineError(error.format_message()) from error
    instances = [context.params.pop(role) or [] for role in ("prefill", "decode")] if words[0] == "proxy" else []
    flags = {key: value or None for key, value in context.params.items() if key in KEYS}
    settings = resolve(flags, env, None).settings
    if words[0] in {"up", "prefill", "decode", "doctor"}:
        on_gpus = settings.model or settings.prefill_gpu or settings.decode_gpu
        make_plan(settings, EIGHT_GPUS if on_gpus else CPU, ServedModel(settings.model or "default", ("default",)))
    if words[0] == "proxy":
        proxy_settings(_without_files(settings), *instances)
    if "--" in words and words[0] in {"prefill", "decode"}:
        _check_flags(words[words.index("--") + 1 :], vllm_flags("serve"), "vllm serve")


def _without_files(settings: Any) -> Any:
    """The files that it names are the reader's."""
    return replace(settings, api_key_file=None, registration_secret_file=None)


def _check_vllm(words: list[str], _env: dict[str, str]) -> None:
    what = "bench serve" if words[:2] == ["bench", "serve"] else words[0]
    _check_flags(words[len(what.split()) :], vllm_flags(what), f"vllm {what}")
    if "--kv-transfer-config" in words:
        check_kv_transfer_config(json.loads(words[words.index("--kv-transfer-config") + 1]))


def _check_python(words: list[str], env: dict[str, str]) -> None:
    if words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        _check_vllm(["serve", *words[2:]], env)
    elif words[0] == "-m":
        if words[1] not in {"pip", "venv", "json.tool"}:
            _check_flags(words[2:], set(re.findall(r"--[\w-]+", module_help(words[1]))), words[1])
    elif not words[0].startswith("-") and not (ROOT / words[0]).exists() and not words[0].startswith("minimal_"):
        raise WrongLineError(f"{words[0]} does not exist")


def _check_flags(words: list[str], known: set[str], program: str) -> None:
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    if used - known:
        raise WrongLineError(f"{program} knows no {', '.join(sorted(used - known))}")


def _check_make(words: list[str], _env: dict[str, str]) -> None:
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.M))
    for word in words:
        assigned = ASSIGNMENT.fullmatch(word)
        if word not in targets and not (assigned and assigned[1] in {*VARIABLES, *ENVIRONMENT, "VERSIONS"}):
            raise WrongLineError(f"make knows no {word}")


def _check_curl(words: list[str], _env: dict[str, str]) -> None:
    urls = [match for word in words if (match := re.fullmatch(r"https?://([\w.-]+)(?::(\d+))?(/[^?]*)?(\?.*)?", word))]
    if not urls:
        raise WrongLineError("curl without an address")
    for url in urls:
        if url[2] in PROXY_PORTS and not is_path(url[3] or "/"):
            raise WrongLineError(f"the proxy has no {url[3]}")
    for flag in ("-d", "--data"):
        if flag in words:
            json.loads(words[words.index(flag) + 1])


def is_path(path: str) -> bool:
    return any(path == known or (known.endswith("...") and path.startswith(known[:-3])) for known in known_paths())


@cache
def known_paths() -> list[str]:
    """As a proxy tells who asks for another one; `...` stands for all below."""
    return asyncio.run(_ask_for_paths())


async def _ask_for_paths() -> list[str]:
    settings = ProxySettings(http_port=0, discovery_port=0)
    async with Service(settings) as service, httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{service.http_port}/no-such-path")
    message: str = answer.json()["error"]["message"]
    return message.partition("known are ")[2].split(", ")


def check_kv_transfer_config(config: dict[str, Any]) -> None:
    """As vLLM and the connector read it."""
    known = {"kv_connector", "kv_connector_module_path", "kv_role", "kv_port", "kv_load_failure_policy"}
    if unknown := set(config) - known - {"kv_connector_extra_config"}:
        raise WrongLineError(f"no keys of kv_transfer_config here: {unknown}")
    parse_settings(config.get("kv_connector_extra_config", {}))
    if config["kv_role"] not in {"kv_producer", "kv_consumer"} or config["kv_load_failure_policy"] != "recompute":
        raise WrongLineError("the connector would refuse this")


_FLAGS_OF = """
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):
    try:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.benchmarks.serve import add_cli_args
    parsers = {"serve": make_arg_parser(FlexibleArgumentParser()), "bench serve": FlexibleArgumentParser()}
    add_cli_args(parsers["bench serve"])
for name, parser in parsers.items():
    print("@", name, *(flag for action in parser._actions for flag in action.option_strings))
"""


@cache
def _all_vllm_flags() -> dict[str, set[str]]:
    output = _output(sys.executable, "-c", _FLAGS_OF)
    lines = [line.removeprefix("@ ") for line in output.splitlines() if line.startswith("@ ")]
    return {line.partition(" -")[0]: {word for word in line.split() if word.startswith("-")} for line in lines}


def vllm_flags(what: str) -> set[str]:
    return _all_vllm_flags()[what]


@cache
def module_help(module: str) -> str:
    return _output(sys.executable, "-m", module, "--help")


def _output(*argv: str) -> str:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise WrongLineError(f"{argv}: {done.stderr[-500:]}")
    return done.stdout
