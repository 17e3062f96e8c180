"""D's side of one transfer, apart from sockets, threads and tensors: who may write to the request's blocks.

    ALLOCATED  nobody else knows of the blocks yet     until the forward passes that may still write to them are through
    WAITING    P may write                             until the last block landed, ABORT, P's death, a deadline, a drop
    ENDING     P may still write, nobody wants it      until P says that it writes no more, or can't any more
    LANDED / FAILED   no write can land any more; reported to vLLM's scheduler

Time comes in as an argument (monotonic seconds), decisions go out as values. Not thread-safe: the side that owns it is
guarded by its agent's lock. docs/ARCHITECTURE.md draws it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from twolane.connector.messages import Announce
from twolane.connector.parts import Cursor, Part
from twolane.connector.stats import Cause
from twolane.connector.transport.base import Gate, Items
from twolane.errors import TransferError


class IncomingState(enum.Enum):
    ALLOCATED = "allocated"
    WAITING = "waiting"
    ENDING = "ending"
    LANDED = "landed"
    FAILED = "failed"


@dataclass
class Incoming:
    """D's side of a transfer. Parts are begun and land in order, so that a cursor tells what is there."""

    req_id: str
    announce: Announce
    address: str  # P's control address, same rank
    num_layers: int
    block_size: int
    progress_at_s: float
    story: bool = False  # see protocol.HandoffParams
    announced_at_s: float = 0.0
    expected_at_s: float = 0.0  # P's forecast of the end; 0: none
    told_soon: bool = False  # the engine was told of it
    gate: Gate | None = None  # on which the GPU may wait for the last byte
    state: IncomingState = IncomingState.ALLOCATED
    cursor: Cursor = field(init=False)  # up to where reads were begun
    landed: Cursor = field(init=False)
    in_flight: int = 0  # reads begun and not done: they write the blocks
    is_fenced: bool = False  # P can't write (any more)
    is_dropped: bool = False  # nobody waits for it: neither a success nor a failure
    cause: Cause | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.cursor, self.landed = Cursor(self.num_layers), Cursor(self.num_layers)

    @property
    def transfer_id(self) -> str:
        return self.announce.transfer_id

    @property
    def num_blocks(self) -> int:
        return len(self.announce.block_ids)

    # -- events

    def announced(self, now_s: float) -> None:
        assert self.state is IncomingState.ALLOCATED
        self.state, self.progress_at_s = IncomingState.WAITING, now_s
        self.announced_at_s = now_s

    def targets(self, part: Part) -> Items:
        """In D's blocks. Raises TransferError on a gap, a repetition or an overrun."""
        if not self.cursor.is_at(part) or part.first_block + part.num_blocks > self.num_blocks:
            raise TransferError(f"{part} came where {self.cursor} of {self.num_blocks} blocks was due")
        return part.of(self.announce.block_ids)

    def begun(self, part: Part) -> None:
        """It is being written to D's blocks."""
        self.cursor.pass_by(part)
        self.in_flight += 1

    def has_landed(self, part: Part, now_s: float) -> None:
        """It is in D's blocks."""
        self.in_flight -= 1
        self.landed.pass_by(part)
        self.progress_at_s = now_s
        if self.state is IncomingState.WAITING and self.landed.block == self.num_blocks:
            self.state = IncomingState.LANDED

    def broken(self) -> None:
        """A read failed: what it was to write is unknown."""
        self.in_flight -= 1

    def fail(self, cause: Cause, reason: str, now_s: float, *, dropped: bool = False) -> None:
        """Nobody wants it, or it can't be had. Not over before nothing can write any more."""
        if self.state in (IncomingState.ALLOCATED, IncomingState.WAITING):
            self.is_fenced |= self.state is IncomingState.ALLOCATED
            self.state, self.progress_at_s = IncomingState.ENDING, now_s
            self.cause, self.reason = cause, reason
        self.is_dropped |= dropped
        self._settle()

    def fence(self) -> None:
        """P writes no more, or can't."""
        self.is_fenced = True
        self._settle()

    def hold(self) -> bool:
        """Whether the GPU waits for the last byte from here on, and P will end that."""
        if self.gate is None or not self.gate.is_kept:
            return False
        self.gate.hold()
        return True

    def close_gate(self) -> None:
        """It is over."""
        if self.gate is not None:
            self.gate.close()
            self.gate = None

    def _settle(self) -> None:
        if self.state is IncomingState.ENDING and self.is_fenced and self.in_flight == 0:
            self.state = IncomingState.FAILED

    # -- decisions

    @property
    def is_over(self) -> bool:
        self._settle()
        return self.state in (IncomingState.LANDED, IncomingState.FAILED)

    def due_s(self, now_s: float, head_start_s: float, overdue_s: float) -> float:
        """`head_start_s` before the last byte is expected, by a forecast that may still be true; infinite without."""
        if self.state is not IncomingState.WAITING or now_s >= self.expected_at_s + overdue_s:
            return math.inf
        return self.expected_at_s - head_start_s

    def overdue(self, now_s: float, transfer_timeout_s: float) -> bool:
        waits = self.state in (IncomingState.ALLOCATED, IncomingState.WAITING)
        return waits and now_s - self.progress_at_s > transfer_timeout_s

    def stuck(self, now_s: float, peer_timeout_s: float) -> bool:
        """P doesn't say that it writes no more."""
        return self.state is IncomingState.ENDING and now_s - self.progress_at_s > peer_timeout_s

    def invalid_blocks(self) -> list[int]:
        """Blocks of which not every byte landed: D must compute these itself."""
        return self.announce.block_ids[self.landed.block :]

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV was asked for."""
        return self.announce.num_tokens - self.announce.first_block * self.block_size

    @property
    def landed_tokens(self) -> int:
        """Tokens whose KV landed, of those that were asked for."""
        if self.landed.block == self.num_blocks:
            return self.num_tokens
        return self.landed.block * self.block_size
