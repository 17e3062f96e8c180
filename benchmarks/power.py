"""What the GPUs' power counters are worth: how often each really changes, what a look costs, watts idle and busy.

The physics: a GPU's power sensor is read by its firmware at a pace of its own, and NVML tells the last value, or since
Ampere the mean of the last second. Looking more often than a counter changes shows nothing new and costs a call each
time, some of them microseconds and some, where the firmware is asked, milliseconds. The energy counter is the measure:
watts that are integrated at 100 ms miss what happens in between, and by how much is the last figure.

On a GPU machine, nothing else running there:
    python -m benchmarks.power

Each GPU is looked at while idle, then under a matrix product in a process of its own (that needs torch with CUDA; else
it is left out, and that is said). Changes no setting of a GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from twolane.power.nvml import Driver, Gpu, nvml
from twolane.power.series import PowerRecorder

BUSY = """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
(a @ a).sum().item()
print("busy", flush=True)
while True:
    for _ in range(50):
        a @ a
    torch.cuda.synchronize()
"""
WARM_UP_S = 3.0  # the mean of the last second, and clocks that go up


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each query, idle and busy")
    parser.add_argument("--every-ms", type=float, default=1.0, help="between two looks")
    parser.add_argument("--gpus", type=int, default=2, help="how many GPUs to look at, from the first on")
    parser.add_argument("--no-load", action="store_true", help="idle only")
    return parser.parse_args(argv)


def look(query: Callable[[], float], seconds: float, every_s: float) -> dict[str, Any]:
    """Asks over and over. Intervals between distinct values are in ms, costs of a call in microseconds."""
    costs_s, changes_s, values = [], [], [query()]
    end_s = time.monotonic() + seconds
    while (began_s := time.monotonic()) < end_s:
        value = query()
        costs_s.append(time.monotonic() - began_s)
        if value != values[-1]:
            changes_s.append(began_s)
        values.append(value)
        time.sleep(max(0.0, every_s - costs_s[-1]))
    intervals_ms = [(b - a) * 1e3 for a, b in itertools.pairwise(changes_s)]
    return {
        "looks": len(costs_s),
        "update_ms": spread(intervals_ms),  # no finer than the looks
        "cost_us": spread([cost_s * 1e6 for cost_s in costs_s]),
        "mean": round(statistics.fmean(values), 3),
        "first_to_last": round(values[-1] - values[0], 3),
    }


def spread(values: list[float]) -> dict[str, float] | None:
    """None where there is too little for it."""
    if len(values) < 10:
        return None
    tenths = statistics.quantiles(values, n=100)
    return {"p10": round(tenths[9], 2), "p50": round(tenths[49], 2), "p99": round(tenths[98], 2)}


def look_at(library: Any, gpu: Gpu, options: argparse.Namespace) -> dict[str, Any]:
    """Each query by itself; an unsupported one says so."""
    queries = {"instant_watts": gpu.instant_watts, "mean_watts": gpu.mean_watts, "energy_joules": gpu.counter_j}
    found: dict[str, Any] = {}
    for name, query in queries.items():
        try:
            found[name] = look(query, options.seconds, options.every_ms / 1e3)
        except library.NVMLError as error:
            found[name] = {"unsupported": str(error)}
    found["sampled"] = sampled(gpu, options.seconds)
    return found


def sampled(gpu: Gpu, seconds: float) -> dict[str, Any] | None:
    """What TwoLane's own sampler makes of the same time, and what integrated watts would have."""
    with PowerRecorder() as recorder:
        time.sleep(seconds)
    series = recorder.series()
    if series is None or gpu.uuid not in series.gpus:
        return None
    mine = series.gpus[gpu.uuid]
    steps = zip(mine.at_s, mine.at_s[1:], mine.watts, mine.watts[1:], strict=False)
    integrated_j = sum((later_s - s) * (watts + later_watts) / 2 for s, later_s, watts, later_watts in steps)
    return {
        "update_s": series.update_s,
        "seconds": round(mine.at_s[-1] - mine.at_s[0], 3),
        "joules": round(mine.joules[-1], 3),
        "joules_by_integrating_watts": round(integrated_j, 3),
    }


@contextmanager
def load_on(uuid: str) -> Iterator[str]:
    """A process that computes there, until the end; why there is none, or nothing."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": uuid}
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline().strip() == "busy":
            time.sleep(WARM_UP_S)
            yield ""
        else:
            yield (child.stderr.read().strip().splitlines() or ["no torch"])[-1]
    finally:
        child.kill()
        child.communicate()


def cost_of_a_sample(seconds: float) -> dict[str, float] | None:
    """All GPUs, as the sampler reads them, in microseconds."""
    driver = Driver()
    driver.open()
    try:
        return look(lambda: float(len(driver.read())), seconds, 0.01)["cost_us"]  # type: ignore[no-any-return]
    finally:
        driver.close()


def measure(library: Any, options: argparse.Namespace, say: Callable[[str], object]) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": str(library.nvmlSystemGetDriverVersion()), "gpus": []}
    for index in range(min(options.gpus, library.nvmlDeviceGetCount())):
        gpu = Gpu(library, index)
        say(f"GPU {index} ({gpu.name}), idle")
        states = {"idle": look_at(library, gpu, options)}
        if not options.no_load:
            with load_on(gpu.uuid) as why_not:
                say(f"GPU {index}, {why_not or 'busy'}")
                states["busy"] = {"left_out": why_not} if why_not else look_at(library, gpu, options)
        found["gpus"].append({"index": index, "name": gpu.name, "uuid": gpu.uuid, **states})
    found["sample_of_all_gpus_us"] = cost_of_a_sample(options.seconds)
    return found


def table(found: dict[str, Any]) -> Table:
    made = Table("GPU", "state", "query", "mean", "changes every (ms)", "a call costs (us)")
    for gpu in found["gpus"]:
        for state in ("idle", "busy"):
            for query in ("instant_watts", "mean_watts", "energy_joules"):
                if (figures := gpu.get(state, {}).get(query)) is None:
                    continue
                if "unsupported" in figures:
                    made.add_row(str(gpu["index"]), state, query, figures["unsupported"], "", "")
                    continue
                cells = [_cell(figures[key]) for key in ("update_ms", "cost_us")]
                mean = "" if query == "energy_joules" else f"{figures['mean']:.1f} W"
                made.add_row(str(gpu["index"]), state, query, mean, *cells)
    return made


def _cell(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['p50']:g} (p10 {found['p10']:g}, p99 {found['p99']:g})"


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    progress = Console(stderr=True, highlight=False, markup=False)
    with nvml() as library:
        if library is None or not library.nvmlDeviceGetCount():
            progress.print("there is no NVIDIA GPU here, or no driver for it: nothing to measure")
            return 1
        found = measure(library, options, progress.print)
    Console().print(table(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
