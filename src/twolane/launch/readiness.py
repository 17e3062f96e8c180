"""When a service that was started is ready, found out by asking it and the proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from twolane.launch import probes
from twolane.launch.diagnose import not_registered
from twolane.launch.phases import FIRST_ANSWER, REGISTERING, STARTING_SERVER
from twolane.launch.plan import Plan
from twolane.launch.service import Service

TICK_S = 0.1
LOADING_TICK_S = 0.5  # the machine has better things to do then
PROXY_START_S = 60.0


async def until_ready(plan: Plan, service: Service) -> None:
    """StartError if it ends before that, or takes too long."""
    timeout_s = plan.start_timeout_s if service.is_instance else min(plan.start_timeout_s, PROXY_START_S)
    try:
        async with asyncio.timeout(timeout_s):
            await _steps(plan, service)
    except TimeoutError as error:
        raise service.error(await asyncio.to_thread(_why_not_ready, plan, service, timeout_s)) from error


async def _steps(plan: Plan, service: Service) -> None:
    proxy = plan.proxy_address
    if not service.is_instance:
        return await _poll(service, lambda: probes.proxy_answers(proxy))
    await _poll(service, lambda: service.is_placed and probes.is_healthy(service.spec), LOADING_TICK_S)
    service.enter(FIRST_ANSWER)
    await _poll(service, lambda: probes.serves_a_token(service.spec, plan.model.names[0]))
    service.enter(REGISTERING)
    return await _poll(service, lambda: probes.is_registered(proxy, service.spec))


async def _poll(service: Service, probe: Callable[[], bool], loading_tick_s: float = TICK_S) -> None:
    """Until the probe says yes, asked at every tick, or more rarely while the log says that it loads.

    StartError as soon as the child has ended.
    """
    next_s = 0.0
    while True:
        service.check_alive()
        if time.monotonic() >= next_s:
            if await asyncio.to_thread(probe):
                return
            next_s = time.monotonic() + loading_tick_s
        service.read_log()
        if service.state.phase in {STARTING_SERVER, REGISTERING}:
            next_s = 0.0
        await asyncio.sleep(TICK_S)


def _why_not_ready(plan: Plan, service: Service, timeout_s: float) -> str:
    what = f"was not ready after {timeout_s:.0f} s (it was at: {service.state.phase}; TIMEOUT_SECONDS allows more)"
    if service.state.phase != REGISTERING:
        return what
    known = probes.known_instances(plan.proxy_address)
    return f"{what}: {not_registered(service.spec.address, plan.discovery_address, plan.kv, known)}"
