"""The end of an instance's log, and what comes after it, for the dashboard."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from twolane.errors import BadRequestError, NotFoundError
from twolane.proxy.pool import Pool
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

MAX_BYTES = 256 * 1024  # of an answer, about
MAX_LINES = 1000
_MAX_LINE_CHARS = 4000
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_POSITION = re.compile(r"(\d{1,20})-(\d{1,15})")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class InstanceLogs:
    """Reads `NAME.log` in the launcher's folder, for NAMEs that instances in the pool have, and the proxy's own."""

    def __init__(self, log_dir: Path | None, pool: Pool) -> None:
        self._log_dir = log_dir
        self._pool = pool

    async def answer(self, request: Request, responder: Responder, rest: str) -> None:
        """`?lines=200` gives the end, `?after=POSITION` what came since the answer that told this position."""
        name = unquote(rest)
        if name != "proxy" and all(instance.name != name for instance in self._pool):
            raise NotFoundError(f"no instance is called {name!r}")
        if self._log_dir is None or not _PLAIN_NAME.fullmatch(name):
            why = f"{name} wasn't started by `twolane up`: its log is where its own terminal or service has it."
            responder.send_json(200, _nothing(why))
            return
        query = parse_qs(request.target.partition(b"?")[2].decode("latin-1"))
        lines, after = query.get("lines", ["200"])[0], query.get("after", [""])[0]
        position = _POSITION.fullmatch(after)
        if not lines.isdecimal() or not 0 < int(lines) <= MAX_LINES or bool(after) != bool(position):
            raise BadRequestError(f"lines is a number up to {MAX_LINES}, after is what the last answer told")
        since = (int(position[1]), int(position[2])) if position else None
        path = self._log_dir / f"{name}.log"
        found = await asyncio.to_thread(read_log, path, int(lines), since)
        responder.send_json(200, found, [(b"cache-control", b"no-store")])


def _nothing(why: str) -> dict[str, Any]:
    return {"lines": [], "position": "", "fresh": True, "missing": why}


def read_log(path: Path, num_lines: int, since: tuple[int, int] | None) -> dict[str, Any]:
    """Whole lines. `since`: inode and offset; if it is another file by now, or far behind, its end is read afresh.
    Blocks while the disk does."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return _nothing(f"There is no log at {path}: {error.strerror}.")
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            return _nothing(f"{path} is no plain file.")
        return _read(file, about, num_lines, since)
    finally:
        os.close(file)


def _read(file: int, about: os.stat_result, num_lines: int, since: tuple[int, int] | None) -> dict[str, Any]:
    inode, offset = since or (0, 0)
    fresh = inode != about.st_ino or not about.st_size - MAX_BYTES <= offset <= about.st_size
    if fresh:
        offset = max(0, about.st_size - MAX_BYTES)
    data = os.pread(file, MAX_BYTES, offset)
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode(errors="replace").split("\n")[:-1]
    if fresh:
        lines = lines[1 if offset else 0 :][-num_lines:]
    return {
        "lines": [_COLOURS.sub("", line)[:_MAX_LINE_CHARS] for line in lines],
        "position": f"{about.st_ino}-{offset + len(whole)}",
        "fresh": fresh,
        "missing": None,
    }
