"""Which rate is asked of which side next, and how long the rest will take. Pure.

Rounds go a b, b a, a b, ...: so neither side always comes first, and a side that is up stays for two turns. Where both
are up at once they change at every step, so that what else goes on in the machine meets both alike. In the first round
each side searches: rates double until the objective breaks, then the gap is halved. The later rounds repeat every rate
that either side met there. Whoever knows the steps that are done knows the next one, so a run can go on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

Side = Literal["aggregated", "lanes"]
SIDES: tuple[Side, Side] = ("aggregated", "lanes")
STEP_UP = 2.0
CLOSE_ENOUGH = 1.5  # lowest rate that broke over highest that held: nothing is tried between them then
LEAST_RATES, MOST_RATES = 2, 12  # of one search
SEARCH_STEPS = 8.0  # as much time as so many usual steps
LEAST_REQUESTS = 10  # of a step: fewer say nothing
GUESSED_RATES = 4  # of a search, until it is over
WANTED_STEPS = 5  # of a side and round, to share out a budget
STEP_S = (8.0, 60.0)  # shortest and longest share


class Step(msgspec.Struct, frozen=True):
    """`rate` requests a second, asked of one side in one round, counted from 0."""

    side: Side
    round: int
    rate: float


class Done(msgspec.Struct, frozen=True):
    step: Step
    holds: bool


class Schedule(msgspec.Struct, frozen=True):
    """`rates`: the ones to measure; empty: they are searched, from `first_rate` on. `able`: sides that can be had.

    `interleaved`: sides change at every step, which they can if both are up; otherwise at every turn.

    A search asks for `search_s` in all, so that a slow side leaves time for the other; but for two rates in any case.
    """

    rounds: int
    rates: tuple[float, ...] = ()
    first_rate: float = 1.0
    able: tuple[Side, ...] = SIDES
    step_s: float = 10.0
    num_prompts: int | None = None
    interleaved: bool = False

    @property
    def search_s(self) -> float:
        return SEARCH_STEPS * self.step_s

    def asks_s(self, rate: float) -> float:
        return num_requests(rate, self.step_s, self.num_prompts) / rate

    def turns(self) -> list[tuple[int, Side]]:
        orders = (SIDES, SIDES[::-1])
        return [(number, side) for number in range(self.rounds) for side in orders[number % 2] if side in self.able]


def next_step(schedule: Schedule, done: Sequence[Done]) -> Step | None:
    """None: everything is measured."""
    turns = schedule.turns()
    if schedule.interleaved:  # of a round, the side that has fewer steps; else the one whose turn is first
        counts = Counter((entry.step.round, entry.step.side) for entry in done)
        turns.sort(key=lambda turn: (turn[0], counts[turn]))
    for number, side in turns:
        rate = _next_of_turn(schedule, done, number, side)
        if rate is not None:
            return Step(side, number, rate)
    return None


def _next_of_turn(schedule: Schedule, done: Sequence[Done], number: int, side: Side) -> float | None:
    mine = {entry.step.rate: entry.holds for entry in done if (entry.step.side, entry.step.round) == (side, number)}
    if number == 0 and not schedule.rates:
        return _affordable(schedule, mine)
    return next((rate for rate in _repeated(schedule, done) if rate not in mine), None)


def _affordable(schedule: Schedule, held: Mapping[float, bool]) -> float | None:
    """The search's next rate, if there is time for it."""
    rate = next_rate(held, schedule.first_rate)
    if rate is None or len(held) < LEAST_RATES:
        return rate
    return rate if sum(map(schedule.asks_s, (*held, rate))) <= schedule.search_s else None


def _repeated(schedule: Schedule, done: Sequence[Done]) -> list[float]:
    """The rates of a round that repeats."""
    return sorted(schedule.rates or {entry.step.rate for entry in done if entry.step.round == 0})


def next_rate(held: Mapping[float, bool], first: float) -> float | None:
    """The search. `held`: rate -> whether the objective held. None: found, or not worth more."""
    if not held:
        return round_rate(first)
    broken = [rate for rate, holds in held.items() if not holds]
    if len(held) >= MOST_RATES:
        return None
    if not broken:
        return round_rate(max(held) * STEP_UP)
    lowest_broken = min(broken)
    holding = [rate for rate, holds in held.items() if holds and rate < lowest_broken]
    if not holding:  # broken from the start: one lower rate is tried, since the lower, the longer it takes
        return round_rate(lowest_broken / STEP_UP) if len(held) == 1 else None
    between = round_rate(math.sqrt(max(holding) * lowest_broken))
    return between if lowest_broken / max(holding) > CLOSE_ENOUGH and between not in held else None


def round_rate(rate: float) -> float:
    """Two significant digits, as one would type it."""
    return float(f"{rate:.2g}")


def num_requests(rate: float, step_s: float, given: int | None) -> int:
    return given or max(LEAST_REQUESTS, math.ceil(rate * step_s))


def step_seconds(budget_s: float, rounds: int, starts_s: float) -> float:
    """How long a step asks, so that a usual comparison fits into the budget."""
    shortest, longest = STEP_S
    return round(min(longest, max(shortest, (0.8 * budget_s - starts_s) / (2 * rounds * WANTED_STEPS))), 1)


def remaining(schedule: Schedule, done: Sequence[Done]) -> list[Step]:
    """What is still to do, as far as that can be known: the rates of a search that isn't over are a guess."""
    measured = {entry.step for entry in done}
    steps = []
    for number, side in schedule.turns():
        searches = number == 0 and not schedule.rates
        rates = _guessed(schedule, done, side) if searches else _repeated(schedule, done)
        rates = rates or _grid(schedule.first_rate, GUESSED_RATES)
        steps += [step for rate in rates if (step := Step(side, number, rate)) not in measured]
    return steps


def _guessed(schedule: Schedule, done: Sequence[Done], side: Side) -> list[float]:
    mine = {entry.step.rate: entry.holds for entry in done if entry.step.side == side and entry.step.round == 0}
    following = _affordable(schedule, mine)
    if following is None:
        return list(mine)
    return [*mine, *_grid(following, max(1, GUESSED_RATES - len(mine)))]


def _grid(first: float, count: int) -> list[float]:
    return [round_rate(first * STEP_UP**index) for index in range(count)]


class Pace(msgspec.Struct, frozen=True):
    """How long things take. `tail_s`: from a step's last request to its last answer."""

    step_s: float
    num_prompts: int | None
    tail_s: float
    start_s: float

    def of_step(self, rate: float) -> float:
        return num_requests(rate, self.step_s, self.num_prompts) / rate + self.tail_s


def left_s(steps: Iterable[Step], pace: Pace, up: Iterable[Side], together: bool) -> float:
    """Measuring and starting. Sides that don't fit together are started anew whenever the turn changes."""
    total_s, running = 0.0, set(up)
    for step in steps:
        if step.side not in running:
            total_s += pace.start_s
            running = running | {step.side} if together else {step.side}
        total_s += pace.of_step(step.rate)
    return total_s
