"""Tells the proxy that this instance is there. Format and pace are P2pNcclConnector's; see protocol.Registration."""

from __future__ import annotations

import contextlib
import time

import msgspec
import zmq

from twolane.protocol import REGISTER_EVERY_S, Load, Registration, encode, sign

_SOONEST_S = 0.5  # between two registrations, however fast the load changes


class Registrar:
    """Sends the registration every 3 s, or sooner when the load changed much, over a DEALER whose identity is the
    control address. Never blocks.

    Used by the agent's thread alone, but for `load`, which the engine's thread may set at any time. `problem` is for
    whoever knows of one to set, and to clear.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], discovery_address: str, me: Registration, secret: str = ""
    ) -> None:
        """`secret`: what the proxy wants registrations signed with; empty: not signed."""
        self._me = me
        self._secret = secret
        self.load: Load | None = None
        self.problem = ""
        self._next_s = 0.0
        self._soonest_s = 0.0
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, me.zmq_address.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(f"tcp://{discovery_address}")

    def tick(self, now_s: float) -> None:
        load = self.load
        has_news = self.problem != self._me.problem or changed_much(self._me.load, load)
        if now_s < self._soonest_s or (now_s < self._next_s and not has_news):
            return
        me = msgspec.structs.replace(self._me, load=load, problem=self.problem)
        if self._send(me):
            self._me = me
            self._next_s, self._soonest_s = now_s + REGISTER_EVERY_S, now_s + _SOONEST_S

    def close(self) -> None:
        """Says goodbye, so that the proxy sends nothing more here."""
        self._send(msgspec.structs.replace(self._me, leaving=True, load=None))
        self._socket.close(linger=200)  # ms

    def _send(self, registration: Registration) -> bool:
        if self._secret:
            registration = sign(registration, self._secret, time.time())
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(registration), zmq.NOBLOCK)
            return True
        return False


def changed_much(told: Load | None, now: Load | None) -> bool:
    """Whether the proxy might choose differently if it knew: a quarter more or fewer requests, an eighth of the blocks,
    or a queue that wasn't there."""
    if told is None or now is None:
        return told is not now
    if bool(told.num_waiting) is not bool(now.num_waiting):
        return True
    num_told, num_now = told.num_running + told.num_waiting, now.num_running + now.num_waiting
    return 4 * abs(num_now - num_told) > num_told or 8 * abs(now.free_blocks - told.free_blocks) > now.num_blocks
