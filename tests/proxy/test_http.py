"""HTTP/1.1 as RFC 9112 says, on raw sockets: nothing that lets one client's bytes reach another's request."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from tests.proxy.scripted import MODEL, Call, answer, cluster, eventually, exchange, hang, read_answer

BODY = json.dumps({"model": MODEL, "prompt": "x"}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def post(body: bytes = BODY, extra: bytes = b"") -> bytes:
    return POST + extra + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def status_of(answered: bytes) -> int:
    return int(answered.split(b" ", 2)[1])


def error_of(answered: bytes) -> dict[str, object]:
    error = json.loads(answered.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


REFUSED = {
    "length and coding": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /stats",
    "coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{} ###",
    "two equal lengths": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "signed length": POST + b"Content-Length: +2\r\n\r\n{}",
    "hex length": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "unknown coding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "chunked not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "disguised coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "coding in HTTP/1.0": b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET /stats HTTP/1.1\nHost: x\n\n",
    "bare LF in a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
    "bare CR": b"GET /stats HTTP/1.1\r\nHost: x\rX: y\r\n\r\n",
    "obs-fold": b"GET /stats HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "NUL in a value": b"GET /stats HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
    "space before colon": b"GET /stats HTTP/1.1\r\nHost : x\r\n\r\n",
    "no host": b"GET /stats HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /stats HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "endless chunk extension": POST + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 200_000,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_ambiguous_request_is_refused_and_the_connection_closed(name: str) -> None:
    async with cluster() as c:
        answered = await exchange(c, REFUSED[name])
        assert status_of(answered) == 400
        assert b"\r\nconnection: close\r\n" in answered
        assert error_of(answered)["type"] == "invalid_request_error"
        assert not c.p.calls
        assert not c.d.calls


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"{"), 400),
        (post(b"[1]"), 400),
        (post(b""), 400),
        (post(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), 400),
        (post(b'{"n": "\xff"}'), 400),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
    ],
)
async def test_refusal_of_a_whole_request_leaves_the_connection_usable(request_bytes: bytes, status: int) -> None:
    async with cluster() as c:
        reader, writer = await c.connect()
        writer.write(request_bytes)
        got, headers, body = await read_answer(reader)
        assert got == status
        assert json.loads(body)["error"]["code"] == status
        assert ("allow" in headers) == (status == 405)
        writer.write(post())
        assert (await read_answer(reader))[0] == 200
        writer.close()


async def test_head_over_the_limit_is_431() -> None:
    async with cluster(max_head_bytes=1000) as c:
        whole = b"GET /stats HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 1000 + b"\r\n\r\n"
        assert status_of(await exchange(c, whole)) == 431
        endless = b"GET /stats HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000
        assert status_of(await exchange(c, endless)) == 431
        long_path = b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        assert error_of(await exchange(c, long_path))["code"] == 431


async def test_body_over_the_limit_is_413_before_it_has_come() -> None:
    async with cluster(max_body_bytes=1000) as c:
        announced = POST + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n"
        answered = await exchange(c, announced)
        assert status_of(answered) == 413
        assert error_of(answered)["code"] == 413
        chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000
        assert status_of(await exchange(c, chunked)) == 413


async def test_client_that_still_sends_reads_why_it_was_refused() -> None:
    async with cluster(max_body_bytes=1000) as c:
        request = POST + b"Content-Length: 3000000\r\n\r\n" + b"x" * 3_000_000
        assert status_of(await exchange(c, request)) == 413


async def test_expect_100_continue_is_answered_before_the_body() -> None:
    async with cluster() as c:
        reader, writer = await c.connect()
        writer.write(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(BODY))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await read_answer(reader))[0] == 200
        assert "expect" not in (await c.d.call()).headers
        writer.close()


async def test_chunked_body_reaches_the_instances_with_its_length() -> None:
    async with cluster() as c:
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY)))
        reader, writer = await c.connect()
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Trailer: 1\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        leg = await c.d.call()
        assert leg.json["prompt"] == "x"
        assert "x-trailer" not in leg.headers
        assert "transfer-encoding" not in leg.headers
        writer.close()


async def test_pipelined_requests_are_answered_in_order_each_with_its_own() -> None:
    async def slow_first(call: Call) -> None:
        if call.json["user"] == "0":
            await asyncio.sleep(0.05)
        await call.reply(200, {"user": call.json["user"]})

    async with cluster() as c:
        c.d.behave = slow_first
        bodies = [json.dumps({"prompt": "x", "user": str(i)}).encode() for i in range(4)]
        reader, writer = await c.connect()
        writer.write(b"".join(post(body) for body in bodies[:2]))
        await c.d.call(0)
        writer.write(post(bodies[2]) + post(bodies[3])[:-5])
        for number in range(3):
            assert json.loads((await read_answer(reader))[2]) == {"user": str(number)}
        writer.write(bodies[3][-5:])
        assert json.loads((await read_answer(reader))[2]) == {"user": "3"}
        writer.close()


async def test_pipelined_garbage_is_refused_after_the_answer_that_is_due() -> None:
    async with cluster() as c:
        answered = await exchange(c, post() + b"garbage\r\n\r\n")
        assert answered.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 400" in answered


async def test_too_much_pipelined_ends_the_connection_after_the_answer() -> None:
    release = asyncio.Event()

    async def wait(call: Call) -> None:
        await release.wait()
        await answer(call)

    async with cluster(max_head_bytes=2000) as c:
        c.d.behave = wait
        reader, writer = await c.connect()
        writer.write(post())
        await c.d.call()
        writer.write(post() * 1000)
        await writer.drain()
        await asyncio.sleep(0.05)
        release.set()
        async with asyncio.timeout(5):
            answered = await reader.read()
        assert answered.count(b"HTTP/1.1 200") == 1
        assert len(c.d.calls) == 1
        writer.close()


async def test_client_that_pipelines_but_never_reads_is_stopped() -> None:
    async with cluster(idle_timeout_s=0.5) as c:
        _, writer = await c.connect()
        request = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n" * 100

        async def pour() -> None:
            while True:
                writer.write(request)
                await writer.drain()
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(pour(), 20)
        writer.transport.abort()


async def test_http_1_0_gets_an_answer_without_chunks_that_ends_with_the_connection() -> None:
    async with cluster() as c:
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        request = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        head, _, rest = (await exchange(c, request)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert rest.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_http_1_0_keep_alive_if_asked_for() -> None:
    async with cluster() as c:
        reader, writer = await c.connect()
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "keep-alive")
        writer.close()


async def test_head_has_the_headers_and_no_body() -> None:
    async with cluster() as c:
        request = b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        head, _, body = (await exchange(c, request)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"content-length: " in head
        assert body == b""


async def test_upgrade_is_ignored_and_the_connection_goes_on() -> None:
    async with cluster() as c:
        reader, writer = await c.connect()
        upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        writer.write(upgrade * 2)
        for _ in range(2):
            assert (await read_answer(reader))[0] == 200
        writer.close()


async def test_absolute_form_is_understood_and_connect_is_not() -> None:
    async with cluster() as c:
        absolute = b"GET http://x:1/health?a=b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert status_of(await exchange(c, absolute)) == 200
        connect = b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\nGET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
        answered = await exchange(c, connect)
        assert status_of(answered) == 404
        assert answered.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(("start", "what"), [(b"GET /sta", "head"), (POST + b"Content-Length: 99\r\n\r\n{", "body")])
async def test_trickled_request_ends_at_its_deadline(start: bytes, what: str) -> None:
    async with cluster(head_timeout_s=0.3, body_timeout_s=0.3) as c:
        reader, writer = await c.connect()
        began_at = time.monotonic()
        writer.write(start)

        async def trickle() -> None:
            while True:
                await asyncio.sleep(0.05)
                writer.write(b"a")

        trickling = asyncio.create_task(trickle())
        status, _, body = await read_answer(reader)
        assert status == 408
        assert what in json.loads(body)["error"]["message"]
        assert time.monotonic() - began_at < 20
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)
        writer.close()


async def test_idle_connection_is_closed_without_a_word() -> None:
    async with cluster(idle_timeout_s=0.2) as c:
        reader, writer = await c.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_request_in_flight_outlives_the_idle_deadline() -> None:
    async def slow(call: Call) -> None:
        await asyncio.sleep(0.5)
        await answer(call)

    async with cluster(idle_timeout_s=0.1, head_timeout_s=0.1, body_timeout_s=0.1) as c:
        c.d.behave = slow
        assert (await c.complete()).status_code == 200


async def test_connection_close_is_honoured_and_what_follows_ignored() -> None:
    async with cluster() as c:
        answered = await exchange(c, post(extra=b"Connection: close\r\n") + post())
        assert answered.count(b"HTTP/1.1 200") == 1
        assert len(c.d.calls) == 1


async def test_clients_leaving_one_after_another_leave_nothing_in_flight() -> None:
    async with cluster() as c:
        c.p.behave = c.d.behave = hang
        for _ in range(20):
            _, writer = await c.connect()
            writer.write(post())
            await writer.drain()
            writer.transport.abort()
        await eventually(lambda: all(call.gone.is_set() for call in (*c.p.calls, *c.d.calls)))
        await eventually(lambda: c.view(c.p).in_flight == c.view(c.d).in_flight == 0)
        c.p.behave = c.d.behave = answer
        assert (await c.complete()).status_code == 200
