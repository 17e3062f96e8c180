"""Looks at the instances: what vLLM and the connector count, and what each process holds."""

from __future__ import annotations

import http.client
from contextlib import suppress
from pathlib import Path

from benchmarks.soak.judge import Footprint

from twolane.launch.probes import request

COUNTERS = ("vllm:num_preemptions_total", "twolane_")
LABELS = {"reason", "cause", "num_gpu_blocks"}  # which tell several samples of one name apart
WAITING_FOR_BLOCKS = 'vllm:num_requests_waiting_by_reason{reason="capacity"}'


def metrics(address: str) -> dict[str, float]:
    """Every sample of /metrics, by name and LABELS; empty if the instance doesn't answer."""
    try:
        status, body = request(address, "GET", "/metrics")
    except (OSError, http.client.HTTPException):
        return {}
    lines = body.decode().splitlines() if status == 200 else []
    samples: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            key, _, value = line.rpartition(" ")
            samples[_short(key)] = float(value)
    return samples


def _short(key: str) -> str:
    name, _, labels = key.partition("{")
    kept = [part for part in labels.rstrip("}").split(",") if part.partition("=")[0] in LABELS]
    return f"{name}{{{','.join(kept)}}}" if kept else name


def counters(samples: dict[str, float]) -> dict[str, float]:
    names = {name: name.partition("{")[0] for name in samples}
    return {
        name: value
        for name, value in samples.items()
        if name.startswith(COUNTERS) and names[name].endswith("_total") and (value or "{" not in name)
    }


def num_blocks(samples: dict[str, float]) -> int:
    name = next((name for name in samples if name.startswith("vllm:cache_config_info{num_gpu_blocks=")), "")
    digits = "".join(char for char in name.partition("=")[2] if char.isdigit())
    return int(digits) if digits else 0


def used_blocks(samples: dict[str, float]) -> int:
    return round(samples.get("vllm:kv_cache_usage_perc", 0.0) * num_blocks(samples))


def is_idle(samples: dict[str, float]) -> bool:
    """It answers, serves nothing and holds no block."""
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return bool(samples) and all(samples.get(name) == 0 for name in busy)


def footprint(service: str, pid: int) -> Footprint | None:
    """None if the process is gone."""
    proc = Path(f"/proc/{pid}")
    with suppress(OSError, ValueError):
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        return Footprint(
            service,
            int(status["VmRSS"].split()[0]) * 1024 if "VmRSS" in status else 0,
            len(list((proc / "fd").iterdir())),
            len(list((proc / "task").iterdir())),
            sum("/dev/shm/" in line or "/memfd:" in line for line in (proc / "maps").read_text().splitlines()),  # noqa: S108
        )
    return None
