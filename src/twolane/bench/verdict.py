"""Which side wins for which objective, by how much, and whether that is more than the rounds differ. Pure.

A difference counts if no round of one side reaches into the range of the other's, and if it is larger than either
range. How often that happens between equal sides was simulated (40,000 pairs, normal and exponential values): CHANCE.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from twolane.bench.goodput import Figures, Objective
from twolane.bench.sweep import SIDES, Side

Rounds = Mapping[int, Figures]
Points = Mapping[Side, Mapping[float, Rounds]]  # side -> rate -> round
Result = Literal["aggregated", "lanes", "tie", "unknown"]
NAMES: dict[Side, str] = {"aggregated": "aggregated instances", "lanes": "the two lanes"}
NOTHING = "Nothing was measured, so nothing can be said."
LEAST_ROUNDS = 2
CHANCE = {2: "1 of 5", 3: "1 of 25", 4: "1 of 100"}  # more rounds: rarer
FAILED_SHARE = 0.01  # more than this failed: a p99 of the others says nothing


class Outcome(msgspec.Struct, frozen=True):
    """One objective's. `why`: what the sentence ends with."""

    objective: str
    result: Result
    sentence: str


class Verdict(msgspec.Struct, frozen=True):
    """`headline` alone is an answer; `outcomes` say more. `failures`: what didn't go through, if anything."""

    headline: str
    outcomes: tuple[Outcome, ...] = ()
    failures: str = ""


def verdict(points: Points, objective: Objective, load: str) -> Verdict:
    """`load`: what was asked, in words."""
    measured = [side for side in SIDES if any(points.get(side, {}).values())]
    if not measured:
        return Verdict(NOTHING)
    if len(measured) == 1:
        only = f"Only {NAMES[measured[0]]} were measured: there is nothing to compare them with."
        return Verdict(only, failures=_failures(points))
    outcomes = [_goodput(points, objective)]
    rate = reference_rate(points)
    if rate is not None:
        outcomes += [
            _latency(points, rate, "TTFT p99", "ttft_p99_ms", objective.ttft_ms),
            _latency(points, rate, "ITL p99", "itl_p99_ms", objective.itl_ms),
        ]
    return Verdict(_headline(outcomes, load), tuple(outcomes), _failures(points))


def reference_rate(points: Points) -> float | None:
    """Where latencies are compared: of the rates that both sides have in as many rounds as any, the highest at which
    one of them kept to the objective; the lowest if neither ever did."""
    first, second = (points[side] for side in SIDES)
    rounds = {rate: min(len(first[rate]), len(second[rate])) for rate in first if rate in second}
    most = min(LEAST_ROUNDS, max(rounds.values(), default=0))
    common = [rate for rate, count in rounds.items() if count >= max(1, most)]
    kept = [rate for rate in common if any(mostly_holds(points[side][rate]) for side in SIDES)]
    return max(kept) if kept else min(common, default=None)


def mostly_holds(rounds: Rounds) -> bool:
    return sum(figures.holds for figures in rounds.values()) * 2 > len(rounds)


def best_rate(rates: Mapping[float, Rounds]) -> float:
    """The one with the highest median goodput, among those that have rounds enough if any has."""
    enough = [rate for rate in rates if len(rates[rate]) >= LEAST_ROUNDS] or list(rates)
    return max(sorted(enough), key=lambda rate: statistics.median(_goodputs(rates[rate])))


def _goodputs(rounds: Rounds) -> list[float]:
    return [figures.goodput_per_s for figures in rounds.values()]


def _goodput(points: Points, objective: Objective) -> Outcome:
    best = {side: best_rate(points[side]) for side in SIDES}
    values = {side: _goodputs(points[side][best[side]]) for side in SIDES}
    within = f"both within {number(objective.ttft_ms)} ms TTFT and {number(objective.itl_ms)} ms ITL"
    if not any(max(mine) for mine in values.values()):
        why = "no request met the objective on either side, at any rate"
        return Outcome("goodput", "unknown", f"goodput ({within}): {why}.")
    asked = ", ".join(f"{NAMES[side]} at {number(best[side])} requests/s" for side in SIDES)
    return _compared("goodput", f"goodput ({within}; at its best rate each: {asked})", values, "requests/s", True)


