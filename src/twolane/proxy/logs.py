"""A log handler for a line a request: written in batches, a system call for many lines."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TextIO

_BATCH_S = 0.1


class BatchingHandler(logging.StreamHandler[TextIO]):
    """Holds lines back for `_BATCH_S` at most while an event loop runs; a warning takes all before it along at once.

    `logging.shutdown`, at the interpreter's end, flushes the rest. A SIGKILL costs the last batch.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
            if len(self._lines) == 1 or record.levelno >= logging.WARNING:
                self._write_or_wait(record)
        except Exception:  # noqa: BLE001 - the contract of handlers: a log line must not end what it tells of
            self.handleError(record)

    def _write_or_wait(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.flush()
            return
        try:
            asyncio.get_running_loop().call_later(_BATCH_S, self.flush)
        except RuntimeError:  # no loop: nobody would come back
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self.stream.write("\n".join(lines) + "\n")
        super().flush()


class SecondsFormatter(logging.Formatter):
    """Like its base, but works the local time out once a second."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._second = -1
        self._text = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802, ARG002
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._text},{int(record.msecs):03d}"
