"""Ends a process group once whoever started it is gone, however it went: SIGTERM by then had its time, SIGKILL now.

A program of its own, standard library only, beside each instance on a Ray node: reaper.py PGID START_TICKS FOLDER.
Its standard input is a pipe that only the actor holds open. FOLDER (temporary files of the group) goes last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

GRACE_S = 10.0
POLL_S = 0.1


def members(pgid: int) -> list[tuple[int, int]]:
    """Pid and start time of each living process of the group."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[2]) == pgid and fields[0] not in (b"Z", b"X"):
                found.append((int(folder.name), int(fields[19])))
    return found


def reap(pgid: int, known: set[tuple[int, int]]) -> None:
    """`known`: processes seen in the group while it was ours. None of them left: the number may be another's now."""
    deadline_s = time.monotonic() + GRACE_S
    while alive := members(pgid):
        if not known & set(alive):
            return
        if time.monotonic() > deadline_s:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pgid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


def main() -> None:
    pgid, ticks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    known = {(pgid, ticks)}
    while sys.stdin.buffer.read(1):  # a byte: look again
        now = set(members(pgid))
        known |= now if known & now else set()
    reap(pgid, known)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
