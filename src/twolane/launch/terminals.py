"""`.twolane/terminals/`: roles in the foreground of terminals, so that `status`, `logs` and `down` know them.

A file for each, which its own command writes and removes. A command that was killed leaves its file; what is gone by
pid, start time and program is passed over, and removed by the next `down`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from twolane.launch.process import GONE, ProcessId, identify, stop_group, wait_all
from twolane.launch.state import ServiceState, read_state

FOLDER = "terminals"
STOP_S = 40.0  # the proxy's own drain takes 30 s at most
LEFTOVER_STOP_S = 5.0


class Terminal(msgspec.Struct):
    """`owner`: the `twolane` command itself. The service has no members where it is that command: the proxy."""

    owner: ProcessId
    service: ServiceState


class Record:
    """One command's own file. Owns it."""

    def __init__(self, folder: Path, owner: ProcessId, service: ServiceState) -> None:
        self._path = folder / f"{service.name}-{owner.pid}.json"
        self._terminal = Terminal(owner, service)

    def note(self, pgid: int, members: tuple[ProcessId, ...]) -> None:
        """The service's processes, now. Writes only what is new."""
        service = self._terminal.service
        if service.members != list(members) or not self._path.exists():
            service.pid = service.pgid = pgid
            service.members = list(members)
            self.write()

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(self._terminal)))
        fresh.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def recorded(state_dir: Path, service: ServiceState) -> Iterator[Record]:
    """While a role runs in this process's terminal. Nothing is recorded of what the folder's supervisor started."""
    me = identify(os.getpid())
    assert me is not None
    service.pid = me.pid
    record = Record(state_dir / FOLDER, me, service)
    state = read_state(state_dir / "state.json")
    if state is None or state.supervisor.pid != os.getppid():
        record.write()
    try:
        yield record
    finally:
        record.remove()


def running(state_dir: Path) -> list[Terminal]:
    """Those of which a process is alive."""
    return [found for _, found in _all(state_dir) if found.owner.alive() or _alive(found)]


def stop_all(state_dir: Path) -> list[str]:
    """Ends them all: SIGTERM to each command, which ends its service in order. Blocks; a line each on what it did."""
    found = _all(state_dir)
    stopping = [terminal for _, terminal in found if terminal.owner.alive()]
    for terminal in stopping:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.owner.pid, signal.SIGTERM)
    report = [f"{terminal.service.name}: {_await_end(terminal)}" for terminal in stopping]
    for path, terminal in found:
        how = stop_group(terminal.service.pgid, terminal.service.members, LEFTOVER_STOP_S) if _alive(terminal) else GONE
        if how != GONE:
            report.append(f"{terminal.service.name}: left over, {how}")
        path.unlink(missing_ok=True)
    return report


def _await_end(terminal: Terminal) -> str:
    if wait_all([terminal.owner], STOP_S):
        return "stopped in its terminal"
    os.kill(terminal.owner.pid, signal.SIGKILL)
    return "killed, it did not end in time"


def _alive(terminal: Terminal) -> bool:
    return any(member.alive() for member in terminal.service.members)


def _all(state_dir: Path) -> list[tuple[Path, Terminal]]:
    found = []
    for path in sorted((state_dir / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found.append((path, msgspec.json.decode(path.read_bytes(), type=Terminal)))
    return found
