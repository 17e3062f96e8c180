"""What `twolane doctor` looks at: gathered here, judged in doctor.py. Asks driver, files and kernel; starts nothing."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from twolane.launch import benchmark
from twolane.launch.hardware import vllm_folder
from twolane.launch.plan import Plan
from twolane.launch.ports import taken_ports
from twolane.power.nvml import nvml

TIMEX_BYTES = 256  # struct timex takes 208 on 64-bit Linux
TIME_ERROR = 5  # what adjtimex returns where nothing keeps the clock right
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
SHM = Path("/dev/shm")  # noqa: S108 - looked at, not written to


@dataclass(frozen=True)
class Gpu:
    """One GPU. `holders`: processes that use it, in words."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything the checks may know. `links`: a pair of GPUs -> (peer access, NVLink)."""

    plan: Plan
    versions: dict[str, str]
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    links: dict[tuple[int, int], tuple[bool, bool]] = field(default_factory=dict)
    model_config: dict[str, Any] | None = None  # None: not on this disk
    model_bytes: int = 0
    known_architectures: str = ""  # the text of vLLM's registry; empty if it isn't found
    ports: tuple[str, ...] = ()
    outgoing_ports: range = range(0)  # what the kernel gives to whoever names no port
    running: bool = False  # our own services run: their ports and memory are theirs
    disk_free_bytes: dict[str, int] = field(default_factory=dict)
    memory_free_bytes: int = 1 << 40
    shm_free_bytes: int = 1 << 40
    max_open_files: int = 1 << 20
    clock_behind_s: float = 0.0  # how far the wall clock lies before a time that has passed for certain
    clock_synchronised: bool | None = True  # by NTP or the like, as the kernel has it; None if it doesn't say


def gather(plan: Plan, folders: list[Path], running: bool) -> Facts:
    driver, gpus, links = _nvidia()
    folder = Path(plan.model.source)
    return Facts(
        plan=plan,
        versions=benchmark.versions(),
        driver=driver,
        gpus=gpus,
        links=links,
        model_config=_model_config(folder),
        model_bytes=sum(path.stat().st_size for path in folder.glob("*") if path.suffix in {".safetensors", ".bin"}),
        known_architectures=_architectures(),
        ports=() if running else tuple(taken_ports(plan)),
        outgoing_ports=_outgoing_ports(),
        running=running,
        disk_free_bytes={str(path): _free_bytes(path) for path in folders},
        memory_free_bytes=psutil.virtual_memory().available,
        shm_free_bytes=_free_bytes(SHM),
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # the proxy raises its own to that
        clock_behind_s=max(0.0, _passed_for_certain(plan) - time.time()),
        clock_synchronised=clock_synchronised(),
    )


def _passed_for_certain(plan: Plan) -> float:
    """Unix time. No clock may be before the time at which this program, vLLM and our logs were written."""
    engine = vllm_folder()
    files = [Path(__file__), *([engine / "__init__.py"] if engine else []), *(Path(spec.log) for spec in plan.services)]
    return max(_mtime(path) for path in files)


def clock_synchronised() -> bool | None:
    """adjtimex(2): whether the kernel holds the clock for disciplined. Containers see their host's."""
    timex = ctypes.create_string_buffer(TIMEX_BYTES)  # all zero: only asks
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def _free_bytes(path: Path) -> int:
    """Of the file system in which `path` is, or would be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _outgoing_ports() -> range:
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, OUTGOING_PORTS.read_text().split())
        return range(first, last + 1)
    return range(0)


def _mtime(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _model_config(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text())
        return config if isinstance(config, dict) else None
    return None


def _architectures() -> str:
    folder = vllm_folder()
    path = folder / "model_executor/models/registry.py" if folder else None
    return path.read_text() if path and path.exists() else ""


def _nvidia() -> tuple[str, tuple[Gpu, ...], dict[tuple[int, int], tuple[bool, bool]]]:
    """Driver version, GPUs, and how each pair reaches each other. Nothing without a driver."""
    with nvml() as pynvml:
        if pynvml is None:
            return "", (), {}
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(pynvml, index, handle) for index, handle in enumerate(handles))
        links = {
            (a, b): (
                _p2p(pynvml, handles[a], handles[b], pynvml.NVML_P2P_CAPS_INDEX_WRITE),
                _p2p(pynvml, handles[a], handles[b], pynvml.NVML_P2P_CAPS_INDEX_NVLINK),
            )
            for a, b in itertools.combinations(range(len(handles)), 2)
        }
        return str(pynvml.nvmlSystemGetDriverVersion()), gpus, links


def _gpu(pynvml: Any, index: int, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    holders: list[str] = []
    with contextlib.suppress(pynvml.NVMLError):
        holders = [_process(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return Gpu(index, str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), tuple(holders))


def _process(pid: int) -> str:
    try:
        return f"{pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"{pid} (of another container)"


def _p2p(pynvml: Any, a: Any, b: Any, what: int) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetP2PStatus(a, b, what) == pynvml.NVML_P2P_STATUS_OK)
    except pynvml.NVMLError:
        return False
