"""Draining through the real proxy, with a scripted instance behind it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.launch.fakes import make_spec
from tests.proxy.scripted import MODEL, Call, Cluster, cluster, eventually
from twolane.launch.drain import drained
from twolane.launch.plan import Plan, ServedModel
from twolane.proxy.pool import State


def plan_of(c: Cluster, folder: Path) -> Plan:
    spec = make_spec(folder, "", name="decode", role="decode", port=c.d.port)
    return Plan(
        services=(spec,),
        model=ServedModel(MODEL, (MODEL,)),
        proxy_address=f"127.0.0.1:{c.service.http_port}",
        discovery_port=c.service.discovery_port,
        start_timeout_s=1.0,
    )


async def test_what_runs_ends_and_what_is_new_goes_elsewhere(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def slow(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 0})
        await go_on.wait()
        await call.end_stream()

    async with cluster(1, 2, policy="round_robin") as c:
        for decode in c.decodes:
            decode.behave = slow
        streams = [asyncio.create_task(c.complete(stream=True)) for _ in c.decodes]
        calls = [await decode.call() for decode in c.decodes]
        plan = plan_of(c, tmp_path)
        waiting = asyncio.create_task(drained(plan, plan.services[0], 60.0))
        await eventually(lambda: c.view(c.d).state is State.LEAVING)
        c.d.register(c.service.discovery_port)  # it goes on saying that it is there
        assert not waiting.done()
        streams += [asyncio.create_task(c.complete(stream=True)) for _ in range(2)]
        await c.decodes[1].call(2)
        assert len(c.d.calls) == 1
        go_on.set()
        await asyncio.wait_for(waiting, 30)
        assert {answer.status_code for answer in await asyncio.gather(*streams)} == {200}
        assert not any(call.gone.is_set() for call in calls)
        c.d.epoch = "second"
        c.d.register(c.service.discovery_port)
        await eventually(lambda: c.view(c.d).state is State.READY)


async def test_a_request_that_does_not_end_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    async def endless(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 0})
        await call.gone.wait()

    async with cluster(1, 1) as c:
        c.d.behave = endless
        stream = asyncio.create_task(c.complete(stream=True))
        await c.d.call()
        plan = plan_of(c, tmp_path)
        assert not await asyncio.wait_for(drained(plan, plan.services[0], 0.1), 30)
        assert c.view(c.d).in_flight == 1
        stream.cancel()
