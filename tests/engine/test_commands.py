"""The commands on the real CPU engine: up, test, status, logs, killed roles, down. tests/docs has the rest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.place import Place
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


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
