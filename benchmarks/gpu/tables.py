"""Figures -> tables on a terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.record import Results
from rich import box
from rich.console import Console
from rich.table import Table

ENOUGH = 0.95  # of the tokens of handed-over prompts


def show(figures: dict[str, Any], results: Results, console: Console) -> None:
    for table in (_unloaded(figures), _loaded(figures), _push(figures), *_stages(figures), _tokens(figures)):
        if table.row_count:
            console.print(table)
    for setup, sources in figures["received"].items():
        parts = ", ".join(f"{source} {count:.0f}" for source, count in sources.items())
        console.print(f"{setup}: prompt tokens on D, one request at a time: {parts}", markup=False, soft_wrap=True)
        came = sources.get("external_kv_transfer")
        if came is not None and came < ENOUGH * sources["expected_by_handoff"]:
            console.print(f"{setup}: D computed prompts that should have been handed over", style="bold red")
    for setup, reason in results.skipped.items():
        console.print(f"{setup}: not measured: {reason}", markup=False, style="yellow")
    for note in results.notes:
        console.print(f"note: {note}", markup=False, style="yellow")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _ms(entry: dict[str, Any] | None, key: str) -> str:
    return f"{entry[key]:.1f}" if entry else "-"


def _quartiles(entry: dict[str, Any] | None, digits: int = 1) -> str:
    return f"{entry['q1']:.{digits}f} to {entry['q3']:.{digits}f}" if entry else "-"


def _count(row: dict[str, Any]) -> str:
    return f"{row['requests']}" + (f" ({row['failed']} failed)" if row["failed"] else "")


def _unloaded(figures: dict[str, Any]) -> Table:
    columns = ("route", "tokens", "requests", "TTFT median", "quartiles", "p99", "ITL median", "above, ms: median")
    table = _table("One request at a time, in turns (ms)", *columns, "of pairs: quartiles", "the baseline")
    for row in figures["unloaded"]:
        ttft = row.get("ttft_ms")
        cells = [row["route"], f"{row['length']}", _count(row), _ms(ttft, "median"), _quartiles(ttft)]
        cells += [_ms(ttft, "p99"), _ms(row.get("itl_ms"), "median")]
        above = row["above"]
        table.add_row(*cells, *_above(above[0] if above else None))
        for other in above[1:]:
            table.add_row(*[""] * len(cells), *_above(other))
    return table


def _above(entry: dict[str, Any] | None) -> tuple[str, str, str]:
    return (f"{entry['of_medians_ms']:+.1f}", _quartiles(entry), entry["baseline"]) if entry else ("", "", "")


def _loaded(figures: dict[str, Any]) -> Table:
    columns = ("route", "tokens", "requests", "TTFT p50", "quartiles", "p99", "ITL median", "ITL p99")
    table = _table("Under load (ms)", *columns, "idle ITL median", "p99 / idle")
    for row in figures["loaded"]:
        ttft, itl = row.get("ttft_ms"), row.get("itl_ms")
        cells = [row["route"], f"{row['length']}", _count(row), _ms(ttft, "median"), _quartiles(ttft), _ms(ttft, "p99")]
        idle, share = row.get("idle_itl_median_ms", "-"), row.get("itl_p99_of_idle", "-")
        table.add_row(*cells, _ms(itl, "median"), _ms(itl, "p99"), f"{idle}", f"{share}")
    return table


def _push(figures: dict[str, Any]) -> Table:
    columns = ("setup", "tokens", "with handoff, prompts/s", "without", "lost, %: median", "quartiles", "failed")
    table = _table("P's throughput, prompts back to back, blocks in turns", *columns)
    for row in figures["push"]:
        lost = row.get("lost_percent")
        rates = [
            ", ".join(f"{rate:.2f}" for rate in row[key].values()) for key in ("with_handoff_per_s", "without_per_s")
        ]
        cells = [row["setup"], f"{row['length']}", *rates, f"{lost['median']:.2f}" if lost else "-"]
        table.add_row(*cells, _quartiles(lost, 2), f"{row['failed']}")
    return table


def _stages(figures: dict[str, Any]) -> list[Table]:
    tables = []
    for entry in figures["stages"]:
        title = f"Where {entry['length']} tokens' TTFT goes: {entry['route']} (ms; above the line the rows follow on)"
        table = _table(title, "stage", "from", "to", "median", "quartiles", "p99", "requests")
        for row, after in zip(entry["rows"], [*entry["rows"][1:], None], strict=True):
            cells = [row["stage"], row["from"], row["to"], f"{row['median']:.2f}", _quartiles(row, 2)]
            ends = row["critical"] and after is not None and not after["critical"]
            table.add_row(*cells, f"{row['p99']:.2f}", f"{row['n']}", end_section=ends)
        tables.append(table)
    return tables


def _tokens(figures: dict[str, Any]) -> Table:
    table = _table(
        "The same answers?", "route", "tokens", "baseline", "ids equal", "equal from the start", "texts equal"
    )
    for row in figures["tokens"]:
        first = ", ".join(str(count) for count in row["ids_equal_from_the_start"])
        ids, texts = (f"{row[f'{what}_equal']} of {row[f'{what}_compared']}" for what in ("ids", "texts"))
        table.add_row(row["route"], f"{row['length']}", row["baseline"], ids, first, texts)
    return table
