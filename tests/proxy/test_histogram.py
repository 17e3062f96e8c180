"""Percentiles and exact counts out of buckets."""

from __future__ import annotations

import math
import random

import pytest

from twolane.proxy.histogram import BOUNDS_S, Histogram


@pytest.mark.parametrize("scale_s", [1e-5, 1e-2, 30.0])
def test_percentiles_are_right_within_a_bucket(scale_s: float) -> None:
    rng = random.Random(1)
    samples = sorted(rng.expovariate(1 / scale_s) for _ in range(10_000))
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    for fraction in (0.5, 0.9, 0.99):
        exact_ms = samples[int(fraction * len(samples))] * 1e3
        assert histogram.percentile_ms(fraction) == pytest.approx(exact_ms, rel=0.05, abs=0.001)


def test_nothing_and_nonsense() -> None:
    histogram = Histogram()
    assert histogram.as_dict() == {"count": 0, "p50": None, "p90": None, "p99": None, "max": 0.0}
    for duration_s in (-1.0, 0.0, 1e9):
        histogram.add(duration_s)
    assert histogram.as_dict()["count"] == 3


def test_one_sample_is_its_own_percentile() -> None:
    histogram = Histogram()
    histogram.add(0.1)
    assert histogram.percentile_ms(0.99) == pytest.approx(100, rel=0.06)


def test_counts_up_to_a_bound_are_exact_and_the_sum_is_kept() -> None:
    rng = random.Random(2)
    samples = [rng.expovariate(1 / 0.05) for _ in range(5_000)]
    samples += [*BOUNDS_S, *(math.nextafter(bound, math.inf) for bound in BOUNDS_S), 0.0, 5000.0]
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    assert histogram.up_to_bounds() == [sum(sample <= bound for sample in samples) for bound in BOUNDS_S]
    assert histogram.count == len(samples)
    assert histogram.sum_s == pytest.approx(sum(samples))
    histogram.add(-1.0)
    assert histogram.sum_s == pytest.approx(sum(samples))
    assert (BOUNDS_S[0], BOUNDS_S[-1]) == (0.001, 60.0)
