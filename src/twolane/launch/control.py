"""What the commands do: start the supervisor and watch it (`up`), end what runs (`down`), tell what runs (`status`)."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twolane.config import Settings
from twolane.errors import StartError
from twolane.launch.logpipe import LogPipe
from twolane.launch.phases import GIVEN_UP, READY
from twolane.launch.plan import Plan, plan_file, save_plan
from twolane.launch.process import GONE, identify, last_lines, stop_group, wait_all
from twolane.launch.state import ServiceState, State, read_state
from twolane.launch.supervisor import INSTANCE_STOP_S, PROXY_STOP_S, RUN_DIR_PREFIX
from twolane.launch.upkeep import Wish, leave_wish

POLL_S = 0.1
SUPERVISOR_START_S = 20.0
SUPERVISOR_STOP_S = PROXY_STOP_S + INSTANCE_STOP_S + 20.0
LEFTOVER_STOP_S = 5.0


Show = Callable[[list[ServiceState]], None]


class Files:
    """Where a run keeps its own files, below the state folder."""

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.state_dir
        self.state = self.folder / "state.json"
        self.plan = plan_file(self.state)
        self.lock = self.folder / "lock"
        self.supervisor_log = settings.log_dir / "supervisor.log"


@contextmanager
def exclusive(files: Files) -> Iterator[None]:
    """Only one command that changes what runs in a folder at a time. StartError if another one is at work."""
    files.folder.mkdir(parents=True, exist_ok=True)
    with files.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("another `twolane` command is at work in this folder: wait until it is done") from None
        yield


def running(files: Files) -> State | None:
    """The state of what runs now; None if there is no living supervisor."""
    state = read_state(files.state)
    return state if state and state.supervisor.alive() else None


def start_supervisor(plan: Plan, files: Files) -> None:
    """Starts `twolane supervise` in the background. It reads the plan file and writes the state file."""
    files.state.unlink(missing_ok=True)
    save_plan(plan, files.plan)
    try:
        log = LogPipe(files.supervisor_log, plan.log_max_bytes)
    except OSError as error:
        folder = files.supervisor_log.parent
        raise StartError(f"no log can be written in {folder}: {error}; another folder: TWOLANE_LOG_DIR") from error
    try:
        pid = _spawn_detached(files, log.write_end)
    finally:
        log.close()
    try:
        _await_first_word(files, pid)
    except KeyboardInterrupt:  # nothing tells yet that it is there, so nobody else would end it
        if me := identify(pid):
            os.kill(pid, signal.SIGTERM)
            wait_all([me], SUPERVISOR_STOP_S)
        raise


def _await_first_word(files: Files, pid: int) -> None:
    deadline_s = time.monotonic() + SUPERVISOR_START_S
    while running(files) is None:
        if identify(pid) is None or time.monotonic() > deadline_s:
            tail = "\n".join(last_lines(files.supervisor_log, 20))
            raise StartError(f"the supervisor did not start; its log is {files.supervisor_log}:\n{tail}")
        time.sleep(POLL_S)


def ask(files: Files, state: State, wish: Wish) -> None:
    """Tells the supervisor; returns at once."""
    leave_wish(wish, files.state)
    os.kill(state.supervisor.pid, signal.SIGHUP)


def ask_restart(files: Files, state: State, names: list[str], drain_s: float) -> None:
    """Tells the supervisor to start these services again; returns at once."""
    ask(files, state, Wish(uuid.uuid4().hex, drain_s, restart=tuple(names)))


def ask_scale(files: Files, state: State, target: Plan, drain_s: float) -> str:
    """Tells the supervisor what shall run from now on; returns at once, with the wish's id."""
    wish = Wish(uuid.uuid4().hex, drain_s, target=target)
    ask(files, state, wish)
    return wish.id


