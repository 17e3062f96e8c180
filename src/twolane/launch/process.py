"""Processes that TwoLane started: how they are told from others, started in a group of their own, and ended for good.

A process is identified by pid, start time (Linux clock ticks since boot), boot and program, so a recycled pid is never
signalled. The program stands for the command: vLLM's processes write other words over their command lines. A group is
TwoLane's as long as one process that was recorded in it is still alive in it: until then Linux does not give its number
away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from twolane.launch.logpipe import LOG_MAX_BYTES, LogPipe
from twolane.launch.plan import ServiceSpec

PR_SET_PDEATHSIG = 1
POLL_S = 0.05
KILL_WAIT_S = 10.0
TRACKER_WAIT_S = 2.0
LAST_WORDS_S = 0.5  # from a child's end until its log holds all
GONE = "was gone"
_libc = ctypes.CDLL(None)  # loaded before any fork: a forked child must not load libraries


class ProcessId(msgspec.Struct, frozen=True):
    """One process, for all time."""

    pid: int
    start_ticks: int
    program: str  # its executable file
    boot: str  # the kernel's random name of it: ticks and pids begin anew with each

    def alive(self) -> bool:
        return identify(self.pid) == self


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None if there is no such process, or only a zombie of it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before the bracket may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def identify(pid: int) -> ProcessId | None:
    ticks = start_ticks(pid)
    return None if ticks is None else ProcessId(pid, ticks, _program(pid), _boot())


def _program(pid: int) -> str:
    """Empty where this user may not know."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")  # noqa: PTH115 - it may be no file any more
    except OSError:
        return ""


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def group_members(pgid: int) -> list[ProcessId]:
    """Living processes of a group."""
    members = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) != pgid:
                continue
        except (ProcessLookupError, PermissionError):
            continue
        if member := identify(pid):
            members.append(member)
    return members


def owned_group(pgid: int, recorded: Iterable[ProcessId]) -> list[ProcessId]:
    """Living members of group `pgid` if it still is the one in which `recorded` were seen, else nothing."""
    members = group_members(pgid)
    return members if set(members) & set(recorded) else []


def shared_memory(members: Iterable[ProcessId]) -> set[str]:
    """Files in /dev/shm that these processes have mapped: what a SIGKILL would leave behind."""
    found: set[str] = set()
    for member in members:
        try:
            maps = Path(f"/proc/{member.pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        found.update(line[line.index("/dev/shm/") :] for line in maps.splitlines() if "/dev/shm/" in line)  # noqa: S108
    return {path for path in found if not path.endswith(" (deleted)")}


def stop_group(pgid: int, recorded: Iterable[ProcessId], term_wait_s: float) -> str:
    """Ends a whole group: SIGTERM to its leader, a wait, SIGKILL to what is left. Blocks; says what it took.

    The leader alone gets SIGTERM (all do where it is gone), since vLLM's server ends its own processes in order. Shared
    memory that only they had mapped is removed after a SIGKILL.
    """
    recorded = set(recorded)
    members = owned_group(pgid, recorded)
    if not members:
        return GONE
    segments = shared_memory(members)
    leaders = [member for member in members if member.pid == pgid]
    for member in leaders or members:
        _signal(member, signal.SIGTERM)
    how = "stopped"
    if not _wait_gone(pgid, {*recorded, *members}, term_wait_s):
        how = "killed"
        members = owned_group(pgid, {*recorded, *members})
        segments |= shared_memory(members)
        kill_members(members)
    remove_segments(segments)
    return how


def kill_members(members: list[ProcessId]) -> None:
    """SIGKILL, Python's resource trackers last: they remove what the others leave in /dev/shm, and then end."""
    trackers = [member for member in members if _is_tracker(member)]
    others = [member for member in members if member not in trackers]
    for member in others:
        _signal(member, signal.SIGKILL)
    wait_all(others, KILL_WAIT_S)
    if not wait_all(trackers, TRACKER_WAIT_S):
        for member in trackers:
            _signal(member, signal.SIGKILL)
        wait_all(trackers, KILL_WAIT_S)


def remove_segments(segments: Iterable[str]) -> None:
    """Unlinks shared memory that nobody maps any more."""
    leftover = {segment for segment in segments if Path(segment).exists()}
    if not leftover:
        return
    in_use = shared_memory(member for pid in psutil.pids() if (member := identify(pid)))
    for segment in leftover - in_use:
        Path(segment).unlink(missing_ok=True)


def wait_all(members: Iterable[ProcessId], wait_s: float) -> bool:
    """True once all are gone, False after `wait_s`. Zombies count as gone: their parent reaps them."""
    deadline_s = time.monotonic() + wait_s
    while any(member.alive() for member in members):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def _wait_gone(pgid: int, recorded: set[ProcessId], wait_s: float) -> bool:
    deadline_s = time.monotonic() + wait_s
    while owned_group(pgid, recorded):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def _signal(member: ProcessId, number: signal.Signals) -> None:
    if member.alive():
        with contextlib.suppress(ProcessLookupError):  # ended between the two lines
            os.kill(member.pid, number)


def _is_tracker(member: ProcessId) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{member.pid}/cmdline").read_bytes()
    except OSError:
        return False


class Child:
    """One running service. Owns its process object and log pipe. Made in the main thread, whose end its parent's is."""

    def __init__(self, spec: ServiceSpec, extra_env: dict[str, str], log_max_bytes: int = LOG_MAX_BYTES) -> None:
        """Starts it, in a session of its own, with its output in a fresh log file. OSError if that can't be done."""
        self._log = LogPipe(Path(spec.log), log_max_bytes)
        try:
            self._process = subprocess.Popen(
                spec.argv,
                env={**os.environ, **spec.env, **extra_env},
                stdin=subprocess.DEVNULL,
                stdout=self._log.write_end,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call
            )
        except OSError:
            self._log.close()
            raise
        self._log.close_write_end()
        self._reaped = False
        self.pgid = self._process.pid
        leader = identify(self.pgid)
        self.recorded: set[ProcessId] = {leader} if leader else set()  # all processes seen in its group

    def exit_code(self) -> int | None:
        """None while it runs. Reaps it; from then on its log holds its last words."""
        code = self._process.poll()
        if code is not None and not self._reaped:
            self._reaped = True
            self._log.drain(LAST_WORDS_S)
        return code

    def look(self) -> tuple[ProcessId, ...]:
        """Notes which processes are in the group now, so that they are known when the leader is gone."""
        self._log.keep()
        members = group_members(self.pgid) if self.exit_code() is None else owned_group(self.pgid, self.recorded)
        self.recorded.update(members)
        return tuple(sorted(members, key=lambda member: member.pid))

    def stop(self, term_wait_s: float) -> str:
        """Ends the whole group and reaps the child. Blocks for `term_wait_s` and some seconds at most."""
        try:
            self.look()
            return stop_group(self.pgid, self.recorded, term_wait_s)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(KILL_WAIT_S)
            self._log.drain(LAST_WORDS_S)
            self._log.close()


def _die_with_parent() -> None:
    """In the child, before exec: SIGTERM when the supervisor dies, however it dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log file, nothing if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            return file.read().decode(errors="replace").rstrip().splitlines()[-count:]
    except OSError:
        return []


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP are taken as Ctrl+C is."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
