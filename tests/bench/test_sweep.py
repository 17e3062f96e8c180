"""Which rate comes next, and how long the rest takes."""

from __future__ import annotations

import pytest

from twolane.bench.sweep import (
    Done,
    Pace,
    Schedule,
    Side,
    Step,
    left_s,
    next_rate,
    next_step,
    num_requests,
    remaining,
    step_seconds,
)


def searched(limit: float, first: float) -> list[float]:
    """The rates of a search on a side that holds below `limit`."""
    held: dict[float, bool] = {}
    while (rate := next_rate(held, first)) is not None:
        assert rate not in held
        held[rate] = rate < limit
    return list(held)


@pytest.mark.parametrize(
    ("limit", "rates"),
    [
        (6.5, [1.0, 2.0, 4.0, 8.0, 5.7]),
        (5.0, [1.0, 2.0, 4.0, 8.0, 5.7]),
        (0.6, [1.0, 0.5, 0.71]),
        (0.3, [1.0, 0.5]),
        (1e9, [2.0**power for power in range(7)] + [130.0, 260.0, 520.0, 1000.0, 2000.0]),
    ],
)
def test_a_search_doubles_until_the_objective_breaks_and_looks_once_between(limit: float, rates: list[float]) -> None:
    assert searched(limit, 1.0) == rates


def test_a_rate_that_held_above_one_that_broke_is_not_believed() -> None:
    assert next_rate({1.0: True, 2.0: False, 4.0: True}, 1.0) == 1.4


def walk(schedule: Schedule, limits: dict[Side, float]) -> list[Done]:
    done: list[Done] = []
    while step := next_step(schedule, done):
        done.append(Done(step, step.rate < limits[step.side]))
    return done


def test_rounds_alternate_and_repeat_what_both_searches_met() -> None:
    steps = [entry.step for entry in walk(Schedule(rounds=3), {"aggregated": 1.5, "lanes": 3.0})]
    turns = list(dict.fromkeys((step.round, step.side) for step in steps))
    assert turns == [
        *((0, "aggregated"), (0, "lanes"), (1, "lanes"), (1, "aggregated")),
        *((2, "aggregated"), (2, "lanes")),
    ]
    rates = {turn: [step.rate for step in steps if (step.round, step.side) == turn] for turn in turns}
    assert rates[0, "aggregated"] == [1.0, 2.0, 1.4]
    assert rates[0, "lanes"] == [1.0, 2.0, 4.0, 2.8]
    assert all(rates[turn] == [1.0, 1.4, 2.0, 2.8, 4.0] for turn in turns if turn[0] > 0)


def test_sides_that_are_both_up_change_at_every_step() -> None:
    schedule = Schedule(rounds=2, interleaved=True)
    steps = [entry.step for entry in walk(schedule, {"aggregated": 1.5, "lanes": 3.0})]
    assert [(step.side, step.rate) for step in steps if step.round == 0] == [
        *(("aggregated", 1.0), ("lanes", 1.0), ("aggregated", 2.0), ("lanes", 2.0), ("aggregated", 1.4)),
        *(("lanes", 4.0), ("lanes", 2.8)),
    ]
    assert [step.side for step in steps if step.round == 1] == ["lanes", "aggregated"] * 5
    apart = walk(Schedule(rounds=2), {"aggregated": 1.5, "lanes": 3.0})
    assert set(steps) == {entry.step for entry in apart}


def test_a_slow_search_leaves_time_for_the_other_side() -> None:
    steps = [entry.step for entry in walk(Schedule(rounds=1, first_rate=0.2), {"aggregated": 0.15, "lanes": 0.5})]
    assert [step.rate for step in steps if step.side == "aggregated"] == [0.2, 0.1]  # 50 s and 100 s of 80
    assert [step.rate for step in steps if step.side == "lanes"] == [0.2, 0.4]


def test_given_rates_are_asked_as_they_are_and_a_side_that_fails_is_left_out() -> None:
    given = Schedule(rounds=2, rates=(1.0, 3.0), able=("lanes",))
    steps = [entry.step for entry in walk(given, {"lanes": 0.0})]
    assert steps == [Step("lanes", number, rate) for number in (0, 1) for rate in (1.0, 3.0)]


def test_the_rest_is_known_once_the_searches_are_over() -> None:
    schedule = Schedule(rounds=2)
    done = walk(schedule, {"aggregated": 1.5, "lanes": 3.0})
    assert remaining(schedule, done) == []
    assert remaining(schedule, done[:8]) == [entry.step for entry in done[8:]]
    assert len(remaining(schedule, [])) == 16


def test_the_estimate_counts_a_start_at_each_change_of_sides_that_do_not_fit_together() -> None:
    steps = [Step("aggregated", 0, 2.0), Step("lanes", 0, 2.0), Step("lanes", 1, 2.0), Step("aggregated", 1, 2.0)]
    pace = Pace(step_s=10.0, num_prompts=None, tail_s=1.0, start_s=100.0)
    assert left_s(steps, pace, ["aggregated"], together=False) == 4 * 11.0 + 200.0
    assert left_s(steps, pace, [], together=True) == 4 * 11.0 + 200.0
    assert left_s(steps, pace, ["lanes", "aggregated"], together=True) == 4 * 11.0


def test_a_step_has_requests_enough_and_fits_the_budget() -> None:
    assert [num_requests(rate, 10.0, None) for rate in (0.1, 2.0, 2.01)] == [10, 20, 21]
    assert num_requests(2.0, 10.0, 7) == 7
    assert step_seconds(1800.0, 3, 400.0) == pytest.approx(34.7)
    assert (step_seconds(60.0, 3, 400.0), step_seconds(1e6, 3, 400.0)) == (8.0, 60.0)
