"""What a report tells of power: over time by lane, and joules a token. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twolane.bench.charts import Chart, Key
from twolane.bench.sweep import SIDES
from twolane.bench.verdict import NAMES, number

STYLES = {"aggregated": "aggregated", "prefill": "lanes", "decode": "lanes dashed", "both": "lanes"}
LABELS = {
    "aggregated": "plain instances' GPUs",
    "prefill": "prefill lane's GPUs",
    "decode": "decode lane's GPUs",
    "both": "GPUs that both lanes share",
}
ENERGY = {
    "joules_per_generated_token": "all GPUs, J a generated token",
    "prefill_joules_per_prompt_token": "prefill lane, J a prompt token",
    "decode_joules_per_generated_token": "decode lane, J a generated token",
}


def of_comparison(power: Mapping[str, Any]) -> list[Chart]:
    """A chart a side, of the first step at the rate at which latencies are compared."""
    every = how_often(power["update_s"])
    return [
        watts_chart(
            f"power-{side}", f"Power over time, {NAMES[side]}", f"At {power['rate']:g} requests/s. {every}", shown
        )
        for side in SIDES
        if (shown := power["over_time"].get(side))
    ]


def how_often(update_s: float | None) -> str:
    known = (
        f"The GPUs tell a new figure every {1000 * update_s:.0f} ms" if update_s else "How often it changes isn't known"
    )
    return f"{known}; each point is the mean of an equal stretch of time."


def watts_chart(
    name: str, title: str, about: str, over_time: tuple[list[float], dict[str, list[float | None]]]
) -> Chart:
    """`over_time`: seconds, and watts by lane."""
    at_s, lanes = over_time
    lines = [_line(lane, watts) for lane, watts in lanes.items()]
    drawn = {"x": at_s, "xLabel": "seconds", "yLabel": "W", "lines": lines, "bands": [], "limits": [], "log": False}
    keys = [Key(STYLES[lane], LABELS[lane]) for lane in lanes]
    rows = [[LABELS[lane], *_mean_and_peak(watts)] for lane, watts in lanes.items()]
    return Chart(name, title, about, drawn, keys, ["", "mean, W", "highest, W"], rows, "Of what is drawn.")


def _line(lane: str, watts: list[float | None]) -> dict[str, Any]:
    style, _, dashed = STYLES[lane].partition(" ")
    line: dict[str, Any] = {"label": LABELS[lane], "colour": style, "values": watts, "points": False}
    return line | ({"dash": [6, 4]} if dashed else {})


def _mean_and_peak(watts: list[float | None]) -> list[str]:
    known = [value for value in watts if value is not None]
    return [number(sum(known) / len(known)), number(max(known))] if known else ["-", "-"]


def energy_table(power: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a side and rate each."""
    rows = [
        [f"{NAMES[side]}, {point['rate']:g} requests/s", *(_spread(point["spread"].get(name)) for name in ENERGY)]
        for side in SIDES
        for point in power["energy"][side]
    ]
    return ["", *ENERGY.values()], rows


def _spread(spread: Mapping[str, Any] | None) -> str:
    if not spread:
        return "-"
    text = number(spread["median"])
    return text if spread["rounds"] < 2 else f"{text}\n{number(spread['low'])} to {number(spread['high'])}"
