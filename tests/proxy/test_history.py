"""The samples of the last 15 minutes, from counters and a clock that the test turns."""

from __future__ import annotations

import pytest

from twolane.proxy.history import KEPT_S, WINDOW_S, History
from twolane.proxy.stats import RequestRecord, Stats


def ended(stats: Stats, ttft_s: float, alone_because: str = "") -> None:
    record = RequestRecord("/v1/completions", "x", 0.0, stream=True, outcome="ok", alone_because=alone_because)
    record.first_byte_at, record.ended_at = ttft_s, ttft_s + 1
    stats.ended(record)


def test_a_sample_tells_of_the_window_before_it_and_of_nothing_older() -> None:
    stats = Stats(0.0)
    history = History(stats)
    assert history.take(0.0, 0, 0, {}).ttft_p50_ms is None
    for _ in range(20):
        ended(stats, 0.1)
    for _ in range(30):
        stats.gaps.add(0.02)
    busy = history.take(1.0, 3, 2, {})
    assert busy.ttft_p50_ms == pytest.approx(100, rel=0.06)
    assert busy.itl_p99_ms == pytest.approx(20, rel=0.06)
    assert (busy.in_flight, busy.queued, busy.requests_per_s, busy.pieces_per_s) == (3, 2, 20, 50)
    for second in range(2, WINDOW_S + 3):
        quiet = history.take(float(second), 0, 0, {})
    assert (quiet.ttft_p50_ms, quiet.itl_p50_ms, quiet.requests_per_s, quiet.pieces_per_s) == (None, None, 0, 0)


def test_memory_is_bounded() -> None:
    history = History(Stats(0.0))
    for second in range(2 * KEPT_S):
        history.take(float(second), 0, 0, {})
    assert len(history.samples) == KEPT_S
    assert history.samples[0].at_s == KEPT_S


def test_tokens_are_counted_by_engine_and_a_new_one_begins_anew() -> None:
    history = History(Stats(0.0))
    assert history.take(0.0, 0, 0, {("d", "1"): (0.0, 1000.0)}).tokens_per_s is None
    history.take(1.0, 0, 0, {("d", "1"): (0.0, 1000.0)})  # not asked again meanwhile
    assert history.take(5.0, 0, 0, {("d", "1"): (5.0, 1500.0)}).tokens_per_s == 100
    both = {("d", "1"): (5.0, 1500.0), ("d", "2"): (6.0, 10.0)}
    assert history.take(6.0, 0, 0, both).tokens_per_s == 100
    restarted = {("d", "2"): (8.0, 30.0)}
    assert history.take(8.0, 0, 0, restarted).tokens_per_s == 10


def test_prompts_that_d_computed_alone_are_counted_over_the_time_kept() -> None:
    stats = Stats(0.0)
    history = History(stats)
    ended(stats, 0.1, "short_prompt")
    history.take(0.0, 0, 0, {})
    assert history.alone() == (1, {"short_prompt": 1})
    for second in range(1, KEPT_S + 1):
        history.take(float(second), 0, 0, {})
    ended(stats, 0.1, "no_prefill")
    assert history.alone() == (1, {"no_prefill": 1})
