"""One request through both lanes, and how it ends when nobody fails."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from tests.proxy.scripted import MODEL, Call, Cluster, answer, cluster, completion, eventually, hang, read_answer


async def test_both_legs_carry_one_transfer_and_the_other_sides_control_address() -> None:
    async with cluster() as c:
        answered = await c.complete(max_tokens=7, temperature=0)
        assert answered.status_code == 200
        assert answered.json()["choices"][0]["text"] == "one two three"
        p, d = (await c.p.call()), (await c.d.call())
        transfer_id = p.kv["transfer_id"]
        assert p.kv == {
            "transfer_id": transfer_id,
            "remote_address": c.d.control_address,
            "do_remote_decode": True,
            "story": True,
            "do_remote_prefill": False,
        }
        assert d.kv == {
            "transfer_id": transfer_id,
            "remote_address": c.p.control_address,
            "do_remote_decode": False,
            "story": True,
            "do_remote_prefill": True,
        }
        assert p.json["max_tokens"] == 1
        assert d.json["max_tokens"] == 7


async def test_decode_gets_its_leg_while_prefill_still_works() -> None:
    async with cluster() as c:
        c.p.behave = hang
        assert (await c.complete()).status_code == 200  # D answered, so it had its leg before P was done


async def test_stream_is_passed_on_byte_for_byte_and_chunk_by_chunk() -> None:
    step = asyncio.Event()

    async def slow(call: Call) -> None:
        call.start_stream()
        for number in range(3):
            await call.event({"number": number})
            await step.wait()
            step.clear()
        await call.end_stream()

    async with cluster() as c:
        c.d.behave = slow
        body = {"model": MODEL, "prompt": "hello", "stream": True}
        got = b""
        async with c.http.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            async for data in stream.aiter_raw():
                got += data
                step.set()  # the next chunk is sent only when this one has arrived
        assert got == b'data: {"number": 0}\n\ndata: {"number": 1}\n\ndata: {"number": 2}\n\ndata: [DONE]\n\n'


async def test_half_an_event_waits_for_its_other_half() -> None:
    async def halves(call: Call) -> None:
        call.start_stream()
        await call.send(b'data: {"a"')
        await call.send(b": 1}\n\ndata: 2\n")
        await call.send(b"\n")
        await call.end_stream()

    async with cluster() as c:
        c.d.behave = halves
        assert (await c.complete(stream=True)).content == b'data: {"a": 1}\n\ndata: 2\n\ndata: [DONE]\n\n'


async def test_answer_that_is_no_stream_arrives_whole_with_its_length() -> None:
    async with cluster() as c:
        answered = await c.complete()
        assert int(answered.headers["content-length"]) == len(answered.content)
        assert answered.content == json.dumps(completion("one two three", chat=False)).encode()


async def test_answer_too_large_to_hold_is_passed_on_all_the_same() -> None:
    big = b"x" * 300_000
    async with cluster(max_held_body_bytes=1000) as c:

        async def large(call: Call) -> None:
            await call.reply(200, big)

        c.d.behave = large
        answered = await c.complete()
        assert answered.content == big
        assert int(answered.headers["content-length"]) == len(big)


async def test_request_that_cannot_be_split_goes_to_decode_alone_as_it_came() -> None:
    async with cluster() as c:
        body = {"model": MODEL, "prompt": ["one", "two"], "max_tokens": 3}
        assert (await c.http.post("/v1/completions", json=body)).status_code == 200
        assert (await c.d.call()).json == body
        assert not c.p.calls
        assert (await c.stats())["recent"][0]["alone_because"] == "body:prompt"


async def test_kv_transfer_params_of_a_client_are_dropped() -> None:
    async with cluster() as c:
        forged = {"transfer_id": "mine", "remote_address": "10.0.0.1:1", "do_remote_prefill": True}
        await c.complete(kv_transfer_params=forged)
        assert (await c.d.call()).kv["transfer_id"] != "mine"
        await c.complete(kv_transfer_params=forged, n=2)
        assert "kv_transfer_params" not in (await c.d.call(1)).json


@pytest.mark.parametrize("role", ["P", "D"])
async def test_instances_own_rejection_reaches_the_client_and_ends_the_other_leg(role: str) -> None:
    error = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}

    async def reject(call: Call) -> None:
        await call.reply(404, error, **{"x-special": "yes"})

    async with cluster(prefill_linger_s=600.0) as c:
        rejecting, other = (c.p, c.d) if role == "P" else (c.d, c.p)
        rejecting.behave, other.behave = reject, hang
        answered = await c.complete()
        assert (answered.status_code, answered.json()) == (404, error)
        assert answered.headers["x-special"] == "yes"
        async with asyncio.timeout(30):
            await (await other.call()).gone.wait()
        assert c.view(rejecting).state.value == "ready"


async def leave_when(c: Cluster, stream: bool, moment: asyncio.Event) -> None:
    """Sends a request, and leaves when `moment` has come."""
    reader, writer = await c.connect()
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": stream}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await moment.wait()
    if stream:
        await reader.readuntil(b"\n\n")
    writer.close()


async def test_client_that_leaves_during_prefill_ends_both_legs_at_once() -> None:
    async with cluster(prefill_linger_s=600.0) as c:  # all that could end a leg later
        c.p.behave = c.d.behave = hang
        moment = asyncio.Event()
        leaving = asyncio.create_task(leave_when(c, False, moment))
        p, d = await c.p.call(), await c.d.call()
        moment.set()
        await leaving
        await asyncio.wait_for(asyncio.gather(p.gone.wait(), d.gone.wait()), 30)
        await eventually(lambda: c.view(c.d).in_flight == 0 and c.view(c.p).in_flight == 0)
        assert (await c.stats())["recent"][-1]["outcome"] == "client_left"


async def test_client_that_leaves_in_mid_stream_ends_both_legs_at_once() -> None:
    async def stream_for_ever(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        await call.gone.wait()

    async with cluster(prefill_linger_s=600.0) as c:
        c.p.behave, c.d.behave = hang, stream_for_ever
        moment = asyncio.Event()
        moment.set()
        await leave_when(c, True, moment)
        p, d = await c.p.call(), await c.d.call()
        await asyncio.wait_for(asyncio.gather(p.gone.wait(), d.gone.wait()), 30)


async def test_client_that_reads_slowly_holds_its_decode_leg_back_and_no_other() -> None:
    sent = 0

    async def pour(call: Call) -> None:
        nonlocal sent
        if call.json.get("user") != "slow":
            await answer(call)
            return
        call.start_stream()
        event = b"data: " + b"x" * 65536 + b"\n\n"
        for _ in range(1024):  # 64 MiB
            await call.send(event)
            sent += len(event)
        await call.end_stream()

    async with cluster() as c:
        c.d.behave = pour
        reader, writer = await c.connect()
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "user": "slow"}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await c.d.call()
        before = -1
        while before != sent:  # until nothing moves any more
            before = sent
            assert (await c.complete()).status_code == 200
            await asyncio.sleep(0.1)
        assert sent < 32 * 2**20  # what sockets and buffers hold, not what D had to say
        got = 0
        async with asyncio.timeout(20):
            while got < 1024 * 65536:
                got += len(await reader.read(2**20))
        writer.close()


async def test_client_that_stops_reading_is_cut_after_the_deadline() -> None:
    async def pour(call: Call) -> None:
        call.start_stream()
        while not call.gone.is_set():
            await call.send(b"data: " + b"x" * 65536 + b"\n\n")

    async with cluster(stream_idle_timeout_s=0.3) as c:
        c.d.behave = pour
        _, writer = await c.connect()
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await eventually(lambda: c.view(c.d).num_requests == 1 and c.view(c.d).in_flight == 0)
        assert (await c.stats())["recent"][-1]["outcome"] == "client_stalled"
        assert c.view(c.d).state.value == "ready"
        writer.close()


async def test_request_id_of_the_client_is_kept_and_goes_to_both_legs() -> None:
    async with cluster() as c:
        headers = {"X-Request-Id": "mine-1", "Authorization": "Bearer k", "Connection": "x-hop", "X-Hop": "1"}
        answered = await c.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert answered.headers["x-request-id"] == "mine-1"
        for leg in (await c.p.call(), await c.d.call()):
            assert leg.headers["x-request-id"] == "mine-1"
            assert leg.headers["authorization"] == "Bearer k"
            assert leg.headers["content-type"] == "application/json"
            assert "x-hop" not in leg.headers
        for bad in ("a b", f"___prefill_addr_10.0.0.9:1___decode_addr_10.0.0.9:2_{'0' * 32}"):
            answered = await c.http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": bad})
            assert re.fullmatch("[0-9a-f]{32}", answered.headers["x-request-id"])
            assert c.d.calls[-1].headers["x-request-id"] == answered.headers["x-request-id"]


async def test_stats_tell_the_requests_story() -> None:
    async with cluster() as c:
        answered = await c.complete(stream=True)
        stats = await c.stats()
        assert stats["requests"] == {"/v1/completions": {"ok": 1}}
        (record,) = stats["recent"]
        assert record["transfer_id"] == (await c.d.call()).kv["transfer_id"]
        assert record["request_id"] == answered.headers["x-request-id"]
        assert (record["prefill"], record["decode"]) == (c.p.address, c.d.address)
        assert record["stream"] is True
        assert record["attempts"] == 1
        assert 0 < record["first_byte_ms"] <= record["total_ms"]
        assert record["prefill_done_ms"] > 0
        assert {i["role"]: i["state"] for i in stats["instances"]} == {"P": "ready", "D": "ready"}
        assert stats["version"]
        assert stats["uptime_s"] >= 0


async def test_one_info_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "twolane.proxy")
    async with cluster() as c:
        await c.complete()
        transfer_id = (await c.d.call()).kv["transfer_id"]
        await eventually(lambda: any(r.message.startswith("request ") for r in caplog.records))
        (line,) = [r.message for r in caplog.records if r.message.startswith("request ")]
        assert f"transfer_id={transfer_id} " in line
        assert " outcome=ok " in line


async def test_many_at_once_over_kept_connections() -> None:
    async with cluster(2, 2) as c:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=c.url, timeout=30, limits=limits, trust_env=False) as http:
            bodies = [{"prompt": str(i), "stream": i % 2 == 0} for i in range(200)]
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
        assert {a.status_code for a in answers} == {200}
        assert all(b"three" in a.content for a in answers)
        assert {len(i.calls) for i in (*c.prefills, *c.decodes)} == {100}  # shared evenly


async def test_keep_alive_connection_serves_one_request_after_another() -> None:
    async with cluster() as c:
        reader, writer = await c.connect()
        for number in range(3):
            body = json.dumps({"prompt": str(number)}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            status, _, _ = await read_answer(reader)
            assert status == 200
            assert (await c.d.call(number)).json["prompt"] == str(number)
        writer.close()


async def test_slow_reader_slows_nobody_else() -> None:
    async def pour(call: Call) -> None:
        if call.json.get("user") != "slow":
            await answer(call)
            return
        call.start_stream()
        while not call.gone.is_set():
            await call.send(b"data: " + b"x" * 65536 + b"\n\n")

    async with cluster() as c:
        c.d.behave = pour
        writers = []
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "user": "slow"}).encode()
        for _ in range(8):
            _, writer = await c.connect()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            writers.append(writer)
        await c.d.call(7)
        await asyncio.sleep(0.3)  # by now every buffer on the way is full
        async with asyncio.timeout(30):
            for _ in range(20):
                assert (await c.complete(stream=True)).status_code == 200
        for writer in writers:
            writer.transport.abort()
