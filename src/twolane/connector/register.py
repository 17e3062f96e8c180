"""Tells the proxy that this instance is there, and what became of its requests. Format and pace of the registrations
are P2pNcclConnector's; see protocol.Registration."""

from __future__ import annotations

import contextlib
import logging
import time

import msgspec
import zmq

from twolane.connector.story import Outbox
from twolane.curve import LOCKED_OUT, Keys, Knock, ZmqContext, speak
from twolane.protocol import REGISTER_EVERY_S, Load, Registration, Story, clock_identity, encode

logger = logging.getLogger("vllm.twolane")  # see agent.py

_SOONEST_S = 0.5  # between two registrations, however fast the load changes
_LOOK_EVERY_S = 1.0  # whether the proxy lets us in
_TELL_EVERY_S = 0.25  # between two messages about requests ...
_TELL_MANY_EVERY_S = 0.05  # ... that would be full


class Line:
    """To one proxy."""

    def __init__(self, context: ZmqContext, address: str, identity: bytes, keys: Keys | None) -> None:
        self._context = context
        self._address = address
        self._identity = identity
        self._keys = keys
        self._is_locked_out = False
        self._connect()

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._identity)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        self._socket.setsockopt(zmq.SNDHWM, 16)  # room for a goodbye behind what was just told
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        speak(self._socket, self._keys)
        self._knock = Knock(self._socket)
        self._socket.connect(f"tcp://{self._address}")

    def look(self) -> None:
        """Whether the proxy takes this instance for one of its own. One that didn't may be another by now."""
        self._knock.look()
        if self._knock.is_locked_out:
            if not self._is_locked_out:
                logger.error("can't register with the proxy at %s: %s", self._address, LOCKED_OUT)
            self._is_locked_out = True
            self._knock.close()
            self._socket.close(linger=0)
            self._connect()
        elif self._knock.is_let_in:
            self._is_locked_out = False

    def send(self, frame: bytes) -> bool:
        with contextlib.suppress(zmq.Again):
            self._socket.send(frame, zmq.NOBLOCK)
            return True
        return False

    def close(self) -> None:
        self._knock.close()
        self._socket.close(linger=200)  # ms


class Registrar:
    """Sends the registration every 3 s, or sooner when the load changed much, over a DEALER whose identity is the
    control address. Never blocks. What happened to requests (`outbox`) goes the same way, at most four times a second
    while it isn't much.

    Used by the agent's thread alone, but for `load`, which the engine's thread may set at any time. `problem` is for
    whoever knows of one to set, and to clear.
    """

    def __init__(self, context: ZmqContext, discovery_address: str, me: Registration, keys: Keys | None = None) -> None:
        """`discovery_address`: of all proxies, with commas between them. `keys`: of the deployment, where they listen
        to nobody else; None: not encrypted."""
        self._me = me
        self.load: Load | None = None
        self.problem = ""
        self.outbox = Outbox()
        self._clock = clock_identity()
        self._told_at_s = 0.0
        self._next_s = 0.0
        self._soonest_s = 0.0
        self._look_s = 0.0
        identity = me.zmq_address.encode()
        self._lines = [Line(context, address, identity, keys) for address in discovery_address.split(",")]

    def tick(self, now_s: float) -> None:
        if now_s >= self._look_s:
            self._look_s = now_s + _LOOK_EVERY_S
            for line in self._lines:
                line.look()
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
        for line in self._lines:
            line.close()

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
        frame = encode(message)
        return sum(line.send(frame) for line in self._lines) > 0


def changed_much(told: Load | None, now: Load | None) -> bool:
    """Whether the proxy might choose differently if it knew: a quarter more or fewer requests, an eighth of the blocks,
    or a queue that wasn't there."""
    if told is None or now is None:
        return told is not now
    if bool(told.num_waiting) is not bool(now.num_waiting):
        return True
    num_told, num_now = told.num_running + told.num_waiting, now.num_running + now.num_waiting
    return 4 * abs(num_now - num_told) > num_told or 8 * abs(now.free_blocks - told.free_blocks) > now.num_blocks
