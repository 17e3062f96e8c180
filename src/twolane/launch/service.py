"""One service as the supervisor sees it: its child, its entry in the state file, and how far it has come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from pathlib import Path

from twolane.errors import StartError
from twolane.launch.diagnose import diagnose
from twolane.launch.logs import Follower
from twolane.launch.phases import FIRST_ANSWER, IMPORTING, READY, REGISTERING, next_phase
from twolane.launch.plan import ServiceSpec
from twolane.launch.process import Child, last_lines
from twolane.launch.state import ServiceState

TAIL_LINES = 20
DIAGNOSED_LINES = 200
PROBED = {FIRST_ANSWER, REGISTERING, READY}  # what the supervisor has found out; older log lines don't change it
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
STEADY_AFTER_S = 60.0  # ready for this long, and the next restart begins with the shortest wait again


class ServiceError(StartError):
    """A child ended while it was starting, or did not get ready in time. `log` holds its last lines."""

    def __init__(self, message: str, log: list[str]) -> None:
        super().__init__(message)
        self.log = log


class Service:
    """Mutates its `state` (which the supervisor writes to the file) and its child. Everything here is synchronous."""

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.child: Child | None = None
        self.changed = True  # the state file does not show the last change yet
        self.state = ServiceState(
            name=spec.name,
            role=spec.role,
            http_port=spec.http_port,
            log=spec.log,
            kv_port=spec.kv_port,
            gpus=spec.gpus,
            host=spec.host,
        )
        self.restart_wanted = asyncio.Event()  # somebody asks for a restart
        self.drain_s = 0.0  # what it has for its requests then
        self.is_instance = spec.role != "proxy"
        self.is_placed = True  # `spec` says where it is now
        self.life: asyncio.Task[None] | None = None  # keeps it running, or, once it is `retiring`, ends it
        self.retiring = False
        self._stopping = threading.Lock()  # a task that is cancelled leaves its thread at work
        self._log: Follower | None = None
        self._ready_at_s = 0.0
        self._failures = 0  # since it was last steady
        self._failed_at_s: deque[float] = deque()

    def start(self, temp_dir: Path, log_max_bytes: int) -> None:
        """Starts the child; its sockets and temporary files go into `temp_dir`."""
        temp_dir.mkdir(parents=True, exist_ok=True)
        env = {"TMPDIR": str(temp_dir), "VLLM_RPC_BASE_PATH": str(temp_dir)}
        try:
            self.child = Child(self.spec, env, log_max_bytes)
        except OSError as error:
            raise StartError(f"{self.spec.name} can't be started: {error}") from error
        self.state.pid = self.state.pgid = self.child.pgid
        self.state.members = sorted(self.child.recorded, key=lambda member: member.pid)
        self._follow(Path(self.spec.log))
        self.enter(IMPORTING if self.spec.role != "proxy" else "starting")

    def _follow(self, log: Path) -> None:
        if self._log:
            self._log.close()
        self._log = Follower("", log, from_start=True)

    def enter(self, phase: str) -> None:
        if phase != self.state.phase:
            self.state.phase, self.state.since, self.changed = phase, time.time(), True
            if phase == READY:
                self._ready_at_s = time.monotonic()
            self.look()

    def look(self) -> None:
        """Notes the processes of its group."""
        if self.child and (members := list(self.child.look())) and members != self.state.members:
            self.state.members, self.changed = members, True

    def read_log(self) -> None:
        """Follows what the child has written since the last call."""
        fresh = self._log.read() if self._log else []
        if self.spec.role != "proxy" and self.state.phase not in PROBED:
            self.enter(next_phase(self.state.phase, fresh))

    def check_alive(self) -> None:
        """ServiceError if the child has ended."""
        code = self.exit_code()
        if code is not None:
            raise self.error(f"ended while it was starting, {self.ending()}")

    def error(self, what: str) -> ServiceError:
        log = last_lines(Path(self.spec.log), DIAGNOSED_LINES)
        known = diagnose(log)
        message = f"{self.spec.name} {what}; its log is {self.spec.log}" + (f"\n  reason: {known}" if known else "")
        return ServiceError(message, log[-TAIL_LINES:])

    def note_failure(self, reason: str, within_s: float) -> int:
        """How often it has failed within the last `within_s`, this time included."""
        now_s = time.monotonic()
        self._failed_at_s.append(now_s)
        while self._failed_at_s[0] < now_s - within_s:
            self._failed_at_s.popleft()
        known = diagnose(last_lines(Path(self.spec.log), DIAGNOSED_LINES))
        self.state.reason, self.changed = known or reason, True
        return len(self._failed_at_s)

    def forgive(self) -> None:
        """Past failures count no more."""
        self._failed_at_s.clear()
        self._failures = 0
        self.state.reason, self.changed = "", True

    def clear(self, term_wait_s: float, *, for_good: bool) -> str:  # noqa: ARG002 - see RemoteService
        """After its end, or (`for_good`) to end it: nothing of it is left. Blocks."""
        return self.stop(term_wait_s)

    def exit_code(self) -> int | None:
        code = self.child.exit_code() if self.child else None
        if code is not None and code != self.state.exit_code:
            self.state.exit_code, self.changed = code, True
        return code

    def ending(self) -> str:
        """How it has ended, in words."""
        code = self.exit_code()
        assert code is not None
        return describe_exit(code)

    def stop(self, term_wait_s: float) -> str:
        """Ends its group. Blocks."""
        with self._stopping:
            return self.child.stop(term_wait_s) if self.child else "was not started"

    def backoff_s(self) -> float:
        """How long to wait before the restart that is due now."""
        if self._ready_at_s and time.monotonic() - self._ready_at_s > STEADY_AFTER_S:
            self._failures = 0
        self._ready_at_s = 0.0
        self._failures += 1
        return BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1]


def describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"with exit code {code}"
