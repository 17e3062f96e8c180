"""Tells the proxy that this instance is there. Format and pace are P2pNcclConnector's; see protocol.Registration."""

from __future__ import annotations

import contextlib
import time

import msgspec
import zmq

from twolane.protocol import REGISTER_EVERY_S, Registration, encode, sign_registration


class Registrar:
    """Sends the registration every 3 s over a DEALER whose identity is the control address. Never blocks.

    `problem` is for whoever knows of one to set, and to clear; the proxy is told at the next tick.

    Used by the agent's thread alone.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], discovery_address: str, me: Registration, secret: str = ""
    ) -> None:
        """`secret`: what the proxy wants registrations signed with; empty: not signed."""
        self._me = me
        self._secret = secret
        self.problem = ""
        self._next_s = 0.0
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, me.zmq_address.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a proxy that isn't there
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(f"tcp://{discovery_address}")

    def tick(self, now_s: float) -> None:
        if self.problem != self._me.problem:
            self._me = msgspec.structs.replace(self._me, problem=self.problem)
            self._next_s = now_s
        if now_s >= self._next_s and self._send(self._me):
            self._next_s = now_s + REGISTER_EVERY_S

    def close(self) -> None:
        """Says goodbye, so that the proxy sends nothing more here."""
        self._send(msgspec.structs.replace(self._me, leaving=True))
        self._socket.close(linger=200)  # ms

    def _send(self, registration: Registration) -> bool:
        if self._secret:
            registration = sign_registration(registration, self._secret, time.time())
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(registration), zmq.NOBLOCK)
            return True
        return False
