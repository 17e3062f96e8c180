"""What D knows of one P worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from twolane.connector.numbering import Numbering
from twolane.connector.transfer import Incoming, IncomingState
from twolane.connector.transport.base import ReceiveChannel
from twolane.protocol import Cancel, Ping, ToPrefill

PING_EVERY_S = 1.0


@dataclass(eq=False)
class Peer:
    """From the first message until P is dead, silent or not to be understood."""

    address: str
    channel: ReceiveChannel
    last_word_s: float
    last_ping_s: float
    transfers: set[str] = field(default_factory=set)  # announced to this P and not over
    numbering: Numbering = field(default_factory=Numbering)
    mismatch: str = ""  # why no KV can come from it
    is_same_host: bool = False  # P's CLOCK_MONOTONIC is ours
    revoked_at_s: float = 0.0  # when it can't write any more, once it was dropped

    def is_silent(self, now_s: float, timeout_s: float) -> bool:
        """Whether P owes a word for `timeout_s`."""
        if not self.transfers:
            self.last_word_s = now_s  # nobody waits for it
        return now_s - self.last_word_s > timeout_s

    def ping(self, now_s: float, waiting: list[Incoming]) -> list[ToPrefill]:
        """What to say to a P that others wait for, once a second: so that a busy P has something to answer, and what
        was lost on the way is found out."""
        if not waiting or now_s - self.last_ping_s < PING_EVERY_S:
            return []
        self.last_ping_s = now_s
        quiet = [one for one in waiting if now_s - one.progress_at_s >= PING_EVERY_S]
        cancels = [Cancel(one.transfer_id, one.reason) for one in quiet if one.state is IncomingState.ENDING]
        return [*cancels, Ping([one.transfer_id for one in quiet if one.state is IncomingState.WAITING])]
