"""The real proxy process sends spans to a real OTLP receiver, and isn't held up by one that is dead."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.ports import free_port
from tests.proxy.otlp_receiver import Receiver
from tests.proxy.scripted import ScriptedInstance
from tests.proxy.test_tracing import SAMPLED, SPAN_ID, TRACE_ID

DEADLINE_S = 60.0
ROOT = "POST /v1/completions"


@dataclass
class Running:
    process: asyncio.subprocess.Process
    http: httpx.AsyncClient
    p: ScriptedInstance
    d: ScriptedInstance

    async def complete(self, **headers: str) -> None:
        body = {"model": "m", "prompt": "x"}
        assert (await self.http.post("/v1/completions", json=body, headers=headers)).status_code == 200

    async def stop(self) -> tuple[int, str]:
        """Exit code and log."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, log = await self.process.communicate()
        return self.process.returncode or 0, log.decode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.02)


async def healthy(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if (await http.get("/health")).json()["status"] == "ok":
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


@asynccontextmanager
async def running(folder: Path, *flags: str, **env: str) -> AsyncIterator[Running]:
    http_port, discovery_port = free_port(), free_port()
    ports = ("--http-port", str(http_port), "--discovery-port", str(discovery_port))
    async with AsyncExitStack() as stack:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "twolane.cli", "proxy", *ports, *flags),
            cwd=folder,
            env={**os.environ, **env},
            stderr=asyncio.subprocess.PIPE,
        )
        stack.callback(_kill, process)
        instances = [await ScriptedInstance(role).start() for role in ("P", "D")]
        for instance in instances:
            stack.push_async_callback(instance.stop)
            instance.register(discovery_port)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=20, trust_env=False)
        )
        await healthy(http)
        yield Running(process, http, *instances)


@pytest.mark.parametrize("by", ["flag", "ours", "standard"])
async def test_spans_reach_a_collector(tmp_path: Path, by: str) -> None:
    with Receiver() as receiver:
        flags = ["--otlp-endpoint", receiver.url] if by == "flag" else []
        name = "TWOLANE_OTLP_ENDPOINT" if by == "ours" else "OTEL_EXPORTER_OTLP_ENDPOINT"
        env = {} if by == "flag" else {name: receiver.url}
        async with running(tmp_path, *flags, **env, OTEL_BSP_SCHEDULE_DELAY="100") as proxy:
            await proxy.complete(traceparent=SAMPLED, tracestate="vendor=1")
            await until(lambda: ROOT in receiver.spans)
            code, _ = await proxy.stop()
            seen = {"prefill": proxy.p.calls[0].headers, "decode": proxy.d.calls[0].headers}
    assert code == 0
    assert receiver.paths[0] == "/v1/traces"
    assert receiver.resource["service.name"] == "twolane"
    spans = receiver.spans
    assert {"queue", "prefill", "decode"} < set(spans)
    assert {span["trace_id"] for span in spans.values()} == {TRACE_ID}
    root = spans[ROOT]
    assert (root["parent_id"], root["state"]) == (SPAN_ID, "vendor=1")
    assert root["attributes"]["http.response.status_code"] == 200
    for lane in ("prefill", "decode"):
        assert spans[lane]["parent_id"] == root["span_id"]
        assert seen[lane]["traceparent"] == f"00-{TRACE_ID}-{spans[lane]['span_id']}-01"
        assert root["start_ns"] <= spans[lane]["start_ns"] <= spans[lane]["end_ns"]


async def test_the_last_spans_are_sent_at_the_end(tmp_path: Path) -> None:
    with Receiver() as receiver:
        flags = ("--otlp-endpoint", receiver.url)
        async with running(tmp_path, *flags, OTEL_BSP_SCHEDULE_DELAY="600000", OTEL_SERVICE_NAME="mine") as proxy:
            await proxy.complete()
            assert not receiver.spans
            code, _ = await proxy.stop()
        assert code == 0
        assert ROOT in receiver.spans
        assert receiver.resource["service.name"] == "mine"


async def test_a_dead_collector_costs_a_log_line(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    async with running(tmp_path, "--otlp-endpoint", endpoint, OTEL_BSP_SCHEDULE_DELAY="100") as proxy:
        for _ in range(20):
            await proxy.complete()
        code, log = await proxy.stop()
    assert code == 0
    about_spans = [line for line in log.splitlines() if "spans" in line]
    assert 1 <= len(about_spans) <= 2, log  # that they can't be delivered, and at the end that the last ones weren't
    assert "Traceback" not in log
    print(about_spans)


async def test_a_wrong_endpoint_ends_the_start_with_the_remedy(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "twolane.cli", "proxy", "--http-port", "0", "--otlp-endpoint", "localhost:4317"),
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        _, error = await process.communicate()
    assert process.returncode == 2
    assert b"http://127.0.0.1:4318" in error
