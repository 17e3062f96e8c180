"""report.json's content -> what each chart shows and the table that says the same. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from twolane.bench.sweep import SIDES
from twolane.bench.verdict import NAMES, number

SHORT = {"aggregated": "aggregated", "lanes": "two lanes"}


class Key(msgspec.Struct, frozen=True):
    """One entry of a legend."""

    style: str
    text: str


class Chart(msgspec.Struct, frozen=True):
    """`drawn`: for page.js. `header` and `rows`: the same as a table."""

    name: str
    title: str
    about: str
    drawn: dict[str, Any]
    keys: list[Key]
    header: list[str]
    rows: list[list[str]]
    caption: str = "Median of the rounds, below it the lowest and the highest."


def charts_of(report: dict[str, Any]) -> list[Chart]:
    """Without those that have nothing to show: answers of one token have no ITL."""
    if not any(report["points"].values()):
        return []
    objective = report["objective"]
    charts = [
        _times(report, "ttft", "Time to first token (TTFT)", objective["ttft_ms"]),
        _times(report, "itl", "Time between tokens (ITL)", objective["itl_ms"]),
        _times(report, "tpot", "Time per output token (TPOT)", None),
        _goodput(report),
    ]
    return [
        chart for chart in charts if any(value is not None for line in chart.drawn["lines"] for value in line["values"])
    ]


def _rates(report: dict[str, Any]) -> list[float]:
    return sorted({point["rate"] for side in SIDES for point in report["points"][side]})


def _values(report: dict[str, Any], side: str, name: str, what: str) -> list[float | None]:
    by_rate = {point["rate"]: point["spread"][name] for point in report["points"][side]}
    return [spread[what] if (spread := by_rate.get(rate)) else None for rate in _rates(report)]


def _frame(report: dict[str, Any], label: str, log: bool) -> dict[str, Any]:
    rates = _rates(report)
    frame = {"x": rates, "rates": True, "xLabel": "requests/s offered", "yLabel": label, "log": log}
    return frame | {"lines": [], "bands": [], "limits": []}


def _add_spread(drawn: dict[str, Any], report: dict[str, Any], side: str, name: str) -> None:
    """The band from the lowest to the highest round."""
    first = len(drawn["lines"]) + 1
    drawn["lines"] += [{"hidden": True, "values": _values(report, side, name, what)} for what in ("high", "low")]
    drawn["bands"].append({"series": [first, first + 1], "colour": side})


def _times(report: dict[str, Any], name: str, title: str, limit_ms: float | None) -> Chart:
    drawn = _frame(report, "ms", log=True)
    keys = []
    for side in SIDES:
        _add_spread(drawn, report, side, f"{name}_p99_ms")
        for part, dash in (("p99", None), ("p50", [6, 4])):
            label = f"{SHORT[side]}, {part}"
            values = _values(report, side, f"{name}_{part}_ms", "median")
            drawn["lines"].append({"label": label, "colour": side, "values": values, "dash": dash})
            keys.append(Key(f"{side} dashed" if dash else side, label))
    if limit_ms is not None:
        drawn["limits"].append(limit_ms)
        keys.append(Key("limit dotted", f"objective: {number(limit_ms)} ms"))
    header = [f"{SHORT[side]}: {part}, ms" for side in SIDES for part in ("p50", "p99")]
    rows = [
        [f"{rate:g}", *(_cell(report, side, rate, f"{name}_{part}_ms") for side in SIDES for part in ("p50", "p99"))]
        for rate in _rates(report)
    ]
    about = (
        "Lines: the median of the rounds. Shaded: from the lowest round's p99 to the highest's. Both axes logarithmic."
    )
    return Chart(name, title, about, drawn, keys, ["requests/s", *header], rows)


def _goodput(report: dict[str, Any]) -> Chart:
    drawn = _frame(report, "requests/s", log=False)
    keys = []
    for side in SIDES:
        _add_spread(drawn, report, side, "goodput_per_s")
        values = _values(report, side, "goodput_per_s", "median")
        drawn["lines"].append({"label": SHORT[side], "colour": side, "values": values})
        keys.append(Key(side, SHORT[side]))
    offered = {"label": "offered", "colour": "offered", "values": _rates(report), "dash": [2, 4], "points": False}
    drawn["lines"].append(offered)
    keys.append(Key("offered dotted", "offered: as if every request met the objective"))
    header = [f"{SHORT[side]}: {what}" for side in SIDES for what in ("requests/s", "met it", "failed")]
    rows = [[f"{rate:g}", *(cell for side in SIDES for cell in _counts(report, side, rate))] for rate in _rates(report)]
    about = "Requests a second that met both objectives; a failed one did not. Lines and shades as above."
    return Chart("goodput", "Goodput", about, drawn, keys, ["requests/s", *header], rows)


def _point(report: dict[str, Any], side: str, rate: float) -> dict[str, Any] | None:
    return next((point for point in report["points"][side] if point["rate"] == rate), None)


def _cell(report: dict[str, Any], side: str, rate: float, name: str) -> str:
    """The second line, behind a line feed, is the spread."""
    point = _point(report, side, rate)
    spread = point["spread"][name] if point else None
    if not spread:
        return "not measured" if point is None else "none"
    text = number(spread["median"])
    return text if spread["rounds"] < 2 else f"{text}\n{number(spread['low'])} to {number(spread['high'])}"


def _counts(report: dict[str, Any], side: str, rate: float) -> list[str]:
    point = _point(report, side, rate)
    if point is None:
        return ["not measured", "", ""]
    late = f"\n{point['timed_out']} timed out" if point["timed_out"] else ""
    met = f"{point['good']} of {point['requests']}"
    return [_cell(report, side, rate, "goodput_per_s"), met, f"{point['failed']}{late}"]


def counted_rows(report: dict[str, Any]) -> list[list[str]]:
    """What went wrong or another way than planned, by side."""
    rows = []
    for side in SIDES:
        points, counted = report["points"][side], report["counted"][side]
        total, failed, timed_out = (sum(point[key] for point in points) for key in ("requests", "failed", "timed_out"))
        alone = ", ".join(f"{name[6:]}: {n}" for name, n in counted.items() if name.startswith("alone_") and n)
        alone = alone if side == "lanes" else "all, as they should"
        row = [NAMES[side], f"{total:,}", f"{failed}", f"{timed_out}", f"{counted.get('failed_legs', 0)}"]
        rows.append([*row, alone or "0", _moved(counted)])
    return rows


def _moved(counted: dict[str, int]) -> str:
    moved, computed = counted.get("moved_tokens", 0), counted.get("computed_tokens", 0)
    return f"{100 * moved / (moved + computed):.1f} %" if moved + computed else "-"
