"""More load than allowed: a fair queue with a deadline, and 429."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.proxy.scripted import MODEL, Call, Cluster, answer, cluster, eventually, hang

from twolane.errors import TooBusyError
from twolane.proxy.admission import Admission


class Gate:
    """Answers requests one by one, when the test says so."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.steps = asyncio.Semaphore(0)

    async def __call__(self, call: Call) -> None:
        self.users.append(call.json["user"])
        await self.steps.acquire()
        await answer(call)


async def queued(c: Cluster, count: int) -> None:
    async with asyncio.timeout(5):
        while (await c.stats())["queued"] != count:  # noqa: ASYNC110 - the proxy tells of it only when asked
            await asyncio.sleep(0.005)


async def test_queue_is_first_come_first_served() -> None:
    async with cluster(max_in_flight=1, max_queued=10) as c:
        c.d.behave = gate = Gate()
        asking = []
        for number in range(5):
            asking.append(asyncio.create_task(c.complete(user=str(number))))
            await queued(c, number)
        for number in range(5):
            await eventually(lambda n=number: len(gate.users) == n + 1)  # type: ignore[misc]
            gate.steps.release()
        assert [(await task).status_code for task in asking] == [200] * 5
        assert gate.users == ["0", "1", "2", "3", "4"]
        assert (await c.stats())["in_flight"] == 0


async def test_full_queue_and_a_late_turn_are_429_with_retry_after() -> None:
    async with cluster(max_in_flight=1, max_queued=1, queue_timeout_s=0.2) as c:
        c.d.behave = c.p.behave = hang
        first = asyncio.create_task(c.complete())
        await c.d.call()
        late = asyncio.create_task(c.complete())
        await queued(c, 1)
        refused = await c.complete()
        for answered in (refused, await late):
            assert answered.status_code == 429
            assert int(answered.headers["retry-after"]) > 0
            assert answered.json()["error"]["type"] == "rate_limit_error"
            assert answered.headers["x-request-id"]
        stats = await c.stats()
        assert stats["requests"]["/v1/completions"] == {"too_busy": 2}
        assert (stats["in_flight"], stats["queued"]) == (1, 0)
        assert (await c.http.get("/health")).status_code == 200  # answered whatever the load
        assert (await c.http.get("/stats")).status_code == 200
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_client_that_leaves_leaves_the_queue() -> None:
    async with cluster(max_in_flight=1, max_queued=10) as c:
        c.d.behave = gate = Gate()
        first = asyncio.create_task(c.complete(user="first"))
        await c.d.call()
        _, writer = await c.connect()
        body = json.dumps({"model": MODEL, "prompt": "x", "user": "left"}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await queued(c, 1)
        last = asyncio.create_task(c.complete(user="last"))
        await queued(c, 2)
        writer.close()
        await queued(c, 1)
        gate.steps.release()
        gate.steps.release()
        assert (await first).status_code == (await last).status_code == 200
        assert gate.users == ["first", "last"]


async def test_place_given_back_goes_to_who_waits_and_never_to_two() -> None:
    admission = Admission(2, 10, 5.0)
    await admission.enter()
    await admission.enter()
    turns = [asyncio.create_task(admission.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    admission.leave()
    assert not admission.try_enter()  # nobody overtakes
    await turns[0]
    assert (admission.in_flight, admission.queued) == (2, 2)
    turns[1].cancel()
    await asyncio.gather(turns[1], return_exceptions=True)
    assert admission.queued == 1
    admission.leave()
    await turns[2]
    admission.leave()
    admission.leave()
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_turn_that_comes_in_the_moment_of_cancelling_is_passed_on() -> None:
    admission = Admission(1, 10, 5.0)
    await admission.enter()
    cancelled, waiting = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    admission.leave()  # the turn of the first
    cancelled.cancel()
    await waiting
    assert (admission.in_flight, admission.queued) == (1, 0)


async def test_queue_is_bounded() -> None:
    admission = Admission(1, 0, 5.0)
    await admission.enter()
    with pytest.raises(TooBusyError):
        await admission.enter()
