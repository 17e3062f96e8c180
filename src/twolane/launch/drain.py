"""Before a restart that somebody asked for: nothing new goes to the instance, and what it has ends first."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import zmq

from twolane.launch import probes
from twolane.launch.plan import Plan, ServiceSpec
from twolane.protocol import Registration, encode

log = logging.getLogger(__name__)

POLL_S = 0.2


async def drain(plan: Plan, spec: ServiceSpec) -> None:
    """Tells the proxy, in the instance's name, that it leaves; returns when the proxy has no request there any more, or
    after `plan.drain_s`. At once where the proxy doesn't know the instance.

    An instance without an epoch (P2pNcclConnector's) isn't drained: the proxy could not tell it from its successor.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)  # of another identity than the instance's
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"tcp://{plan.discovery_address}")
    deadline_s = time.monotonic() + plan.drain_s
    try:
        while entry := await asyncio.to_thread(_entry, plan.proxy_address, spec.address):
            if not entry.get("epoch") or (entry["state"] == "leaving" and not entry["in_flight"]):
                return
            if time.monotonic() > deadline_s:
                log.warning("service=%s event=drain_timeout in_flight=%d", spec.name, entry["in_flight"])
                return
            socket.send(encode(_last_word(entry)))
            await asyncio.sleep(POLL_S)
    finally:
        socket.close()


def _entry(proxy_address: str, address: str) -> dict[str, Any] | None:
    known = probes.instances(proxy_address) or []
    return next((entry for entry in known if entry.get("address") == address), None)


def _last_word(entry: dict[str, Any]) -> Registration:
    return Registration(
        type=entry["role"],
        http_address=entry["address"],
        zmq_address=entry["control_address"],
        kind=entry["kind"],
        epoch=entry["epoch"],
        name=entry["name"],
        gpus=entry["gpus"],
        leaving=True,
    )
