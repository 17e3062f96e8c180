"""`.twolane/state.json`: what runs. The supervisor alone writes it, whole and at once, at every change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from twolane.launch.process import ProcessId

FORMAT = 2
Overall = Literal["starting", "up", "stopping", "stopped", "failed"]


class ServiceState(msgspec.Struct):
    """One service. `members`: every process seen in its group; `phase` is a word for people except "ready"."""

    name: str
    role: str
    http_port: int
    log: str
    kv_port: int | None = None
    gpus: tuple[int, ...] = ()
    phase: str = "waiting"
    since: float = 0.0  # Unix time at which the phase began: another process reads it
    pid: int = 0
    pgid: int = 0
    members: list[ProcessId] = []
    restarts: int = 0
    host: str = "127.0.0.1"  # where it is reached; empty: not known yet
    node: str = ""  # of a Ray cluster
    exit_code: int | None = None  # of the last time it ended
    reason: str = ""  # why it is being restarted, or was given up


class State(msgspec.Struct):
    """`error` and `error_log`: why the start, or that of an instance added later, failed; its last lines."""

    supervisor: ProcessId
    overall: Overall
    url: str
    model_names: tuple[str, ...]
    run_dir: str  # sockets and temporary files of this run
    services: list[ServiceState]
    started: float  # Unix time
    error: str = ""
    error_log: list[str] = []
    wish: str = ""  # id of the last one that was taken
    retired: list[str] = []  # since then: how they ended, a line each
    format: int = FORMAT


def write_state(state: State, path: Path) -> None:
    """Readers see the old or the new, never a part."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    os.replace(fresh, path)  # noqa: PTH105 - the same as Path.replace, said with the system call's name


def read_state(path: Path) -> State | None:
    """None if there is none, or none that this version understands."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError):
        return None
