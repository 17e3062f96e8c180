"""The pipe that a service writes its log to, and the process at its other end (logwriter.py)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from twolane.launch import logwriter

POLL_S = 0.01
LOG_MAX_BYTES = 100_000_000


class LogPipe:
    """Owns the pipe and its writer, which is started again if somebody kills it: meanwhile the pipe holds the lines.

    Give `write_end` to the child, then call `close_write_end`: the writer ends with the last process that has it.
    """

    def __init__(self, log: Path, max_bytes: int = LOG_MAX_BYTES) -> None:
        """Begins a fresh file. OSError if that can't be done."""
        log.parent.mkdir(parents=True, exist_ok=True)
        logwriter.rotate(str(log))
        log.touch()
        self._argv = [sys.executable, "-I", "-S", logwriter.__file__, str(log.absolute()), str(max_bytes)]
        self._read_end, self.write_end = os.pipe()
        self._start()

    def _start(self) -> None:
        self._exit_code: int | None = None
        streams = [
            (os.POSIX_SPAWN_DUP2, self._read_end, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # In a session of its own: what ends the service's group, or this process, doesn't end it.
        self._pid = os.posix_spawn(sys.executable, self._argv, os.environ, file_actions=streams, setsid=True)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def keep(self) -> None:
        """Starts the writer again if it was killed."""
        if self._read_end >= 0 and self._ended() and self._exit_code:
            self._start()

    def drain(self, wait_s: float) -> bool:
        """Waits until all that was written is in the file. False if some process still has the pipe after `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        while not self._ended():
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(POLL_S)
        return True

    def close(self) -> None:
        """This process's ends. The writer goes on as long as somebody writes."""
        self.close_write_end()
        if self._read_end >= 0:
            os.close(self._read_end)
            self._read_end = -1

    def _ended(self) -> bool:
        if self._exit_code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code is not None
