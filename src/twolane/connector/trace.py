"""What happened to each transfer and when, for the stage tables of the benchmarks. Off unless `trace_file` is set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from twolane.protocol import encode_json

Event = Literal[
    "offered",  # P: the first step that schedules the request begins
    "announced",  # P: D's Announce is there
    "launched",  # P: the forward pass of the last chunk was launched
    "computed",  # P: its last layer is through, where the transport knows
    "pushed",  # P: the last byte is in D's blocks, or in the last slot
    "allocated",  # D: the scheduler gave the blocks
    "announce_sent",  # D
    "landed",  # D: the last byte is in the blocks, and D knows it
    "reported",  # D: the engine was told
    "stepped",  # D: the forward pass that follows was launched
]


class Trace:
    """Appends a JSON line an event. Used under the agent's lock."""

    def __init__(self, path: str, side: Literal["P", "D"], rank: int) -> None:
        """`path` gets `.{side}{rank}.jsonl` behind it; empty: nothing is written."""
        self._facts = {"side": side, "rank": rank}
        self._file = Path(f"{path}.{side}{rank}.jsonl").open("ab", buffering=0) if path else None  # noqa: SIM115

    def note(self, transfer_id: str, event: Event, at_s: float | None = None) -> None:
        """`at_s`: monotonic seconds, the same clock in all processes of a host; now if it isn't given."""
        if self._file is not None:
            t = time.monotonic() if at_s is None else at_s
            line = {"t": t, **self._facts, "transfer_id": transfer_id, "event": event}
            self._file.write(encode_json(line) + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
