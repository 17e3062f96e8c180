"""The proxy as a process: ports, signals, draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.ports import free_port
from tests.proxy.scripted import Call, ScriptedInstance, answer, eventually, read_answer

from twolane.config import ProxySettings
from twolane.errors import ConfigError
from twolane.proxy.service import run

MAIN = """
import logging, sys
from twolane.config import ProxySettings
from twolane.proxy.service import run
logging.basicConfig(level=logging.INFO)
http, discovery, drain_s = sys.argv[1:]
sys.exit(run(ProxySettings(http_port=int(http), discovery_port=int(discovery), drain_timeout_s=float(drain_s))))
"""


class Running:
    """A proxy process, one decode instance, and a client connection that it serves."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, decode: ScriptedInstance) -> None:
        self.process = process
        self.port = port
        self.decode = decode
        self.log = b""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def read_log_until(self, word: bytes) -> None:
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while word not in self.log:
                line = await self.process.stderr.readline()
                assert line, self.log.decode()
                self.log += line

    async def exit_code(self) -> int:
        async with asyncio.timeout(10):
            return await self.process.wait()


@asynccontextmanager
async def running(drain_timeout_s: float = 20.0) -> AsyncIterator[Running]:
    http_port, discovery_port = free_port(), free_port()
    arguments = [str(http_port), str(discovery_port), str(drain_timeout_s)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAIN, *arguments, stderr=asyncio.subprocess.PIPE
    )
    decode = await ScriptedInstance("D").start()
    proxy = Running(process, http_port, decode)
    try:
        await proxy.read_log_until(b"proxy ready")
        decode.register(discovery_port)
        await proxy.read_log_until(b"state=ready")
        yield proxy
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await decode.stop()


def streaming(body_fields: dict[str, object]) -> bytes:
    body = json.dumps({"prompt": "x", "stream": True} | body_fields).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_proxy_exits_0_at_once(number: signal.Signals) -> None:
    async with running() as proxy:
        _, writer = await proxy.connect()  # an idle connection holds nobody up
        proxy.process.send_signal(number)
        assert await proxy.exit_code() == 0
        writer.close()


async def test_sigterm_lets_live_streams_end_and_takes_nothing_new() -> None:
    finish = asyncio.Event()

    async def stream(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        await finish.wait()
        await call.event({"number": 2})
        await call.end_stream()

    async with running() as proxy:
        proxy.decode.behave = stream
        waiting_reader, waiting_writer = await proxy.connect()
        waiting_writer.write(HEALTH)
        assert (await read_answer(waiting_reader))[0] == 200
        reader, writer = await proxy.connect()
        writer.write(streaming({}))
        await reader.readuntil(b"1}\n\n")
        proxy.process.terminate()
        await proxy.read_log_until(b"draining")
        with pytest.raises(ConnectionRefusedError):
            await proxy.connect()
        waiting_writer.write(HEALTH)
        status, _, body = await read_answer(waiting_reader)
        assert (status, json.loads(body)["status"]) == (503, "draining")
        waiting_writer.write(streaming({}))
        assert (await read_answer(waiting_reader))[0] == 503
        finish.set()
        async with asyncio.timeout(5):
            rest = await reader.read()
        assert b'{"number": 2}' in rest
        assert rest.endswith(b"0\r\n\r\n")
        assert await proxy.exit_code() == 0
        writer.close()
        waiting_writer.close()


@pytest.mark.parametrize("second", [True, False])
async def test_second_sigterm_or_the_deadline_ends_at_once(second: bool) -> None:
    async def hang_in_stream(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        await call.gone.wait()

    async with running(20.0 if second else 0.3) as proxy:
        proxy.decode.behave = hang_in_stream
        reader, writer = await proxy.connect()
        writer.write(streaming({}))
        await reader.readuntil(b"1}\n\n")
        proxy.process.terminate()
        await proxy.read_log_until(b"draining")
        if second:
            proxy.process.terminate()
        assert await proxy.exit_code() == 1
        writer.close()


async def test_killed_proxy_leaves_decode_with_a_closed_leg() -> None:
    async with running() as proxy:
        seen = asyncio.Event()

        async def hang_until_gone(call: Call) -> None:
            seen.set()
            await call.gone.wait()

        proxy.decode.behave = hang_until_gone
        _, writer = await proxy.connect()
        writer.write(streaming({}))
        await seen.wait()
        proxy.process.kill()
        async with asyncio.timeout(5):
            await (await proxy.decode.call()).gone.wait()
        writer.close()
        proxy.decode.behave = answer


def test_http_port_in_use_names_port_holder_and_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"HTTP port {port} is in use by .*\(pid {os.getpid()}\).*--http-port"):
            run(ProxySettings(http_port=port, discovery_port=0))


def test_address_that_is_not_ours_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        run(ProxySettings(host="192.0.2.1", http_port=0, discovery_port=0))


async def test_memory_of_ended_requests_is_bounded() -> None:
    async with running() as proxy:
        reader, writer = await proxy.connect()
        for _ in range(150):
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_answer(reader))[0] == 200
        writer.write(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
        stats = json.loads((await read_answer(reader))[2])
        assert len(stats["recent"]) == 100
        assert stats["requests"] == {"/v1/models": {"ok": 150}}
        writer.close()
        await eventually(lambda: proxy.process.returncode is None)


async def cli(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "twolane.cli", "proxy", *arguments, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


@pytest.mark.parametrize("flag", ["--http-port", "--discovery-port"])
async def test_command_with_a_port_in_use_fails_and_names_the_holder(flag: str) -> None:
    other = {"--http-port": "--discovery-port", "--discovery-port": "--http-port"}[flag]
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        code, errors = await cli(flag, str(port), other, str(free_port()))
    assert code == 2
    assert f"port {port} is in use by" in errors
    assert f"(pid {os.getpid()})" in errors
    assert flag in errors


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--prefill", "http://127.0.0.1:1"], "control address"),
        (["--policy", "whim"], "least_loaded"),
        (["--kv", "magic"], "p2pnccl"),
        (["--discovery-host", "0.0.0.0"], "secret"),  # noqa: S104
        (["--api-key-file", "/nonexistent"], "/nonexistent"),
        (["--max-in-flight", "0"], "max-in-flight"),
        (["--power-every", "600"], "0.01"),
        (["--power-csv", "/nonexistent/power.csv"], "/nonexistent/power.csv"),
    ],
)
async def test_command_names_a_wrong_flag(arguments: list[str], word: str) -> None:
    code, errors = await cli("--http-port", "0", "--discovery-port", "0", *arguments)
    assert code == 2
    assert word in errors


async def test_command_serves_static_instances_and_its_exit_code_tells_how_it_ended() -> None:
    decode = await ScriptedInstance("D").start()
    port = free_port()
    arguments = ["--http-port", str(port), "--discovery-port", "0", "--kv", "nixl", "--api-key", "sesame"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "twolane.cli", "proxy", *arguments, "--decode", f"http://{decode.address}",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    proxy = Running(process, port, decode)
    try:
        await proxy.read_log_until(b"state=ready")
        reader, writer = await proxy.connect()
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        process.terminate()
        assert await proxy.exit_code() == 0
        writer.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await decode.stop()
