"""Speaks to the proxy for instances whose connector doesn't register (vLLM's NixlConnector), or tells neither name nor
GPUs (P2pNcclConnector)."""

from __future__ import annotations

import contextlib
import time
import uuid

import zmq

from twolane.launch.plan import Plan, ServiceSpec
from twolane.protocol import LANES, REGISTER_EVERY_S, Kind, Registration, Role, encode

TYPES: dict[str, Role] = {lane: role for role, lane in LANES.items()}


class Registrar:
    """One instance's. Owns a socket; `tick` never blocks. Used by one thread."""

    def __init__(self, spec: ServiceSpec, discovery_address: str, kind: Kind) -> None:
        address = f"{spec.host}:{spec.kv_port}"
        speaks_alone = kind == "nixl"
        self._me = Registration(
            type=TYPES[spec.role],
            http_address=spec.address,
            zmq_address=address,
            kind=kind,
            epoch=uuid.uuid4().hex if speaks_alone else "",  # P2pNcclConnector's own registrations have none
            name=spec.name,
            gpus=list(spec.gpu_uuids),
        )
        self._next_s = 0.0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        # Not the identity under which a connector that registers by itself is connected.
        self._socket.setsockopt(zmq.IDENTITY, (address if speaks_alone else f"{address} launcher").encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{discovery_address}")

    def tick(self) -> None:
        if time.monotonic() < self._next_s:
            return
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(self._me), zmq.NOBLOCK)
            self._next_s = time.monotonic() + REGISTER_EVERY_S

    def close(self) -> None:
        self._socket.close()


def make_registrar(plan: Plan, spec: ServiceSpec) -> Registrar | None:
    """None where the connector tells it all."""
    if plan.kv == "twolane" or spec.role == "proxy":
        return None
    return Registrar(spec, plan.discovery_address, plan.kv)
