"""The commands on the real CPU engine: up, test, status, logs, killed roles, down. tests/docs has the rest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.place import Place
from tests.engine.stack import wait_for
from tests.proxy.otlp_receiver import Receiver
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    stop_all(Files(Settings(state_dir=tmp_path / ".twolane", log_dir=tmp_path / "logs")))


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
            if '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n"):
                self.num_whole += 1
            else:
                self.wrong.append(text[-300:])


@pytest.fixture
def spans(place: Place) -> Iterator[Receiver]:
    """What the proxy and both engines send to a collector."""
    with Receiver() as receiver:
        place.env |= {
            "TWOLANE_OTLP_ENDPOINT": receiver.url,
            "TWOLANE_VLLM_ARGS": f"--otlp-traces-endpoint {receiver.url}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # else vLLM speaks gRPC
        }
        yield receiver


def check_spans(spans: Receiver) -> None:
    """vLLM's own hang below the proxy's, in both engines."""

    def parents() -> set[str]:
        names = {span["span_id"]: name for name, span in spans.every}
        return {names.get(span["parent_id"], "") for name, span in spans.every if name == "llm_request"}

    wait_for("both engines' spans", lambda: {"prefill", "decode"} <= parents(), 60)


def test_a_service_from_up_to_down(place: Place, spans: Receiver) -> None:
    up = place.twolane("up")
    assert up.returncode == 0, up.stderr
    assert "D got the KV of 4 from P and computed 1" in up.stdout
    tested = place.twolane("test")
    assert (tested.returncode, tested.stdout.count("pass  ")) == (0, 7), tested.stdout
    check_spans(spans)
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
    check_scaling(place)
    assert "decode: stopped" in place.twolane("down").stdout
    assert place.twolane("status").returncode == 1


def check_scaling(place: Place) -> None:
    """To two of each and back, while requests go on."""
    load = Load(place)
    scale = place.twolane("scale", "--prefill", "2", "--decode", "2")
    assert "now 2 prefill and 2 decode instances" in scale.stdout, scale.stdout + scale.stderr
    assert list(place.services()) == ["proxy", "prefill", "prefill-2", "decode", "decode-2"]
    assert place.twolane("test").returncode == 0
    back = place.twolane("scale", "--prefill", "1", "--decode", "1")
    assert "prefill-2: drained, stopped\n" in back.stdout, back.stdout + back.stderr
    assert "decode-2: drained, stopped\n" in back.stdout
    load.stop.set()
    load.join(120)
    assert (load.wrong, load.num_whole > 0) == ([], True)
