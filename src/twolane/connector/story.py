"""What happens to each transfer and when. Noted once, for two readers: a file (the benchmarks' stage tables, if
`trace_file` is set), and the proxy, for the transfers whose HandoffParams ask for a story."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Literal, Protocol

from twolane.protocol import MAX_STORY_EVENTS, MAX_STORY_ID_LENGTH, Role, StoryEvent, encode_json

Event = Literal[
    "offered",  # P: the first step after the scheduler got the request begins
    "scheduled",  # P: the first step that computes some of it begins
    "announced",  # P: D's Announce is there
    "launched",  # P: the forward pass of a chunk was launched; the last one is the prompt's end
    "computed",  # P: its last layer is through, where the transport knows
    "pushed",  # P: the last byte is in D's blocks, or in the last slot
    "allocated",  # D: the scheduler gave the blocks
    "announce_sent",  # D
    "held",  # D: a step that computes with it begins before its last byte is there, and waits
    "landed",  # D: the last byte is in the blocks, and D knows it
    "reported",  # D: the engine was told
    "stepped",  # D: the forward pass that computes with it was launched, and has nothing to wait for any more
    "ended",  # D: the scheduler has the last token, or the request was aborted
]

_MAX_WAITING = 16 * MAX_STORY_EVENTS


class Transfer(Protocol):
    """What a story is about."""

    @property
    def transfer_id(self) -> str: ...

    @property
    def story(self) -> bool:
        """The proxy asked for it."""
        ...


class Outbox:
    """Events on their way to the proxy. Filled under the agent's lock, emptied by the agent's thread without it."""

    def __init__(self) -> None:
        self._events: deque[StoryEvent] = deque()
        self._num_dropped = 0

    def put(self, event: StoryEvent) -> None:
        if len(self._events) < _MAX_WAITING and len(event.transfer_id) <= MAX_STORY_ID_LENGTH:
            self._events.append(event)
        else:
            self._num_dropped += 1

    @property
    def has_many(self) -> bool:
        """A message would be full."""
        return len(self._events) >= MAX_STORY_EVENTS

    def take(self) -> tuple[list[StoryEvent], int]:
        """What one message holds, oldest first, and how many were dropped since the last call."""
        events = [self._events.popleft() for _ in range(min(len(self._events), MAX_STORY_EVENTS))]
        num_dropped, self._num_dropped = self._num_dropped, 0
        return events, num_dropped

    def give_back(self, events: list[StoryEvent], num_dropped: int) -> None:
        """They couldn't be sent."""
        self._events.extendleft(reversed(events))
        self._num_dropped += num_dropped


class Story:
    """Used under the agent's lock."""

    def __init__(self, side: Role, rank: int, trace_file: str = "", outbox: Outbox | None = None) -> None:
        """`trace_file` gets `.{side}{rank}.jsonl` behind it, and a JSON line an event; empty: no file. `outbox`: None
        where nobody is told, as on all ranks but the first."""
        self._facts = {"side": side, "rank": rank}
        self._outbox = outbox
        path = f"{trace_file}.{side}{rank}.jsonl"
        self._file = Path(path).open("ab", buffering=0) if trace_file else None  # noqa: SIM115

    def note(self, transfer: Transfer, event: Event, at_s: float | None = None) -> None:
        """`at_s`: monotonic seconds, the same clock in all processes of a host; now if it isn't given."""
        is_told = transfer.story and self._outbox is not None
        if not is_told and self._file is None:
            return
        t = time.monotonic() if at_s is None else at_s
        if self._outbox is not None and is_told:
            self._outbox.put(StoryEvent(transfer.transfer_id, event, t))
        if self._file is not None:
            line = {"t": t, **self._facts, "transfer_id": transfer.transfer_id, "event": event}
            self._file.write(encode_json(line) + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
