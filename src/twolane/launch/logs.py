"""The services' logs: the end of each, interleaved, and what comes after it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.process import last_lines

POLL_S = 0.2
NAMES = ("proxy", "prefill", "decode")
# "11-22 16:12:01" of vLLM and "2026-11-22 16:12:01,123" of the proxy
STAMP = re.compile(r"\b(\d\d-\d\d) (\d\d:\d\d:\d\d)\b")


def files_of(settings: Settings, role: str | None = None) -> dict[str, Path]:
    """Log files by service name, in the order of the roles. ConfigError if there are none, or none of that role."""
    found = {
        path.stem: path
        for name in NAMES
        for path in sorted(settings.log_dir.glob(f"{name}*.log"))
        if path.stem.partition("-")[0] in NAMES
    }
    mine = {name: path for name, path in found.items() if role in {None, "all", name, name.partition("-")[0]}}
    if role == "supervisor":
        mine = {"supervisor": settings.log_dir / "supervisor.log"}
    if not mine:
        what = f"no log of {role!r}" if found else "no log yet"
        raise ConfigError(f"there is {what} in {settings.log_dir}; roles are {', '.join(NAMES)} and supervisor")
    return mine


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
    while True:
        more = go_on()
        for follower in followers:
            for line in follower.read():
                write(line)
        if not more:
            return
        time.sleep(POLL_S)


class Follower:
    """One growing file. Owns how far it was read."""

    def __init__(self, label: str, path: Path, *, from_start: bool = False) -> None:
        self._label = label
        self._path = path
        self._inode, size_bytes = self._stat()
        self._offset = 0 if from_start else size_bytes

    def read(self) -> list[str]:
        """Whole new lines, with their ends."""
        inode, size_bytes = self._stat()
        if inode != self._inode or size_bytes < self._offset:
            self._inode, self._offset = inode, 0
        if size_bytes == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        prefix = f"{self._label} | " if self._label else ""
        return [f"{prefix}{line}\n" for line in whole.decode(errors="replace").splitlines()] if end else []

    def _stat(self) -> tuple[int, int]:
        try:
            stat = self._path.stat()
        except OSError:
            return 0, 0
        return stat.st_ino, stat.st_size
