"""Ends an instance's work without losing any: the proxy gives it nothing new, and it finishes what it has.

vLLM's server aborts what runs when it gets SIGTERM, in every release, so that comes only afterwards. Until then the
supervisor says the instance's last words for it: a registration with `leaving`, which every release of the connector
has (and which vLLM's NixlConnector, for which the supervisor registers, could not say at all).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import zmq

from twolane.curve import derive_keys, speak
from twolane.launch import probes
from twolane.launch.plan import Plan, ServiceSpec
from twolane.launch.registrar import TYPES
from twolane.protocol import Registration, encode

POLL_S = 0.3
LEAVING = "leaving"  # a state of the proxy's


async def drained(plan: Plan, spec: ServiceSpec, timeout_s: float) -> bool:
    """Returns when nothing is in flight there any more, or, with False, after `timeout_s`.

    At once where the instance has no epoch (P2pNcclConnector's): the proxy could not tell it from its next life.
    """
    goodbye = Goodbye(plan)
    deadline_s = time.monotonic() + timeout_s
    try:
        while not await asyncio.to_thread(_has_ended, plan, spec, goodbye):
            if time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(POLL_S)
        return True
    finally:
        goodbye.close()


def _has_ended(plan: Plan, spec: ServiceSpec, goodbye: Goodbye) -> bool:
    """Whether it has nothing left. Tells the proxy, if that doesn't know yet (or was started again and forgot)."""
    known = probes.instances(plan.proxy_address) or []
    mine = [entry for entry in known if entry["address"] == spec.address]
    if not all(entry.get("epoch") for entry in mine):
        return True
    if staying := [entry for entry in mine if entry["state"] != LEAVING]:
        goodbye.say(spec, staying[0])
        return False
    return not any(entry["in_flight"] for entry in mine) and probes.is_idle(spec)


class Goodbye:
    """Owns a socket; never blocks."""

    def __init__(self, plan: Plan) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        speak(self._socket, derive_keys(Path(plan.secret_file).read_text().strip() if plan.secret_file else ""))
        self._socket.connect(f"tcp://{plan.discovery_address}")

    def say(self, spec: ServiceSpec, entry: dict[str, str]) -> None:
        """`entry`: what the proxy knows of it. The epoch in it says which life is over."""
        words = Registration(
            type=TYPES[spec.role],
            http_address=spec.address,
            zmq_address=entry["control_address"],
            kind=entry["kind"],  # type: ignore[arg-type]  # it comes from a registration
            epoch=entry["epoch"],
            leaving=True,
            name=spec.name,
        )
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(words), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()
