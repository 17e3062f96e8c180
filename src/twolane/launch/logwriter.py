"""A process of its own that writes one log: what comes through a pipe, rotated by size, no line lost or cut in two.

    python -I -S logwriter.py FILE MAX_BYTES < pipe

It ends when the last writer has closed the pipe, and not before: the supervisor may be killed, and the services still
write their last words. Standard library only, and little of it, since there is one for each service.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

READ_BYTES = 1 << 16


def rotate(path: str) -> None:
    """Keeps one older log beside the new one, with `.1` behind its name."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, path + ".1")  # noqa: PTH105 - this file loads little


class LogFile:
    """One growing file. Owns its descriptor and how much is in it."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._open()

    def pass_on(self, pipe: int) -> bool:
        """Moves what the pipe holds into the file; False at the pipe's end.

        The kernel moves it (splice), so a line is in the pipe or in the file, whenever this process is killed. Only
        around a rotation, and where the kernel won't, it goes through here.
        """
        if self._size_bytes < self._max_bytes:
            with contextlib.suppress(OSError):
                os.lseek(self._file, 0, os.SEEK_END)  # somebody may have cut it
                moved = os.splice(pipe, self._file, READ_BYTES)
                self._size_bytes += moved
                return moved > 0
        chunk = os.read(pipe, READ_BYTES)
        self._write(chunk)
        return bool(chunk)

    def _write(self, chunk: bytes) -> None:
        """Begins a new file where a line ends, once the old one is full."""
        if self._size_bytes + len(chunk) > self._max_bytes and (end := chunk.find(b"\n") + 1):
            self._append(chunk[:end])
            os.close(self._file)
            rotate(self._path)
            self._open()
            chunk = chunk[end:]
        self._append(chunk)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size_bytes = os.fstat(self._file).st_size

    def _append(self, data: bytes) -> None:
        """A full disk loses lines, but never stops the service that writes them."""
        with contextlib.suppress(OSError):
            os.lseek(self._file, 0, os.SEEK_END)
            while data:
                written = os.write(self._file, data)
                self._size_bytes += written
                data = data[written:]


def main(path: str, max_bytes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the writers get those too, and what they say then is worth keeping
    log = LogFile(path, max_bytes)
    while log.pass_on(0):
        pass


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
