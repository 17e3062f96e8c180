"""Tells the proxy that this instance is there, and what became of its requests. Format and pace of the registrations
are P2pNcclConnector's; see protocol.Registration."""

from __future__ import annotations

import contextlib
import time

import msgspec
import zmq

from twolane.connector.story import Outbox
from twolane.protocol import REGISTER_EVERY_S, Load, Registration, Story, clock_identity, encode, sign

_SOONEST_S = 0.5  # between two registrations, however fast the load changes
_TELL_EVERY_S = 0.25  # between two messages about requests ...
_TELL_MANY_EVERY_S = 0.05  # ... that would be full


class Registrar:
    """Sends the registration every 3 s, or sooner when the load changed much, over a DEALER whose identity is the
    control address. Never blocks. What happened to requests (`outbox`) goes the same way, at most four times a second
    while it isn't much.

    Used by the agent's thread alone, but for `load`, which the engine's thread may set at any time. `problem` is for
    whoever knows of one to set, and to clear.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], discovery_address: str, me: Registration, secret: str = ""
    ) -> None:
        """`discovery_address`: of all proxies, with commas between them. `secret`: what they want registrations signed
        with; empty: not signed."""
        self._me = me
        self._secret = secret
        self.load: Load | None = None
        self.problem = ""
        self.outbox = Outbox()
        self._clock = clock_identity()
        self._told_at_s = 0.0
        self._next_s = 0.0
        self._soonest_s = 0.0
        self._sockets = [self._connect(context, address) for address in discovery_address.split(",")]

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], discovery_address: str) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._me.zmq_address.encode())
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        socket.setsockopt(zmq.SNDHWM, 16)  # room for a goodbye behind what was just told
        socket.setsockopt(zmq.RECONNECT_IVL, 200)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.connect(f"tcp://{discovery_address}")
        return socket

    def tick(self, now_s: float) -> None:
        self._register(now_s)
        if now_s - self._told_at_s >= (_TELL_MANY_EVERY_S if self.outbox.has_many else _TELL_EVERY_S):
            self._tell(now_s)

    def _register(self, now_s: float) -> None:
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
        self._tell(time.monotonic())
        self._send(msgspec.structs.replace(self._me, leaving=True, load=None))
        for socket in self._sockets:
            socket.close(linger=200)  # ms

    def _tell(self, now_s: float) -> None:
        """What can't be sent is kept for the next time, up to a bound."""
        events, num_dropped = self.outbox.take()
        if events:
            self._told_at_s = now_s
            story = Story(self._me.type, self._me.http_address, self._clock, events, num_dropped)
            if self._send(story):
                return
        self.outbox.give_back(events, num_dropped)

    def _send(self, message: Registration | Story) -> bool:
        """To all proxies; False if none is there."""
        if self._secret:
            message = sign(message, self._secret, time.time())
        taken = False
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):
                socket.send(encode(message), zmq.NOBLOCK)
                taken = True
        return taken


def changed_much(told: Load | None, now: Load | None) -> bool:
    """Whether the proxy might choose differently if it knew: a quarter more or fewer requests, an eighth of the blocks,
    or a queue that wasn't there."""
    if told is None or now is None:
        return told is not now
    if bool(told.num_waiting) is not bool(now.num_waiting):
        return True
    num_told, num_now = told.num_running + told.num_waiting, now.num_running + now.num_waiting
    return 4 * abs(num_now - num_told) > num_told or 8 * abs(now.free_blocks - told.free_blocks) > now.num_blocks
