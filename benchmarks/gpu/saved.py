"""The end of a run, however it ended: tables, the file, the last line."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.figures import figures
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Results
from benchmarks.gpu.surroundings import surroundings
from benchmarks.gpu.tables import show
from rich.console import Console


def finish(options: Options, results: Results, console: Console) -> None:
    """Prints the tables, saves everything with raw times, prints one line of JSON."""
    found = figures(results)
    show(found, results, console)
    report = {**surroundings(options.commit), "options": asdict(options), "figures": found, "results": results.raw()}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / time.strftime("gpu-%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps(report, default=str) + "\n")
    print(json.dumps(summary(found, results) | {"saved": str(file)}), flush=True)


def summary(found: dict[str, Any], results: Results) -> dict[str, Any]:
    """Without the stage tables' side rows, which are in the file."""
    stages = [
        {"route": table["route"], "length": table["length"]}
        | {"median_ms": {f"{row['from']} -> {row['to']}": row["median"] for row in table["rows"]}}
        for table in found["stages"]
    ]
    return {**found, "stages": stages, "skipped": results.skipped, "notes": results.notes}
