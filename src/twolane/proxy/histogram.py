"""Durations counted in buckets of a tenth's width: constant memory, one logarithm a sample."""

from __future__ import annotations

from math import exp, log

_BUCKETS_PER_E = 10  # each bucket's upper edge is 10.5 % above the one before
_NUM_BUCKETS = 400  # up to e^40 microseconds: no duration is longer


class Histogram:
    """Percentiles are right to within 5 %. Negative durations count as 0."""

    __slots__ = ("_counts", "_longest_s")

    def __init__(self) -> None:
        self._counts = [0] * _NUM_BUCKETS
        self._longest_s = 0.0

    def add(self, duration_s: float) -> None:
        self._counts[int(log(duration_s * 1e6 + 1) * _BUCKETS_PER_E) if duration_s > 0 else 0] += 1
        if duration_s > self._longest_s:  # noqa: PLR1730 - once a token: cheaper than max()
            self._longest_s = duration_s

    def percentile_ms(self, fraction: float) -> float | None:
        """The middle of the bucket in which the sample of that rank lies; None without samples."""
        left = fraction * sum(self._counts)
        for bucket, count in enumerate(self._counts):
            left -= count
            if count and left <= 0:
                middle_us = exp((bucket + 0.5) / _BUCKETS_PER_E) - 1
                return round(min(middle_us / 1e3, self._longest_s * 1e3), 3)
        return None

    def copy(self) -> Histogram:
        """As it is now: `since` tells later what has come in between."""
        twin = Histogram()
        twin._counts = self._counts.copy()
        twin._longest_s = self._longest_s
        return twin

    def since(self, earlier: Histogram) -> Histogram:
        """Only the samples that came after the copy was made. Their longest isn't known: it is that of all."""
        later = Histogram()
        later._counts = [now - then for now, then in zip(self._counts, earlier._counts, strict=True)]
        later._longest_s = self._longest_s
        return later

    @property
    def count(self) -> int:
        return sum(self._counts)

    def as_dict(self) -> dict[str, float | int | None]:
        percentiles = {f"p{round(f * 100)}": self.percentile_ms(f) for f in (0.5, 0.9, 0.99)}
        return {"count": sum(self._counts), **percentiles, "max": round(self._longest_s * 1e3, 3)}
