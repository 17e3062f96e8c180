"""The sentences of a comparison: each case that there is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from twolane.bench.client import Sample
from twolane.bench.goodput import Figures, Objective, figures_of, is_good, over_rounds, tpot_s
from twolane.bench.sweep import Side
from twolane.bench.verdict import Points, Verdict, best_rate, is_apart, reference_rate, verdict

OBJECTIVE = Objective(500.0, 50.0, "given")


def sample(ttft_ms: float, gaps_ms: Sequence[float] = (10.0, 10.0), error: str = "") -> Sample:
    times, now = [], 1.0 + ttft_ms / 1000
    for gap_ms in (0.0, *gaps_ms):
        now += gap_ms / 1000
        times.append(now)
    return Sample(1.0, [] if error else times, 0 if error else len(times), error)


@pytest.mark.parametrize(
    ("one", "good"),
    [
        (sample(499.0), True),
        (sample(501.0), False),
        (sample(100.0, [10.0] * 98 + [60.0]), False),
        (sample(100.0, [10.0] * 199 + [60.0]), True),
        (sample(100.0, []), True),
        (sample(100.0, error="TimeoutError: "), False),
    ],
)
def test_a_request_is_good_if_it_keeps_to_both(one: Sample, good: bool) -> None:
    assert is_good(one, OBJECTIVE) is good


def test_failures_are_counted_and_cost_goodput() -> None:
    samples = [sample(100.0), sample(200.0), sample(900.0), sample(0.0, error="TimeoutError: "), sample(0.0, error="5")]
    figures = figures_of(samples, 10.0, OBJECTIVE)
    assert (figures.requests, figures.failed, figures.timed_out, figures.good) == (5, 2, 1, 2)
    assert (figures.goodput_per_s, figures.holds, figures.first_error) == (4.0, False, "TimeoutError: ")
    assert (figures.ttft_p50_ms, figures.ttft_p99_ms, figures.itl_p99_ms) == (200.0, 900.0, 10.0)
    assert figures_of(samples[:2], 10.0, OBJECTIVE).holds
    assert not figures_of(samples[:4], 10.0, OBJECTIVE).holds
    assert figures_of(samples[3:], 10.0, OBJECTIVE).ttft_p50_ms is None


def test_tpot_is_the_time_behind_the_first_token_by_token() -> None:
    assert tpot_s(sample(100.0, [10.0, 30.0])) == pytest.approx(0.02)
    assert tpot_s(sample(100.0, [])) is None


def test_spread_is_median_and_range_of_the_rounds_that_have_a_value() -> None:
    spread = over_rounds([3.0, None, 1.0, 2.0])
    assert spread is not None
    assert msgspec.structs.astuple(spread) == (2.0, 1.0, 3.0, 3)
    assert over_rounds([None]) is None


def figures(ttft: float, itl: float, goodput: float, *, failed: int = 0, timed_out: int = 0) -> Figures:
    holds = not failed and ttft <= OBJECTIVE.ttft_ms and itl <= OBJECTIVE.itl_ms
    times = {"ttft_p50_ms": ttft, "ttft_p99_ms": ttft, "itl_p50_ms": itl, "itl_p99_ms": itl}
    return Figures(20, failed, timed_out, "503: no" if failed else "", 20, goodput, holds, 640, **times)


def points(aggregated: Sequence[Figures], lanes: Sequence[Figures], rate: float = 2.0) -> Points:
    sides: dict[Side, Sequence[Figures]] = {"aggregated": aggregated, "lanes": lanes}
    return {side: {rate: dict(enumerate(rounds))} for side, rounds in sides.items()}


def results(found: Verdict) -> dict[str, str]:
    return {outcome.objective: outcome.result for outcome in found.outcomes}


SLOW_FIRST = [figures(300 + i, 20 + i / 10, 1.9 + i / 100) for i in range(3)]
FAST_FIRST = [figures(200 + i, 90 + i / 10, 0.5 + i / 100) for i in range(3)]


def test_each_objective_has_its_winner() -> None:
    found = verdict(points(FAST_FIRST, SLOW_FIRST), OBJECTIVE, "a load")
    assert results(found) == {"goodput": "lanes", "TTFT p99": "aggregated", "ITL p99": "lanes"}
    assert found.headline == (
        "On this machine, with a load: aggregated instances win TTFT p99, the two lanes win goodput and ITL p99."
    )
    goodput, ttft, itl = (outcome.sentence for outcome in found.outcomes)
    assert "the two lanes win, 1.91 against 0.51 requests/s (a factor of 3.7)" in goodput
    assert (
        "TTFT p99 at 2 requests/s (objective 500 ms): aggregated instances win, 201 against 301 ms (33 % less)" in ttft
    )
    assert "more than the rounds differ (3 each: between equal sides that happens in 1 of 25 comparisons)" in itl


def test_the_lanes_may_lose_everything() -> None:
    found = verdict(points(SLOW_FIRST, [figures(400 + i, 40 + i / 10, 1.2) for i in range(3)]), OBJECTIVE, "a load")
    assert set(results(found).values()) == {"aggregated"}
    assert found.headline.endswith("aggregated instances win goodput, TTFT p99 and ITL p99.")


def test_what_overlaps_or_differs_by_less_than_the_spread_is_no_difference() -> None:
    near = [figures(300.5 + i, 20 + i / 10, 1.9 + i / 100) for i in range(3)]
    found = verdict(points(SLOW_FIRST, near), OBJECTIVE, "a load")
    assert set(results(found).values()) == {"tie"}
    assert "no difference that this measurement can tell" in found.outcomes[1].sentence
    assert not is_apart([1.0, 3.0], [3.5, 4.0])  # apart, but by less than the first range
    assert not is_apart([1.0, 3.0], [2.0, 9.0])
    assert is_apart([1.0, 1.5], [3.0, 4.0])
    assert not is_apart([1.0], [1.0])


def test_one_round_may_be_chance() -> None:
    found = verdict(points(FAST_FIRST[:1], SLOW_FIRST[:1]), OBJECTIVE, "a load")
    assert set(results(found).values()) == {"unknown"}
    assert "in one round: that may be chance" in found.outcomes[0].sentence


def test_an_objective_that_nobody_met_is_told() -> None:
    bad = [figures(900 + i, 200 + i / 10, 0.0) for i in range(3)]
    worse = [figures(1900 + i, 200 + i / 10, 0.0) for i in range(3)]
    found = verdict(points(bad, worse), OBJECTIVE, "a load")
    assert results(found) == {"goodput": "unknown", "TTFT p99": "aggregated", "ITL p99": "tie"}
    assert "no request met the objective on either side" in found.outcomes[0].sentence


def test_one_side_alone_is_no_comparison() -> None:
    one: Points = {"aggregated": {}, "lanes": {2.0: dict(enumerate(SLOW_FIRST))}}
    assert verdict(one, OBJECTIVE, "a load").headline.startswith("Only the two lanes were measured")
    assert verdict({"aggregated": {}, "lanes": {}}, OBJECTIVE, "a load").outcomes == ()


def test_who_fails_wins_no_latency_and_the_failures_are_told() -> None:
    failing = [figures(10 + i, 1 + i / 10, 0.9, failed=4, timed_out=3) for i in range(3)]
    found = verdict(points(failing, SLOW_FIRST), OBJECTIVE, "a load")
    assert results(found) == {"goodput": "lanes", "TTFT p99": "lanes", "ITL p99": "lanes"}
    assert "301 against none (requests failed) ms" in found.outcomes[1].sentence
    assert "Requests failed: 12 of 60 of aggregated instances (9 in time-outs)" in found.failures


def test_latencies_are_compared_where_one_side_still_keeps_to_the_objective() -> None:
    ok, broken = figures(300, 20, 1.0), figures(900, 20, 1.0)
    rounds = {0: broken, 1: broken}
    sides: Points = {
        "aggregated": {1.0: {0: ok, 1: ok}, 2.0: rounds, 4.0: rounds, 8.0: {0: broken}},
        "lanes": {1.0: {0: ok, 1: ok}, 2.0: {0: ok, 1: ok}, 4.0: rounds, 8.0: {0: ok}},
    }
    assert reference_rate(sides) == 2.0
    assert reference_rate({"aggregated": {4.0: rounds, 8.0: rounds}, "lanes": {4.0: rounds, 8.0: rounds}}) == 4.0
    assert reference_rate({"aggregated": {4.0: rounds}, "lanes": {8.0: rounds}}) is None


def test_goodput_is_taken_where_it_is_best() -> None:
    low, high = figures(300, 20, 1.0), figures(900, 20, 0.4)
    assert best_rate({1.0: {0: low, 1: low}, 2.0: {0: high, 1: high}}) == 1.0
    assert best_rate({1.0: {0: low, 1: low}, 2.0: {0: figures(1, 1, 9.0)}}) == 1.0  # one round is not enough
    assert best_rate({2.0: {0: high}}) == 2.0
