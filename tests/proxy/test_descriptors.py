"""Open files: the limit is raised, and what happens when they run out."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import subprocess
import sys

import pytest
from tests.proxy.scripted import Cluster, cluster, eventually, paced, read_answer

from twolane.proxy import service
from twolane.proxy.http_client import HttpClient
from twolane.proxy.pool import State
from twolane.proxy.upstream import UpstreamConnection

LIMIT = 80
STREAM = {"model": "m", "prompt": "hello", "stream": True}


async def open_stream(made: Cluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await made.connect()
    body = json.dumps(STREAM).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    return reader, writer


def states(made: Cluster) -> set[State]:
    return {instance.state for instance in made.service.pool}


async def test_requests_are_refused_before_descriptors_run_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "raise_limit", lambda: LIMIT)
    async with cluster() as made:
        assert "fewer than max_in_flight=4096" in caplog.text
        made.d.behave = paced(10**6)
        streams = [await open_stream(made) for _ in range(LIMIT // 2)]
        heads = [(await reader.readuntil(b"\r\n\r\n")).split(b"\r\n") for reader, _ in streams]
        codes = [int(head[0].split()[1]) for head in heads]
        assert set(codes) == {200, 429}
        assert codes.count(200) <= 30, "two sockets each at least, and a reserve"
        assert all(b"retry-after: 1" in head for head, code in zip(heads, codes, strict=True) if code == 429)
        assert caplog.text.count("open files run out") == 1, "one line, not one a request"
        assert states(made) == {State.READY}, "they have done nothing"
        for _, writer in streams:
            writer.close()
        await eventually(lambda: made.service.pool.ready("D")[0].in_flight == 0)
        made.d.behave = paced(1)
        assert (await made.complete(stream=True)).status_code == 200


async def test_connections_are_refused_while_some_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "raise_limit", lambda: LIMIT)
    async with cluster() as made:
        idle = [await made.connect() for _ in range(LIMIT)]
        status, headers, _ = await read_answer(idle[-1][0])
        assert (status, headers["retry-after"]) == (429, "1")
        for _, writer in idle:
            writer.close()
        await eventually(lambda: made.service._server.num_connections < LIMIT // 2)
        assert (await made.complete()).status_code == 200


async def test_want_of_descriptors_says_nothing_about_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_client: HttpClient, *_where: object) -> UpstreamConnection:
        raise OSError(errno.EMFILE, "Too many open files")

    async with cluster(health_ready_every_s=0.05) as made:
        made.service._client.forget_idle(made.p.address)
        made.service._client.forget_idle(made.d.address)
        with monkeypatch.context() as patch:
            patch.setattr(HttpClient, "_open_connection", fail)
            answer = await made.complete()
        assert answer.status_code == 503
        assert "Too many open files" in answer.text
        assert states(made) == {State.READY}
        assert (await made.complete()).status_code == 200


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = "from twolane.proxy.descriptors import raise_limit; print(raise_limit())"
    shell = f"ulimit -S -n 256; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert int(done.stdout) == hard
