"""What a run gathers, kept whole: every request with its raw times, and what was left out and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from twolane.bench.client import Sample

Part = Literal["warm-up", "unloaded", "loaded", "push", "push warm-up"]


@dataclass(frozen=True)
class Record:
    """One request. `turn`: the round it belongs to; requests of one turn and part ask the same on every route."""

    part: Part
    setup: str
    route: str
    length: int
    turn: int
    request_id: str
    sample: Sample


@dataclass
class Results:
    """Filled as the run goes on, so that whatever there is can be saved at any time.

    `proxied`: the proxies' own records, by request id. `received`: tokens by source on D's engine, a setup.
    `idle_cores`: how many a setup's processes keep busy while nobody asks.
    """

    records: list[Record] = field(default_factory=list)
    proxied: dict[str, dict[str, Any]] = field(default_factory=dict)
    received: dict[str, dict[str, float]] = field(default_factory=dict)
    idle_cores: dict[str, float] = field(default_factory=dict)
    moments: dict[str, dict[str, float]] = field(default_factory=dict)  # by transfer_id
    baselines: dict[str, str] = field(default_factory=dict)  # route -> route
    skipped: dict[str, str] = field(default_factory=dict)  # setup -> why
    beside: dict[str, int] = field(default_factory=dict)  # setup -> which of the groups that lived at once
    commands: dict[str, list[list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def good(self, part: Part, route: str, length: int | None = None) -> list[Record]:
        """Those that got all their tokens."""
        return [record for record in self.all(part, route, length) if not record.sample.error]

    def all(self, part: Part, route: str, length: int | None = None) -> list[Record]:
        return [
            record
            for record in self.records
            if record.part == part and record.route == route and length in (None, record.length)
        ]

    def routes(self, part: Part) -> list[str]:
        """In the order in which they were first asked."""
        return list(dict.fromkeys(record.route for record in self.records if record.part == part))

    def raw(self) -> dict[str, Any]:
        return asdict(self)
