"""Registers instances whose connector doesn't do it by itself (vLLM's NixlConnector) at the proxy, on their behalf."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Literal

import msgspec
import zmq

from twolane.launch.plan import Plan, ServiceSpec
from twolane.protocol import REGISTER_EVERY_S, Registration, encode

TYPES: dict[str, Literal["P", "D"]] = {"prefill": "P", "decode": "D"}


class Registrar:
    """One instance's. Owns a socket; `tick` never blocks. Used by one thread."""

    def __init__(self, spec: ServiceSpec, discovery_address: str) -> None:
        address = f"{spec.host}:{spec.kv_port}"
        self._me = Registration(
            type=TYPES[spec.role],
            http_address=spec.address,
            zmq_address=address,
            kind="nixl",
            epoch=uuid.uuid4().hex,
            name=spec.name,
        )
        self._next_s = 0.0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, address.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{discovery_address}")

    def renew(self) -> None:
        """The instance is about to be another process."""
        self._me = msgspec.structs.replace(self._me, epoch=uuid.uuid4().hex)

    def tick(self) -> None:
        if time.monotonic() < self._next_s:
            return
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(self._me), zmq.NOBLOCK)
            self._next_s = time.monotonic() + REGISTER_EVERY_S

    def close(self) -> None:
        self._socket.close()


def needs_registrar(plan: Plan, spec: ServiceSpec) -> bool:
    return plan.kv == "nixl" and spec.role != "proxy"
