"""Pure: what counts as right, wrong, lost, leaked. No sockets, no clock, no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.soak.workload import Request

End = Literal["answered", "left", "error", "lost"]
Verdict = Literal["right", "wrong", "left", "left, wrong", "error", "lost"]

MIN_MARGIN = 1e-3  # nats between the two likeliest tokens; rounding in float32 moves them by some 1e-5
RSS_GROWTH_SHARE = 0.05
RSS_GROWTH_BYTES = 32 << 20
FD_GROWTH = 4
THREAD_GROWTH = 2


@dataclass(frozen=True)
class Reference:
    """What a single instance answers, up to the first token that rounding could change."""

    tokens: tuple[int, ...]


def certain_tokens(tokens: Sequence[int], margins: Sequence[float]) -> tuple[int, ...]:
    """The tokens before the first whose margin over the second likeliest is too small to tell wrong from rounded."""
    certain = next((index for index, margin in enumerate(margins) if margin < MIN_MARGIN), len(tokens))
    return tuple(tokens[:certain])


@dataclass
class Outcome:
    """One request as its client saw it. `message`: the error's, or how it was lost."""

    request: Request
    end: End = "lost"
    tokens: list[int] = field(default_factory=list)
    message: str = "never ended"
    longest_wait_s: float = 0.0  # without a byte of the answer
    total_s: float = 0.0
    event_s: list[float] = field(default_factory=list)  # of a stream, since it was asked


def judge(outcome: Outcome, reference: Reference) -> Verdict:
    """Every token that was given must be the reference's, also one that came before an error or a client's leaving."""
    given = tuple(outcome.tokens)
    wrong = given != reference.tokens[: len(given)]
    if outcome.end == "left":
        return "left, wrong" if wrong else "left"
    if wrong or (outcome.end == "answered" and len(given) != outcome.request.max_tokens):
        return "wrong"
    if outcome.end == "answered":
        return "right"
    if outcome.end == "error" and outcome.message.strip():
        return "error"
    return "lost"


def is_wrong(verdict: Verdict) -> bool:
    return verdict in {"wrong", "left, wrong"}


@dataclass(frozen=True)
class Footprint:
    """What one process held at a moment when nothing was being served."""

    service: str
    rss_bytes: int
    fds: int
    threads: int
    segments: int  # of shared memory that it maps, with a name or without


@dataclass(frozen=True)
class Growth:
    """What a process that lived through it all held more at the end than after warming up."""

    service: str
    rss_bytes: int
    rss_bound_bytes: int
    fds: int
    threads: int
    segments: int
    segments_bound: int

    @property
    def within_bounds(self) -> bool:
        return (
            self.rss_bytes <= self.rss_bound_bytes
            and self.fds <= FD_GROWTH
            and self.threads <= THREAD_GROWTH
            and self.segments <= self.segments_bound
        )


def growth(before: Mapping[int, Footprint], after: Mapping[int, Footprint], num_prefill: int) -> list[Growth]:
    """By pid. A process that was killed meanwhile has no growth. A D maps one arena of each P at most."""
    return [
        Growth(
            then.service,
            now.rss_bytes - then.rss_bytes,
            int(then.rss_bytes * RSS_GROWTH_SHARE) + RSS_GROWTH_BYTES,
            now.fds - then.fds,
            now.threads - then.threads,
            now.segments - then.segments,
            num_prefill,
        )
        for pid, then in before.items()
        if (now := after.get(pid)) is not None
    ]


class Totals:
    """Sums counters over restarts: a process that was killed takes its counters with it. State: the last reading."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self._last: dict[int, dict[str, float]] = {}

    def add(self, pid: int, counters: Mapping[str, float]) -> None:
        last = self._last.get(pid, {})
        for name, value in counters.items():
            self.sums[name] = self.sums.get(name, 0.0) + value - last.get(name, 0.0)
        self._last[pid] = dict(counters)
