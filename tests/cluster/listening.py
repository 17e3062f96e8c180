"""Where a process of another network namespace listens: psutil looks into its own alone."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

import psutil

LISTENS = "0A"


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of each TCP socket on which the process or a child of it listens."""
    found: set[tuple[str, int]] = set()
    for one in (process, *process.children(recursive=True)):
        found |= _of_one(Path(f"/proc/{one.pid}"))
    return found


def _of_one(proc: Path) -> set[tuple[str, int]]:
    own: set[str] = set()
    for descriptor in (proc / "fd").iterdir():
        try:
            own.add(str(descriptor.readlink()))
        except OSError:
            continue  # closed meanwhile
    rows = [line.split() for name in ("tcp", "tcp6") for line in (proc / "net" / name).read_text().splitlines()[1:]]
    return {_address(row[1]) for row in rows if row[3] == LISTENS and f"socket:[{row[9]}]" in own}


def _address(text: str) -> tuple[str, int]:
    """As the kernel writes it: words of 32 bits in the machine's order."""
    host, _, port = text.partition(":")
    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
    return str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))), int(port, 16)
