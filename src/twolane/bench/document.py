"""Journal -> report.json's content. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from twolane.bench import options, sweep
from twolane.bench.goodput import TIMES, Figures, over_rounds
from twolane.bench.journal import Measured
from twolane.bench.options import Asked
from twolane.bench.power import over_time, per_token
from twolane.bench.sweep import SIDES, Side
from twolane.bench.verdict import NAMES, NOTHING, Points, Verdict, reference_rate, verdict

SPREAD = ("goodput_per_s", *TIMES)


def document(measured: Measured) -> dict[str, Any]:
    """All figures, medians and spread over rounds, what was left out, and the sentences."""
    asked = msgspec.convert(measured.header.asked, Asked)
    points = points_of(measured)
    said = verdict(points, measured.objective, asked.words()) if measured.objective else Verdict(NOTHING)
    return {
        **msgspec.to_builtins(said),
        "objective": msgspec.to_builtins(measured.objective),
        "asked": measured.header.asked,
        **measured.header.about,
        "model": measured.header.key["model"],
        "idle": {side: msgspec.to_builtins(idle) for side, idle in measured.idle.items()},
        "points": {side: [_point(rate, points[side][rate]) for rate in sorted(points[side])] for side in SIDES},
        "power": _power(measured, points, asked),
        "counted": {side: _counted(measured, side) for side in SIDES},
        "starts_s": [[line.side, line.took_s] for line in measured.starts],
        "commands": {line.side: line.commands for line in measured.starts},
        "notes": list(dict.fromkeys(measured.notes)),
        "left_out": left_out(measured, asked),
        "cut_requests": measured.cut,
    }


def points_of(measured: Measured) -> dict[Side, dict[float, dict[int, Figures]]]:
    points: dict[Side, dict[float, dict[int, Figures]]] = {side: {} for side in SIDES}
    for step, figures in measured.figures.items():
        points[step.side].setdefault(step.rate, {})[step.round] = figures
    return points


def _point(rate: float, rounds: dict[int, Figures]) -> dict[str, Any]:
    figures = list(rounds.values())
    spreads = {name: over_rounds([getattr(entry, name) for entry in figures]) for name in SPREAD}
    errors = [entry.first_error for entry in figures if entry.first_error]
    return {
        "rate": rate,
        "requests": sum(entry.requests for entry in figures),
        "good": sum(entry.good for entry in figures),
        "failed": sum(entry.failed for entry in figures),
        "timed_out": sum(entry.timed_out for entry in figures),
        "first_error": errors[0] if errors else "",
        "spread": {name: msgspec.to_builtins(spread) for name, spread in spreads.items()},
        "rounds": {str(number): msgspec.to_builtins(entry) for number, entry in sorted(rounds.items())},
    }


def _power(measured: Measured, points: Points, asked: Asked) -> dict[str, Any] | None:
    """Joules a token by side and rate, a round each; and both sides' power over time in the first round, at the rate at
    which latencies are compared. None where no GPU told."""
    found = {step: end.power for step, end in measured.ends.items() if end.power}
    if not found:
        return None
    energy: dict[Side, dict[float, list[dict[str, float]]]] = {side: {} for side in SIDES}
    for step, drawn in found.items():
        figures = measured.figures[step]
        joules = per_token(drawn, asked.input_len * (figures.requests - figures.failed), figures.tokens)
        energy[step.side].setdefault(step.rate, []).append(joules)
    rate = reference_rate(points)
    shown = {side: next((d for s, d in found.items() if (s.side, s.rate) == (side, rate)), None) for side in SIDES}
    return {
        "energy": {side: [_joules(at, rounds) for at, rounds in sorted(energy[side].items())] for side in SIDES},
        "rate": rate,
        "update_s": next((drawn.update_s for drawn in found.values()), None),
        "over_time": {side: over_time(drawn) for side, drawn in shown.items() if drawn},
    }


def _joules(rate: float, rounds: list[dict[str, float]]) -> dict[str, Any]:
    names = dict.fromkeys(name for entry in rounds for name in entry)
    spreads = {name: over_rounds([entry.get(name) for entry in rounds]) for name in names}
    return {"rate": rate, "spread": {name: msgspec.to_builtins(spread) for name, spread in spreads.items()}}


def _counted(measured: Measured, side: Side) -> dict[str, int]:
    """By the proxy and the engines, in all steps of a side."""
    total: Counter[str] = Counter()
    for step, end in measured.ends.items():
        if step.side == side:
            total.update(end.proxy)
    return dict(total)


def left_out(measured: Measured, asked: Asked) -> list[str]:
    """A sentence a side and round that isn't whole."""
    baseline = next((measured.idle[side] for side in SIDES if side in measured.idle), None)
    schedule = options.schedule_of(asked, baseline, SIDES)
    searched = not schedule.rates
    missing: dict[tuple[Side, int], list[float]] = {}
    for step in sweep.remaining(schedule, measured.done()):
        missing.setdefault((step.side, step.round), []).append(step.rate)
    told = []
    for (side, number), rates in missing.items():
        guess = searched and (number == 0 or not any(step.round == 0 for step in measured.figures))
        what = "the search isn't over" if guess else f"at {', '.join(f'{rate:g}' for rate in rates)} requests/s"
        told.append(f"{NAMES[side]}, round {number + 1}: {what}")
    return told
