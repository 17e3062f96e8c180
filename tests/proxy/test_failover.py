"""Who fails, and what the client sees all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest
from tests.proxy.scripted import Behaviour, Call, Cluster, ScriptedInstance, answer, cluster, eventually, hang

from twolane.proxy.pool import State


async def fail_with_500(call: Call) -> None:
    await call.reply(500, {"error": {"message": "boom"}})


async def reset(call: Call) -> None:
    call.reset()


async def promise_more_than_comes(call: Call) -> None:
    call.head(200, {"content-type": "application/json", "content-length": "1000"})
    call.writer.write(b'{"half":')
    await call.writer.drain()
    call.reset()


async def speak_no_http(call: Call) -> None:
    call.writer.write(b"what?\r\n\r\n")


FAILURES = [fail_with_500, reset, hang, speak_no_http]


def once(fail: Behaviour, *instances: ScriptedInstance) -> None:
    """Whichever of `instances` gets the first request fails it; everything else is answered."""
    left = [1]

    async def behave(call: Call) -> None:
        if left:
            left.pop()
            await fail(call)
        else:
            await answer(call)

    for instance in instances:
        instance.behave = behave


async def wait_for_kv(call: Call) -> None:
    """D without KV: nothing, until the proxy gives up on this leg; with nobody to wait for: an answer."""
    if call.kv is None:
        await answer(call)
    else:
        await call.gone.wait()


@pytest.mark.parametrize("fail", [*FAILURES, promise_more_than_comes])
async def test_prefill_failure_moves_to_another_prefill_with_a_new_transfer(fail: Behaviour) -> None:
    calls: list[Call] = []

    async def decode(call: Call) -> None:
        calls.append(call)
        if len(calls) == 1:
            await call.gone.wait()  # it never gets the KV
        else:
            await answer(call)

    async with cluster(2, 1, prefill_timeout_s=0.3) as c:
        once(fail, *c.prefills)
        c.d.behave = decode
        answered = await c.complete()
        assert answered.status_code == 200
        first, second = calls
        assert first.gone.is_set()
        assert first.kv["transfer_id"] != second.kv["transfer_id"]
        assert first.kv["remote_address"] != second.kv["remote_address"]
        (record,) = (await c.stats())["recent"]
        assert (record["outcome"], record["attempts"]) == ("ok", 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail", FAILURES)
async def test_only_prefill_fails_then_decode_computes_the_prompt_itself(fail: Behaviour, stream: bool) -> None:
    async with cluster(prefill_timeout_s=0.3) as c:
        c.p.behave, c.d.behave = fail, wait_for_kv
        answered = await c.complete(stream=stream)
        assert answered.status_code == 200
        assert b"three" in answered.content
        assert "kv_transfer_params" not in c.d.calls[-1].json
        assert (await c.stats())["recent"][0]["alone_because"] == "prefill_failed"


async def test_prefill_failure_after_decodes_head_but_before_its_first_byte_still_moves_on() -> None:
    async def head_only(call: Call) -> None:
        if call.kv is None:
            await answer(call)
            return
        call.start_stream()  # vLLM sends a stream's head when it has accepted the request
        await call.writer.drain()
        head_sent.set()
        await call.gone.wait()

    async def fail_after_head(call: Call) -> None:
        await head_sent.wait()
        await asyncio.sleep(0.05)
        call.reset()

    head_sent = asyncio.Event()
    async with cluster() as c:
        c.p.behave, c.d.behave = fail_after_head, head_only
        answered = await c.complete(stream=True)
        assert answered.status_code == 200
        assert b"three" in answered.content


async def test_prefill_failure_after_decode_began_changes_nothing() -> None:
    began, failed = asyncio.Event(), asyncio.Event()

    async def prefill(call: Call) -> None:
        await began.wait()
        call.reset()
        failed.set()

    async def decode(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        began.set()
        await failed.wait()
        await eventually(lambda: c.view(c.p).in_flight == 0)  # the proxy knows
        await call.event({"number": 2})
        await call.end_stream()

    async with cluster() as c:
        c.p.behave, c.d.behave = prefill, decode
        answered = await c.complete(stream=True)
        assert answered.content == b'data: {"number": 1}\n\ndata: {"number": 2}\n\ndata: [DONE]\n\n'
        assert len(c.d.calls) == 1


@pytest.mark.parametrize("fail", FAILURES)
async def test_decode_failure_moves_to_another_decode_with_the_prefill_leg_again(fail: Behaviour) -> None:
    async with cluster(1, 2, first_byte_timeout_s=0.3) as c:
        once(fail, *c.decodes)
        assert (await c.complete()).status_code == 200
        calls = [call for d in c.decodes for call in d.calls]
        assert sorted(len(d.calls) for d in c.decodes) == [1, 1]
        transfer_ids = {call.kv["transfer_id"] for call in calls}
        assert len(transfer_ids) == 2
        assert {call.kv["transfer_id"] for call in c.p.calls} == transfer_ids


@pytest.mark.parametrize(("fail", "status"), [(fail_with_500, 502), (reset, 502), (hang, 504), (speak_no_http, 502)])
async def test_last_decode_fails_then_502_with_an_openai_error(fail: Behaviour, status: int) -> None:
    async with cluster(first_byte_timeout_s=0.3) as c:
        c.d.behave = fail
        answered = await c.complete(stream=True)
        assert answered.status_code == status
        error = answered.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert (await c.stats())["requests"] == {"/v1/completions": {"upstream_failed": 1}}


async def test_answer_that_breaks_off_before_its_length_becomes_502() -> None:
    async with cluster() as c:
        c.d.behave = promise_more_than_comes
        answered = await c.complete()
        assert answered.status_code == 502
        assert "broke off" in answered.json()["error"]["message"]


async def test_decode_dies_in_mid_stream_then_an_error_event_and_no_done() -> None:
    async def die(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        await call.send(b'data: {"numb')  # half an event is never passed on
        await asyncio.sleep(0.05)
        call.reset()

    async with cluster() as c:
        c.d.behave = die
        answered = await c.complete(stream=True)
        assert answered.status_code == 200
        first, event, rest = answered.content.split(b"\n\n")
        assert (first, rest) == (b'data: {"number": 1}', b"")
        name, data = event.split(b"\n")
        assert name == b"event: error"
        error = json.loads(data.removeprefix(b"data: "))["error"]
        assert error["code"] == 502
        assert (await c.stats())["recent"][0]["outcome"] == "decode_died"


async def test_decode_silent_in_mid_stream_ends_with_an_error_event() -> None:
    async def fall_silent(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        await call.gone.wait()

    async with cluster(stream_idle_timeout_s=0.2) as c:
        c.d.behave = fall_silent
        answered = await c.complete(stream=True)
        assert b"event: error" in answered.content
        assert b"[DONE]" not in answered.content
        await (await c.d.call()).gone.wait()


async def test_large_answer_cut_short_is_never_a_clean_200() -> None:
    async def cut(call: Call) -> None:
        call.head(200, {"content-type": "application/json", "content-length": "100000"})
        call.writer.write(b"x" * 50000)
        await asyncio.sleep(0.05)
        call.reset()

    async with cluster(max_held_body_bytes=1000) as c:
        c.d.behave = cut
        with pytest.raises(httpx.RemoteProtocolError):
            await c.complete()


async def test_no_instance_then_503_with_retry_after_and_only_prefill_as_well() -> None:
    for num_prefill in (0, 1):
        async with cluster(num_prefill, 0) as c:
            answered = await c.complete()
            assert answered.status_code == 503
            assert int(answered.headers["retry-after"]) > 0
            assert "decode" in answered.json()["error"]["message"]
            assert (await c.http.get("/v1/models")).status_code == 503
            health = await c.http.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "unavailable")


async def test_only_decode_serves_alone_and_health_says_degraded() -> None:
    async with cluster(0, 1) as c:
        assert (await c.complete()).status_code == 200
        assert "kv_transfer_params" not in (await c.d.call()).json
        health = await c.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
    async with cluster(1, 1) as c:
        assert (await c.http.get("/health")).json()["status"] == "ok"


async def load(c: Cluster, num_requests: int, act: Callable[[], Awaitable[None]]) -> list[httpx.Response]:
    """`num_requests` with 16 at once; `act` runs when a third has been answered."""
    gate = asyncio.Semaphore(16)
    answers: list[httpx.Response] = []
    third = asyncio.Event()

    async def one(number: int) -> None:
        async with gate:
            answers.append(await c.complete(user=str(number), stream=number % 2 == 0))
        if len(answers) > num_requests // 3:
            third.set()

    async with asyncio.TaskGroup() as tasks:
        for number in range(num_requests):
            tasks.create_task(one(number))
        await third.wait()
        await act()
    return answers


async def slow_answer(call: Call) -> None:
    await asyncio.sleep(0.01)  # so that requests are in flight when the instance dies
    await answer(call)


@pytest.mark.parametrize("role", ["P", "D"])
async def test_one_of_two_killed_under_load_loses_no_request_and_comes_back(role: str) -> None:
    async with cluster(2, 2) as c:
        for instance in (*c.prefills, *c.decodes):
            instance.behave = slow_answer
        victim = (c.prefills if role == "P" else c.decodes)[0]
        answers = await load(c, 150, victim.kill)
        assert {a.status_code for a in answers} == {200}
        # A stream that had begun on the killed D ends with an error event; nothing else may be less than whole.
        assert all(b"three" in a.content for a in answers)
        assert c.view(victim).state is State.EJECTED
        await victim.start()
        await eventually(lambda: c.view(victim).state is State.READY)
        before = len(victim.calls)
        await asyncio.gather(*(c.complete() for _ in range(4)))
        assert len(victim.calls) > before


async def test_idle_connection_that_the_instance_closed_costs_no_request() -> None:
    async with cluster() as c:
        for _ in range(5):
            assert (await c.complete()).status_code == 200

            async def answer_and_close(call: Call) -> None:
                await answer(call)
                call.reusable = False  # without `Connection: close`: the proxy believes that it is kept

            c.d.behave = c.p.behave = answer_and_close
        stats = await c.stats()
        assert stats["requests"] == {"/v1/completions": {"ok": 5}}
        assert {i["failures"] for i in stats["instances"]} == {0}


async def test_attempts_are_bounded() -> None:
    async with cluster(0, 8) as c:
        for d in c.decodes:
            d.behave = fail_with_500
        assert (await c.complete()).status_code == 502
        assert sum(len(d.calls) for d in c.decodes) == 4


async def test_the_only_d_that_closed_a_kept_alive_connection_while_it_was_stopped_is_asked_again() -> None:
    """The request lay unread in the socket; on waking up the server closes what was idle too long."""
    async with cluster() as stack:
        assert (await stack.complete()).status_code == 200

        async def close_late(call: Call) -> None:
            await asyncio.sleep(0.6)
            call.reset()

        once(close_late, stack.d)
        answered = await stack.complete()
        assert answered.status_code == 200
        assert stack.view(stack.d).state is State.READY
