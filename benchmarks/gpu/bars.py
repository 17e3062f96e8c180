"""All setups' figures side by side, with the bars they are held against: one table, ready for a README. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.record import Results

ONE_INSTANCE = "plain"
# (transport, prompt tokens) -> ms above one instance's TTFT, at most
ABOVE_MS = {("cuda_ipc", 1024): 5.0, ("cuda_ipc", 8192): 8.0, ("nccl", 1024): 12.0, ("nccl", 8192): 12.0}
LOADED_TTFT = {"cuda_ipc": 1.05}  # times one instance's p50 in the same load, at most
LOADED_ITL = {"cuda_ipc": 1.5}  # p99, times an idle decoder's median, at most
LAST_BYTE_MS = {"cuda_ipc": 1.0}  # after the last layer, of the longest prompt, at most
LINK_GB_PER_S = {"cuda_ipc": 350.0, "shm": 44.0}  # at least


@dataclass(frozen=True)
class Row:
    """One figure of each setup. `bars`: setup -> the most it may be, or the least; those without one are just told."""

    what: str
    values: dict[str, float]
    bars: dict[str, float] = field(default_factory=dict)
    at_least: bool = False
    form: str = ".1f"

    def met(self) -> dict[str, bool]:
        known = {setup: self.values[setup] for setup in self.bars if setup in self.values}
        return {s: value >= self.bars[s] if self.at_least else value <= self.bars[s] for s, value in known.items()}


def rows(found: dict[str, Any], link: list[dict[str, Any]]) -> list[Row]:
    """`link`: reports of benchmarks.transport. Rows without a figure are left out."""
    made = [*_alone(found), *_loaded(found), *_stages(found), *_throughput(found), *_links(link), *_health(found)]
    return [row for row in made if row.values]


def _alone(found: dict[str, Any]) -> Iterator[Row]:
    for length in sorted({row["length"] for row in found["unloaded"]}):
        mine = {row["route"]: row for row in found["unloaded"] if row["length"] == length and "ttft_ms" in row}
        setups = {name: row for name, row in mine.items() if ": " not in name}
        yield Row(
            f"TTFT p50, {length} tokens, one at a time (ms)", {s: r["ttft_ms"]["median"] for s, r in setups.items()}
        )
        bars = {setup: bar for (setup, tokens), bar in ABOVE_MS.items() if tokens == length}
        above = {s: _above(r, ONE_INSTANCE) for s, r in setups.items()}
        yield Row("- above one instance's (ms)", _known(above), bars, form="+.1f")
        own = {s: _above(r, f"{s}: D alone") for s, r in setups.items()}
        yield Row("- above its own D asked alone (ms)", _known(own), form="+.1f")


def _above(row: dict[str, Any], baseline: str) -> float | None:
    return next((entry["of_medians_ms"] for entry in row["above"] if entry["baseline"] == baseline), None)


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {setup: value for setup, value in values.items() if value is not None}


def _loaded(found: dict[str, Any]) -> Iterator[Row]:
    mine = {row["route"]: row for row in found["loaded"] if ": " not in row["route"] and "ttft_ms" in row}
    medians = {setup: row["ttft_ms"]["median"] for setup, row in mine.items()}
    yield Row("TTFT p50 under load (ms)", medians)
    yield Row("TTFT p99 under load (ms)", {setup: row["ttft_ms"]["p99"] for setup, row in mine.items()})
    if one := medians.get(ONE_INSTANCE):
        yield Row("- p50, times one instance's", {s: ms / one for s, ms in medians.items()}, LOADED_TTFT, form=".2f")
    gaps = {setup: row["itl_ms"] for setup, row in mine.items() if row.get("itl_ms")}
    yield Row("ITL p99 under load (ms)", {setup: itl["p99"] for setup, itl in gaps.items()})
    ratios = {setup: row.get("itl_p99_of_idle") for setup, row in mine.items()}
    yield Row("- times an idle decoder's median", _known(ratios), LOADED_ITL, form=".2f")


def _stages(found: dict[str, Any]) -> Iterator[Row]:
    longest = max((table["length"] for table in found["stages"]), default=0)
    took = {
        table["route"]: row["median"]
        for table in found["stages"]
        for row in table["rows"]
        if table["length"] == longest and (row["from"], row["to"]) == ("P computed", "P pushed")
    }
    yield Row(f"last layer to last byte on D, {longest} tokens (ms)", took, LAST_BYTE_MS, form=".2f")


def _throughput(found: dict[str, Any]) -> Iterator[Row]:
    lost = {row["setup"]: row["lost_percent"]["median"] for row in found["push"] if "lost_percent" in row}
    yield Row("prompts a second that P loses to handing over (%)", lost)


def _links(link: list[dict[str, Any]]) -> Iterator[Row]:
    """Of the largest push each."""
    largest = {report["transport"]: report["pushes"][-1] for report in link if report.get("pushes")}
    for key, what in (("GB/s", "whole calls"), ("running GB/s", "while one runs")):
        rates = {name: row[key] for name, row in largest.items() if row.get(key)}
        yield Row(f"GB/s of a transfer, {what}", rates, LINK_GB_PER_S if key == "running GB/s" else {}, at_least=True)


def _health(found: dict[str, Any]) -> Iterator[Row]:
    yield Row("cores kept busy while nobody asks", found["idle_cores"], form=".2f")
    failed: dict[str, float] = {}
    for row in (*found["unloaded"], *found["loaded"]):
        setup = row["route"].partition(": ")[0]
        failed[setup] = failed.get(setup, 0) + row["failed"]
    yield Row("requests that failed", failed, form=".0f")


def columns(table: list[Row], results: Results) -> list[str]:
    """One instance first, then in the order asked for; what only the link was measured of stands last."""
    asked = [*results.beside, *(name for row in table for name in row.values)]
    known = [name for name in dict.fromkeys(asked) if any(name in row.values for row in table)]
    return sorted(known, key=lambda name: name != ONE_INSTANCE)


def markdown(table: list[Row], names: list[str]) -> str:
    """A figure that meets its bar is bold, one that doesn't is followed by the word."""
    lines = ["| | " + " | ".join([*names, "bar"]) + " |", "|---" * (len(names) + 2) + "|"]
    for row in table:
        cells = [_cell(row, name) for name in names]
        lines.append("| " + " | ".join([row.what, *cells, _bar(row, names)]) + " |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if name not in row.values:
        return ""
    text, met = f"{row.values[name]:{row.form}}", row.met().get(name)
    return text if met is None else f"**{text}**" if met else f"{text} (missed)"


def _bar(row: Row, names: list[str]) -> str:
    word = "at least" if row.at_least else "at most"
    return "; ".join(f"{name} {word} {bar:g}" for name, bar in row.bars.items() if name in names)


def as_json(table: list[Row]) -> list[dict[str, Any]]:
    return [{"what": r.what, "values": r.values, "bars": r.bars, "at_least": r.at_least, "met": r.met()} for r in table]
