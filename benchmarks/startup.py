"""What `twolane up` adds to a start: P and D alone, by vLLM's own entry, beside `twolane up`, in turns in one run.

The physics: an instance's own start (import, weights, warm-up) takes nearly all of it, both start side by side. What
TwoLane adds is its own start before them, and after them the proxy's probe and a first request through both lanes.
"Ready" is vLLM's /health for the bare instances, and the last `ready` of `twolane up`'s progress for the services.

    .venv/bin/python benchmarks/startup.py --rounds 3

The last line is JSON, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
from rich.console import Console

from twolane.config import Settings
from twolane.launch.configuration import load
from twolane.launch.hardware import inspect_machine
from twolane.launch.model import resolve_model
from twolane.launch.plan import Plan, make_plan
from twolane.launch.probes import is_healthy
from twolane.launch.process import Child
from twolane.launch.progress import Progress
from twolane.launch.state import read_state

POLL_S = 0.05
LIMIT_S = 600.0


def settings_in(folder: Path) -> Settings:
    return replace(load({}).settings, log_dir=folder / "logs", state_dir=folder / ".twolane")


def bare(plan: Plan) -> dict[str, float]:
    """Both instances as the plan has them, without a proxy or a supervisor."""
    began_s = time.monotonic()
    children = {spec.name: Child(spec, {}) for spec in plan.instances()}
    ready: dict[str, float] = {}
    try:
        while len(ready) < len(children):
            for spec in plan.instances():
                if spec.name not in ready and is_healthy(spec):
                    ready[spec.name] = time.monotonic() - began_s
            assert time.monotonic() - began_s < LIMIT_S
            time.sleep(POLL_S)
    finally:
        for child in children.values():
            child.stop(10.0)
    return {"slower_instance": max(ready.values())}


def with_up(folder: Path) -> dict[str, float]:
    """`up` in a process of its own, timed by the lines it prints."""
    began_s = time.monotonic()
    words = [sys.executable, "-u", "-m", "twolane.cli"]
    up = subprocess.Popen([*words, "up"], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert up.stdout is not None
    times: dict[str, float] = {}
    for line in up.stdout:
        if line.startswith("starting "):
            times["services_started"] = time.monotonic() - began_s
        if line.rstrip().endswith(": ready"):
            times["all_ready"] = time.monotonic() - began_s
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert up.wait() == 0
    times["up_returned"] = time.monotonic() - began_s
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times["cpu_up"] = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    times |= cpu_seconds(folder)
    subprocess.run([*words, "down"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return times


def cpu_seconds(folder: Path) -> dict[str, float]:
    """What supervisor and proxy have used until now: on a machine whose cores are all busy it lengthens the start."""
    state = read_state(folder / ".twolane/state.json")
    assert state is not None
    pids = {"cpu_supervisor": state.supervisor.pid, "cpu_proxy": state.services[0].pid}
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="twolane-startup-") as name:
        folder = Path(name)
        machine = inspect_machine()
        settings = settings_in(folder)
        plan = make_plan(settings, machine, resolve_model(settings, machine.engine, Progress(Console())))
        for index in range(rounds):
            for key, value in {**bare(plan), **with_up(folder)}.items():
                measured.setdefault(key, []).append(round(value, 2))
            print(f"round {index + 1}: { {key: values[-1] for key, values in measured.items()} }", flush=True)
    medians = {key: round(statistics.median(values), 2) for key, values in measured.items()}
    added = {key: round(medians[key] - medians["slower_instance"], 2) for key in ("all_ready", "up_returned")}
    print(json.dumps({"median": medians, "added": added, "all": measured, "load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
