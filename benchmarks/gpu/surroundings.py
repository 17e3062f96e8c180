"""What is needed to read the figures later: versions, driver, GPUs, how they are linked, this checkout's commit."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import Any

from twolane.config import Settings
from twolane.launch import benchmark
from twolane.power.nvml import nvml

MORE_PACKAGES = ("nixl", "nixl-cu13", "triton", "nvidia-nccl-cu13")
TIMEOUT_S = 20.0


def surroundings(commit: str) -> dict[str, Any]:
    found = benchmark.surroundings(Settings())
    del found["configuration"]  # each setup's own commands are saved
    found["versions"] |= {name: version for name in MORE_PACKAGES if (version := _version(name))}
    found["commit"] = commit or git_commit()
    found["driver"] = driver_version()
    found["topology"] = _said_by("nvidia-smi", "topo", "-m")
    found["gpus"] = _said_by("nvidia-smi", "--query-gpu=index,name,memory.total,pcie.link.gen.max", "--format=csv")
    return found


def driver_version() -> str:
    """Empty without an NVIDIA driver."""
    with nvml() as library:
        return str(library.nvmlSystemGetDriverVersion()) if library else ""


def git_commit() -> str:
    """With a plus behind it where files have changed; empty where this is no checkout."""
    here = str(Path(__file__).parent)
    commit = _said_by("git", "-C", here, "rev-parse", "HEAD")
    changed = bool(commit) and bool(_said_by("git", "-C", here, "status", "--porcelain", "--untracked-files=no"))
    return commit + ("+" if changed else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _said_by(*argv: str) -> str:
    """Its output; empty if there is no such program or it fails."""
    if shutil.which(argv[0]) is None:
        return ""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
