"""The last 15 minutes, a sample a second: constant memory, and a cost that doesn't grow with the load."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from twolane.proxy.histogram import Histogram
from twolane.proxy.stats import Stats

SAMPLE_EVERY_S = 1.0
KEPT_S = 900
WINDOW_S = 10  # what a sample tells of: a second alone holds too few requests for a p99

# Of an engine's life, by address and epoch: when it was asked (monotonic, s), and how many tokens it had generated.
Generated = Mapping[tuple[str, str], tuple[float, float]]


class Sample(NamedTuple):
    """None: nothing to tell of. In the order in which the page gets it."""

    at_s: float  # monotonic
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    requests_per_s: float  # ended, however
    pieces_per_s: float  # of streams, passed on to clients: about a token each
    tokens_per_s: float | None  # generated, by the engines' own count
    in_flight: int
    queued: int


@dataclass(frozen=True)
class _Mark:
    """The counters at one moment."""

    at_s: float
    num_ended: int
    ttft: Histogram
    gaps: Histogram
    generated: Generated


class History:
    """Owns the samples, the marks of the last `WINDOW_S`, and how many D has computed alone over the whole time."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._marks: deque[_Mark] = deque(maxlen=int(WINDOW_S / SAMPLE_EVERY_S) + 1)
        self._alone: deque[tuple[int, dict[str, int]]] = deque(maxlen=int(KEPT_S / SAMPLE_EVERY_S))
        self.samples: deque[Sample] = deque(maxlen=int(KEPT_S / SAMPLE_EVERY_S))

    def take(self, now: float, in_flight: int, queued: int, generated: Generated) -> Sample:
        stats = self._stats
        mark = _Mark(now, stats.num_ended, stats.ttft.copy(), stats.gaps.copy(), generated)
        self._marks.append(mark)
        self._alone.append((stats.num_ended, dict(stats.alone)))
        sample = _between(self._marks[0], mark, in_flight, queued, self._tokens_per_s())
        self.samples.append(sample)
        return sample

    def alone(self) -> tuple[int, Counter[str]]:
        """Of how many requests in the time kept D computed the prompt itself, by cause."""
        then = self._alone[0] if self._alone else (0, {})
        first = len(self._alone) < KEPT_S / SAMPLE_EVERY_S  # all that ever was
        num_before, before = (0, {}) if first else then
        return self._stats.num_ended - num_before, self._stats.alone - Counter(before)

    def _tokens_per_s(self) -> float | None:
        """Engines are asked at times of their own, and start anew from 0: each is looked at for itself."""
        rates: dict[tuple[str, str], float] = {}
        for engine, (last_at, last) in self._marks[-1].generated.items():
            told = [mark.generated[engine] for mark in self._marks if engine in mark.generated]
            first_at, first = told[0]
            if last_at > first_at:
                rates[engine] = max(0.0, last - first) / (last_at - first_at)
        return round(sum(rates.values()), 1) if rates else None


def _between(before: _Mark, now: _Mark, in_flight: int, queued: int, tokens_per_s: float | None) -> Sample:
    ttft, gaps = now.ttft.since(before.ttft), now.gaps.since(before.gaps)
    elapsed_s = max(now.at_s - before.at_s, SAMPLE_EVERY_S)
    return Sample(
        at_s=round(now.at_s, 2),
        ttft_p50_ms=ttft.percentile_ms(0.5),
        ttft_p99_ms=ttft.percentile_ms(0.99),
        itl_p50_ms=gaps.percentile_ms(0.5),
        itl_p99_ms=gaps.percentile_ms(0.99),
        requests_per_s=round((now.num_ended - before.num_ended) / elapsed_s, 2),
        pieces_per_s=round((gaps.count + ttft.count) / elapsed_s, 1),
        tokens_per_s=tokens_per_s,
        in_flight=in_flight,
        queued=queued,
    )