def await_scaled(files: Files, wish_id: str, old: set[str], target: Plan, show: Show) -> State:
    """Until what shall go is gone and what is new is ready. StartError if an instance didn't start, or all is ended.

    `old`: names of the services that were there before.
    """
    wanted = {spec.name for spec in target.services}
    while True:
        state = running(files)
        if state is None or state.overall != "up":
            raise StartError("the supervisor was stopped meanwhile")
        if state.wish == wish_id:
            show(state.services)
            phases = {service.name: service.phase for service in state.services}
            fresh = [phases[name] for name in wanted - old if name in phases]
            if phases.keys() <= wanted and all(phase == READY for phase in fresh):
                break
        time.sleep(POLL_S)
    if state.error:
        raise StartError("\n".join([state.error, *("    " + line for line in state.error_log)]))
    return state


def await_ready(files: Files, names: set[str], old_pids: dict[str, int], show: Show) -> None:
    """Until these services are ready as other processes than before. StartError if one is given up, or all is ended."""
    while True:
        state = running(files)
        if state is None or state.overall != "up":
            raise StartError("the supervisor was stopped meanwhile")
        show(state.services)
        mine = [service for service in state.services if service.name in names]
        if gone := sorted(names - {service.name for service in mine}):
            raise StartError(state.error or f"{gone[0]} was taken away by `twolane scale`")
        fresh = [service for service in mine if service.pid != old_pids.get(service.name)]
        for service in fresh:
            if service.phase == GIVEN_UP:
                raise StartError(f"{service.name} was given up: {service.reason}; its log is {service.log}")
        if len(fresh) == len(names) and all(service.phase == READY for service in fresh):
            return
        time.sleep(POLL_S)


def _spawn_detached(files: Files, log_write_end: int) -> int:
    """In a session of its own, with nothing of this process's terminal. It outlives this process."""
    argv = [sys.executable, "-m", "twolane.cli", "supervise", "--state-dir", str(files.folder)]
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log_write_end, 1),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(sys.executable, argv, os.environ, file_actions=streams, setsid=True)


def await_start(files: Files, show: Show) -> State:
    """Until all services are ready. StartError with the reason and the failed service's last lines if they won't be."""
    while True:
        state = read_state(files.state)
        if state is None or (not state.supervisor.alive() and state.overall != "failed"):
            tail = "\n".join(last_lines(files.supervisor_log, 20))
            raise StartError(f"the supervisor ended while it was starting; its log is {files.supervisor_log}:\n{tail}")
        show(state.services)
        if state.overall == "failed":
            raise StartError("\n".join([state.error, *("    " + line for line in state.error_log)]))
        if state.overall == "up":
            return state
        if state.overall in {"stopping", "stopped"}:
            raise StartError("stopped while it was starting, by `twolane down`")
        time.sleep(POLL_S)


def stop_all(files: Files) -> list[str]:
    """Ends everything that runs here or was left over; says what it did, a line each. Nothing to do: an empty list."""
    state = read_state(files.state)
    if state is None:
        return []
    report = []
    if state.supervisor.alive():
        os.kill(state.supervisor.pid, signal.SIGTERM)
        if not wait_all([state.supervisor], SUPERVISOR_STOP_S):
            os.kill(state.supervisor.pid, signal.SIGKILL)
            wait_all([state.supervisor], LEFTOVER_STOP_S)
            report.append("supervisor: killed, it did not end in time")
        before, state = state, read_state(files.state)
        if state is None:  # another `down`, or an `up --foreground` that saw its end, was faster
            return report + [f"{service.name}: stopped" for service in before.services if service.pid]
    if state.overall in {"stopped", "failed"}:
        report += [f"{service.name}: {service.phase}" for service in state.services if service.pid]
    report += _stop_leftovers(state)
    _remove_run_dir(state)
    files.state.unlink(missing_ok=True)
    return report


def _stop_leftovers(state: State) -> list[str]:
    """Ends what a supervisor that was killed left behind, checked by pid and start time."""
    report = []
    for service in sorted(state.services, key=lambda service: service.role != "proxy"):
        if not service.members:
            continue
        how = stop_group(service.pgid, service.members, LEFTOVER_STOP_S)
        report.append(f"{service.name}: {'ended with its supervisor' if how == GONE else how}")
    return report


def _remove_run_dir(state: State) -> None:
    run_dir = Path(state.run_dir)
    if run_dir.name.startswith(RUN_DIR_PREFIX) and run_dir.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(run_dir, ignore_errors=True)
