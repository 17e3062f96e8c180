"""Durations counted in fine buckets, some of whose edges are those that Prometheus is told: constant memory, one binary
search a sample."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import ceil, log

# What /metrics shows: 1 ms to 60 s.
BOUNDS_S = tuple(float(f"{step}e{exponent}") for exponent in (-3, -2, -1, 0) for step in (1, 1.5, 2, 3, 5, 7.5))
BOUNDS_S += (10.0, 15.0, 20.0, 30.0, 60.0)
_WIDEST = 1.1  # a bucket's upper edge over its lower one: so its middle is within 5 % of all that is in it


def _fill_in(anchors: tuple[float, ...]) -> Iterator[float]:
    """The anchors, exactly as they are, and between two of them as few more as will do."""
    for low, high in pairwise(anchors):
        num_steps = ceil(log(high / low) / log(_WIDEST))
        yield from (low * (high / low) ** (step / num_steps) for step in range(num_steps))
    yield anchors[-1]


# A bucket holds what is longer than the edge below and no longer than its own, as Prometheus counts. One more has the
# rest.
_EDGES_S = list(_fill_in((1e-6, *BOUNDS_S, 1000.0)))
_AT_BOUNDS = [_EDGES_S.index(bound) for bound in BOUNDS_S]


class Histogram:
    """Percentiles are right to within 5 % from 1 us to 1000 s; counts up to a bound are exact. Negative durations count
    as 0."""

    __slots__ = ("_counts", "_longest_s", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(_EDGES_S) + 1)
        self._longest_s = 0.0
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        self._counts[bisect_left(_EDGES_S, duration_s)] += 1
        if duration_s > 0:
            self.sum_s += duration_s
            if duration_s > self._longest_s:  # noqa: PLR1730 - once a token: cheaper than max()
                self._longest_s = duration_s

    @property
    def count(self) -> int:
        return sum(self._counts)

    def up_to_bounds(self) -> list[int]:
        """How many were no longer than each of BOUNDS_S."""
        running = list(accumulate(self._counts))
        return [running[at] for at in _AT_BOUNDS]

    def percentile_ms(self, fraction: float) -> float | None:
        """The middle of the bucket in which the sample of that rank lies; None without samples."""
        left = fraction * self.count
        for bucket, count in enumerate(self._counts):
            left -= count
            if count and left <= 0:
                return round(min(_middle_s(bucket), self._longest_s) * 1e3, 3)
        return None

    def as_dict(self) -> dict[str, float | int | None]:
        percentiles = {f"p{round(f * 100)}": self.percentile_ms(f) for f in (0.5, 0.9, 0.99)}
        return {"count": self.count, **percentiles, "max": round(self._longest_s * 1e3, 3)}


def _middle_s(bucket: int) -> float:
    low = _EDGES_S[bucket - 1] if bucket else 0.0
    return (low + _EDGES_S[bucket]) / 2 if bucket < len(_EDGES_S) else _EDGES_S[-1]
