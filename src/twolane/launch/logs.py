"""The services' logs: the end of each, interleaved, and what comes after it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch import terminals
from twolane.launch.process import last_lines
from twolane.launch.state import read_state

POLL_S = 0.2
NAMES = ("proxy", "prefill", "decode")
# "11-22 16:12:01" of vLLM and "2026-11-22 16:12:01,123" of the proxy
STAMP = re.compile(r"\b(\d\d-\d\d) (\d\d:\d\d:\d\d)\b")


def files_of(settings: Settings, role: str | None = None) -> dict[str, Path]:
    """Log files by service name, in the order of the roles. ConfigError if there are none, or none of that role."""
    found = {
        path.stem: path
        for name in NAMES
        for path in [*sorted(settings.log_dir.glob(f"{name}*.log")), *_of_running(settings.state_dir)]
        if path.stem.partition("-")[0] == name
    }
    mine = {
        name: path for name, path in found.items() if role in {None, "all", name, name.partition("-")[0], f"{name}-1"}
    }
    if role == "supervisor":
        mine = {"supervisor": settings.log_dir / "supervisor.log"}
    if not mine:
        what = f"no log of {role!r}" if found else "no log yet"
        raise ConfigError(f"there is {what} in {settings.log_dir}; roles are {', '.join(NAMES)} and supervisor")
    return mine


def _of_running(state_dir: Path) -> list[Path]:
    """Logs of what runs: it may have been started with another --log-dir."""
    state = read_state(state_dir / "state.json")
    services = [*(state.services if state else ()), *(terminal.service for terminal in terminals.running(state_dir))]
    return [Path(service.log) for service in services if Path(service.log).exists()]


def tail(files: dict[str, Path], count: int) -> list[str]:
    """The last `count` lines of each, in the order of time, each with its service before it."""
    return interleave({name: last_lines(path, count) for name, path in files.items()})


def interleave(lines: dict[str, list[str]]) -> list[str]:
    """Pure. A line without a time belongs to the one before it."""
    width = max((len(name) for name in lines), default=0)
    stamped: list[tuple[str, str]] = []
    for name, own in lines.items():
        stamp = ""
        for line in own:
            found = STAMP.search(line)
            stamp = max(stamp, f"{found[1]} {found[2]}") if found else stamp
            stamped.append((stamp, f"{name:<{width}} | {line}"))
    return [line for _, line in sorted(stamped, key=lambda pair: pair[0])]


def follow(files: dict[str, Path], write: Callable[[str], object], go_on: Callable[[], bool]) -> None:
    """Writes what comes, whole lines, until `go_on` says no. One that was cut or made anew is read from its start."""
    width = max(len(name) for name in files)
    followers = [Follower(name.ljust(width), path) for name, path in files.items()]
    try:
        more = True
        while more:
            more = go_on()
            for follower in followers:
                for line in follower.read():
                    write(line)
            if more:
                time.sleep(POLL_S)
    finally:
        for follower in followers:
            follower.close()


class Follower:
    """One growing file. Owns its descriptor and the part of a line that was read last. Close it."""

    def __init__(self, label: str, path: Path, *, from_start: bool = False) -> None:
        self._prefix = f"{label} | " if label else ""
        self._path = path
        self._part = b""
        self._file = self._open()
        if self._file is not None and not from_start:
            os.lseek(self._file, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Whole new lines, with their ends. Of a file that was moved away what is left first, then the new one."""
        replaced = self._replaced()
        fresh = self._drain()
        if replaced:
            self.close()
            self._file = self._open()
            fresh += self._drain()
        whole, end, self._part = (self._part + fresh).rpartition(b"\n")
        return [f"{self._prefix}{line}\n" for line in whole.decode(errors="replace").split("\n")] if end else []

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int | None:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    def _replaced(self) -> bool:
        try:
            there = self._path.stat()
        except OSError:
            return False
        if self._file is None:
            return True
        mine = os.fstat(self._file)
        if mine.st_size < os.lseek(self._file, 0, os.SEEK_CUR):  # somebody emptied it
            os.lseek(self._file, 0, os.SEEK_SET)
        return (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev)

    def _drain(self) -> bytes:
        chunks = []
        while self._file is not None and (chunk := os.read(self._file, 1 << 20)):
            chunks.append(chunk)
        return b"".join(chunks)