def _latency(points: Points, rate: float, name: str, key: str, limit_ms: float) -> Outcome:
    values = {side: [_value(figures, key) for figures in points[side][rate].values()] for side in SIDES}
    what = f"{name} at {number(rate)} requests/s (objective {number(limit_ms)} ms)"
    if not any(math.isfinite(value) for mine in values.values() for value in mine):
        return Outcome(name, "unknown", f"{what}: neither side has a figure.")
    return _compared(name, what, values, "ms", False)


def _value(figures: Figures, key: str) -> float:
    if figures.failed > FAILED_SHARE * figures.requests:
        return math.inf
    value = getattr(figures, key)
    return math.inf if value is None else float(value)


def _compared(name: str, what: str, values: Mapping[Side, Sequence[float]], unit: str, higher_wins: bool) -> Outcome:
    middles = {side: statistics.median(values[side]) for side in SIDES}
    better = (max if higher_wins else min)(SIDES, key=lambda side: middles[side])
    worse = SIDES[1 - SIDES.index(better)]
    told = f"{number(middles[better])} against {number(middles[worse])} {unit}{_by_how_much(middles, better, worse)}"
    rounds = min(len(values[side]) for side in SIDES)
    if middles[better] == middles[worse]:
        return Outcome(name, "tie", f"{what}: no difference, {number(middles[better])} {unit} on both sides.")
    if rounds < LEAST_ROUNDS:
        return Outcome(name, "unknown", f"{what}: {told} for {NAMES[better]}, in one round: that may be chance.")
    if not is_apart(values[better], values[worse]):
        ranges = " and ".join(f"{NAMES[side]} {_range(values[side])}" for side in SIDES)
        why = f"the rounds differ as much: {ranges} {unit}"
        return Outcome(name, "tie", f"{what}: no difference that this measurement can tell ({why}).")
    chance = CHANCE.get(rounds, f"fewer than {CHANCE[max(CHANCE)]}")
    sure = f"more than the rounds differ ({rounds} each: between equal sides that happens in {chance} comparisons)"
    return Outcome(name, better, f"{what}: {NAMES[better]} win, {told}; {sure}.")


def is_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the difference is more than the spread."""
    if min(a) <= max(b) and min(b) <= max(a):
        return False
    if not all(map(math.isfinite, (*a, *b))):
        return True  # one side failed in every round, the other in none
    widest = max(max(a) - min(a), max(b) - min(b))
    return abs(statistics.median(a) - statistics.median(b)) > widest


def _range(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


def _by_how_much(middles: Mapping[Side, float], better: Side, worse: Side) -> str:
    high, low = max(middles.values()), min(middles.values())
    if not math.isfinite(high) or low <= 0:
        return ""
    if high / low >= 2:
        return f" (a factor of {high / low:.1f})"
    share = 100 * abs(middles[better] - middles[worse]) / middles[worse]
    return f" ({share:.0f} % {'more' if middles[better] > middles[worse] else 'less'})"


def _headline(outcomes: Sequence[Outcome], load: str) -> str:
    won = {side: [outcome.objective for outcome in outcomes if outcome.result == side] for side in SIDES}
    open_ = [outcome.objective for outcome in outcomes if outcome.result in ("tie", "unknown")]
    parts = [f"{NAMES[side]} win {listed(won[side])}" for side in SIDES if won[side]]
    if open_:
        parts.append(f"for {listed(open_)} no difference can be told")
    return f"On this machine, with {load}: {', '.join(parts)}."


def _failures(points: Points) -> str:
    told = []
    for side in SIDES:
        all_figures = [figures for rounds in points.get(side, {}).values() for figures in rounds.values()]
        failed, timed_out = (sum(getattr(f, key) for f in all_figures) for key in ("failed", "timed_out"))
        if failed:
            total = sum(figures.requests for figures in all_figures)
            told.append(f"{failed} of {total} of {NAMES[side]} ({timed_out} in time-outs)")
    return f"Requests failed: {' and '.join(told)}; they count as missed objectives." if told else ""


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    if not math.isfinite(value):
        return "none (requests failed)"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def in_words(objective: Objective) -> str:
    limits = f"TTFT within {number(objective.ttft_ms)} ms, p99 of a request's ITL within {number(objective.itl_ms)} ms"
    return f"{limits} ({objective.origin})"


def p99s(figures: Figures) -> dict[str, float]:
    """Those that there are."""
    found = {"TTFT": figures.ttft_p99_ms, "ITL": figures.itl_p99_ms}
    return {name: value for name, value in found.items() if value is not None}
