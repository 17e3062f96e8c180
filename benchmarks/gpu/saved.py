"""The end of a run, however it ended: tables, the file, the last line."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.bars import as_json, columns, markdown, rows
from benchmarks.gpu.figures import figures
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Results
from benchmarks.gpu.surroundings import surroundings
from benchmarks.gpu.tables import show
from rich.console import Console


def finish(options: Options, results: Results, console: Console) -> None:
    """Saves everything with raw times, prints the tables, the one beside the bars last, and one line of JSON."""
    found = figures(results)
    table = rows(found, _link(options, results))
    text = markdown(table, columns(table, results))
    report = {**surroundings(options.commit), "options": asdict(options), "figures": found, "bars": as_json(table)}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / time.strftime("gpu-%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps(report | {"results": results.raw()}, default=str) + "\n")
    file.with_suffix(".md").write_text(text + "\n")
    show(found, results, console)
    print(text)
    print(json.dumps(summary(found, results) | {"saved": str(file)}), flush=True)


def _link(options: Options, results: Results) -> list[dict[str, Any]]:
    if options.link is None:
        return []
    try:
        reports = json.loads(options.link.read_text())
    except (OSError, ValueError) as error:
        results.note(f"--link {options.link}: {error}")
        return []
    return reports if isinstance(reports, list) else [reports]


def summary(found: dict[str, Any], results: Results) -> dict[str, Any]:
    """The figures that decide, in ms; the file has the rest."""
    return {
        "unloaded": {_key(row): _times(row) | _above(row) for row in found["unloaded"]},
        "loaded": {_key(row): _times(row) | _gaps(row) for row in found["loaded"]},
        "push_lost_percent": {
            row["setup"]: row["lost_percent"]["median"] for row in found["push"] if "lost_percent" in row
        },
        "stages": {
            _key(table): {f"{row['from']} -> {row['to']}": row["median"] for row in table["rows"]}
            for table in found["stages"]
        },
        "received": found["received"],
        "skipped": results.skipped,
        "notes": results.notes,
    }


def _key(row: dict[str, Any]) -> str:
    return f"{row['route']}, {row['length']}"


def _times(row: dict[str, Any]) -> dict[str, Any]:
    ttft = row.get("ttft_ms")
    return {"n": row["requests"] - row["failed"], "failed": row["failed"]} | (
        {"ttft_p50": ttft["median"], "ttft_p99": ttft["p99"]} if ttft else {}
    )


def _above(row: dict[str, Any]) -> dict[str, Any]:
    return {"above": {entry["baseline"]: entry["of_medians_ms"] for entry in row["above"]}} if row["above"] else {}


def _gaps(row: dict[str, Any]) -> dict[str, Any]:
    itl = row.get("itl_ms")
    return {"itl_p99": itl["p99"], "idle_itl_p50": row.get("idle_itl_median_ms")} if itl else {}
