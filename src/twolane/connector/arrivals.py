"""D's table of transfers: who waits for KV, whose last byte is due, what is over and what the engine heard of it.

No sockets, no clock. Owner: DecodeSide, under its agent's lock. Here the engine's thread asks; what is said to P is in
`decode_side`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container
from dataclasses import dataclass

from twolane.connector.agent import logger
from twolane.connector.head_start import OVERDUE_S, PER_TOKEN_S, POOR_FOR_S, POOR_WAIT_S
from twolane.connector.incoming import Incoming, IncomingState
from twolane.connector.messages import Announce
from twolane.connector.plan import Ended, Receive
from twolane.connector.stats import Cause, Counters
from twolane.connector.story import Story


@dataclass(frozen=True)
class Finished:
    """For vLLM's scheduler: requests that no longer wait, and the blocks of theirs that hold nothing."""

    req_ids: set[str]
    invalid_block_ids: set[int]


class Arrivals:
    """Mutable state: open transfers, what is over but not reported, what is reported but not computed with, and which
    forecasts count for nothing."""

    def __init__(self, block_size: int, num_layers: int, head_start_s: float, counters: Counters, story: Story) -> None:
        self._block_size = block_size
        self._num_layers = num_layers
        self._head_start_s = head_start_s
        self._counters = counters
        self._story = story
        self._open: dict[str, Incoming] = {}
        self._finished = Finished(set(), set())
        self._landed: list[Incoming] = []  # not reported yet
        self._stepping: list[Incoming] = []  # reported, not computed with yet
        self._late_until_s: dict[str, float] = {}  # P's address -> until when its forecasts count for nothing

    # -- what comes and goes

    def add(self, receive: Receive, address: str, now_s: float) -> Incoming | None:
        """Blocks were allocated, for KV of the P at this address; None if it failed at once."""
        announce = Announce(
            receive.transfer_id, receive.num_tokens, receive.first_block, receive.block_ids, receive.digest
        )
        sizes = (self._num_layers, self._block_size)
        incoming = Incoming(receive.req_id, announce, address, *sizes, progress_at_s=now_s, story=receive.story)
        self._story.note(incoming, "allocated")
        if receive.transfer_id in self._open:
            incoming.fail(Cause.DUPLICATE, "transfer_id used twice", now_s)
            self._report(incoming)
            return None
        self._open[receive.transfer_id] = incoming
        return incoming

    def get(self, transfer_id: str) -> Incoming | None:
        return self._open.get(transfer_id)

    def all(self) -> list[Incoming]:
        return list(self._open.values())

    @property
    def is_empty(self) -> bool:
        """No request waits for KV."""
        return not self._open

    def close_if_over(self, incoming: Incoming) -> bool:
        """Whether this ended it."""
        if not incoming.is_over or self._open.get(incoming.transfer_id) is not incoming:
            return False
        del self._open[incoming.transfer_id]
        incoming.close_gate()
        self._report(incoming)
        return True

    def _report(self, incoming: Incoming) -> None:
        """To the engine: nothing writes to these blocks any more."""
        self._finished.req_ids.add(incoming.req_id)
        if incoming.state is IncomingState.LANDED:
            self._counters.kv_received_transfers += 1
            self._counters.kv_wait_seconds.append(incoming.progress_at_s - incoming.announced_at_s)
            self._story.note(incoming, "landed")
            self._landed.append(incoming)
        elif incoming.is_dropped:
            self._counters.receive_failed(Cause.CANCELLED)
        else:
            self._report_failed(incoming)
        self._counters.kv_received_tokens += incoming.landed_tokens

    def _report_failed(self, incoming: Incoming) -> None:
        assert incoming.cause is not None
        self._finished.invalid_block_ids.update(incoming.invalid_blocks())
        self._counters.receive_failed(incoming.cause)
        self._counters.kv_recomputed_tokens += incoming.num_tokens - incoming.landed_tokens
        logger.log(
            logging.DEBUG if incoming.cause is Cause.MISMATCH else logging.WARNING,
            "transfer failed, the prompt is computed here transfer_id=%s cause=%s landed_tokens=%d of=%d reason=%r",
            incoming.transfer_id,
            incoming.cause,
            incoming.landed_tokens,
            incoming.num_tokens,
            incoming.reason,
        )

    # -- what the engine hears

    def has_finished(self) -> bool:
        """`take_finished` has something."""
        return bool(self._finished.req_ids)

    def take_finished(self) -> Finished:
        """What is over since the last call: each announced request exactly once, also a dropped one."""
        finished, self._finished = self._finished, Finished(set(), set())
        self._hand_over()
        return finished

    def _hand_over(self) -> None:
        for incoming in self._landed:
            self._story.note(incoming, "reported")
        self._stepping, self._landed = self._stepping + self._landed, []

    @property
    def is_stepping(self) -> bool:
        """`end_step` has something to note. Filled and emptied by the engine's thread alone: needs no lock."""
        return bool(self._stepping)

    def end_step(self) -> None:
        """A forward pass was launched: for the story alone."""
        for incoming in self._stepping:
            self._story.note(incoming, "stepped")
        self._stepping = []

    def note_ended(self, ended: list[Ended]) -> None:
        for one in ended:
            self._story.note(one, "ended", one.at_s)

    # -- head starts (head_start.py)

    def expect(self, incoming: Incoming, at_s: float, now_s: float) -> None:
        """P's forecast of the last byte."""
        if now_s >= self._late_until_s.get(incoming.address, 0):
            incoming.expected_at_s = at_s

    def take_due(self, now_s: float) -> list[str]:
        """Requests whose last byte is due, for an engine that has nothing else to do; each once."""
        due = [one for one in self._open.values() if self._due_s(one, now_s) <= now_s]
        for incoming in due:
            incoming.told_soon = True
        return [incoming.req_id for incoming in due]

    def next_due_s(self, now_s: float) -> float:
        """When `take_due` has something, as things look now; infinite if nothing is in sight."""
        return min((self._due_s(one, now_s) for one in self._open.values()), default=math.inf)

    def _due_s(self, incoming: Incoming, now_s: float) -> float:
        if incoming.told_soon:
            return math.inf
        return incoming.due_s(now_s, self._head_start_s + incoming.announce.num_tokens * PER_TOKEN_S, OVERDUE_S)

    def open_of(self, req_ids: Container[str]) -> list[Incoming]:
        """Those of these requests to whose blocks something may still be written."""
        return [one for one in self._open.values() if one.req_id in req_ids]

    def held(self, early: list[Incoming]) -> None:
        """A step waits for these."""
        for incoming in early:
            self._story.note(incoming, "held")

    def started_early(self, early: list[Incoming], waited_s: float, now_s: float) -> None:
        """A step waited so long for these, and computes now. A P that was far too late gives no head start for a
        while."""
        self._counters.kv_head_starts += len(early)
        if waited_s > POOR_WAIT_S:
            self._late_until_s |= {incoming.address: now_s + POOR_FOR_S for incoming in early}
        self._hand_over()
