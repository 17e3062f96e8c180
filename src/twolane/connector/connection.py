"""D's connection to one P worker."""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from twolane.connector.transport.base import Receiver
from twolane.protocol import Hello, Ping, ToPrefill, encode

PING_EVERY_S = 1.0


@dataclass
class Connection:
    """From the first message until P dies or falls silent. Used by the agent's thread, under its lock."""

    address: str
    socket: zmq.Socket[bytes]
    last_word_s: float
    last_ping_s: float
    receiver: Receiver | None = None  # None until Welcome
    transfers: set[str] = field(default_factory=set)  # that wait for this P
    mismatch: str = ""  # why no KV can come from it

    @classmethod
    def open(cls, context: zmq.Context[zmq.Socket[bytes]], address: str, hello: Hello, now_s: float) -> Connection:
        """Says Hello; doesn't wait for the answer, nor for P to be there. ZMQError if that is no address."""
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # bounded by open transfers and by P's slots
        try:
            socket.connect(f"tcp://{address}")
        except zmq.ZMQError:
            socket.close()
            raise
        made = cls(address, socket, now_s, now_s)
        made.send(hello)
        return made

    def send(self, message: ToPrefill) -> None:
        self.socket.send(encode(message), zmq.NOBLOCK)

    def is_silent(self, now_s: float, timeout_s: float) -> bool:
        """Whether P owes a word for `timeout_s`. Pings it meanwhile, so that a busy P has something to answer."""
        if not self.transfers:
            self.last_word_s = now_s  # nobody waits for it
        elif now_s - self.last_word_s > timeout_s:
            return True
        elif now_s - self.last_ping_s > PING_EVERY_S:
            self.last_ping_s = now_s
            self.send(Ping())
        return False

    def close(self) -> None:
        self.socket.close()
        if self.receiver is not None:
            self.receiver.close()
