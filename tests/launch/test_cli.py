"""The command line as a process: exit codes, one sentence an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import twolane as twolane_package
from tests.ports import free_port

SOURCE = str(Path(twolane_package.__file__).parent.parent)
COMMANDS = [
    "up",
    "down",
    "restart",
    "scale",
    "status",
    "logs",
    "trace",
    "proxy",
    "prefill",
    "decode",
    "test",
    "bench",
    "config",
    "doctor",
    "menu",
]


def quiet_ports() -> dict[str, str]:
    """Not the usual ones, on which somebody may run TwoLane now."""
    return {"HTTP_PROXY_PORT": str(free_port()), "PROXY_PORT": str(free_port())}


def twolane(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twolane.cli", *words],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE, "HOME": str(folder), **quiet_ports(), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"MODEL": "/no/such/model"}, "MODEL=/no/such/model does not exist"),
        ({"HTTP_PROXY_PORT": "abc"}, "HTTP_PROXY_PORT='abc'"),
        ({"PREFILL_GPU": "0", "MODEL": "."}, "."),
    ],
)
def test_up_with_a_wrong_setting_says_one_sentence_and_exits_2(tmp_path: Path, env: dict[str, str], words: str) -> None:
    done = twolane(tmp_path, "up", **env)
    assert done.returncode == 2
    assert done.stderr.startswith("twolane: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_runs(tmp_path: Path) -> None:
    assert twolane(tmp_path, "status").returncode == 1
    report = json.loads(twolane(tmp_path, "status", "--json").stdout)
    assert report == {"running": False, "services": [], "left_over": False}
    done = twolane(tmp_path, "down")
    assert (done.returncode, done.stdout) == (0, "nothing is running in this folder\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_the_exit_codes(tmp_path: Path, command: str) -> None:
    done = twolane(tmp_path, command, "--help")
    assert done.returncode == 0
    assert "Example: " in done.stdout
    assert "Exit codes: 0 ok" in done.stdout


def test_an_unknown_word_exits_2(tmp_path: Path) -> None:
    assert twolane(tmp_path, "upp").returncode == 2
    assert twolane(tmp_path, "up", "--nope").returncode == 2


def test_the_proxy_runs_in_the_foreground_until_interrupted(tmp_path: Path) -> None:
    words = ["proxy", "--http-port", str(free_port()), "--discovery-port", str(free_port())]
    process = subprocess.Popen([sys.executable, "-m", "twolane.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        process.stderr.readline()  # its first log line: it listens
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode in {0, 130}
    finally:
        process.kill()
        process.wait()
