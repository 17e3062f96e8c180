"""Ports for tests: free, and handed out to no other test of this user, also when pytest runs several times at once.

Below those that the system gives to whoever doesn't name one. A port from there may be another's by the time it is
bound: an engine's for talking to itself. And a D that calls a P which is gone could get that very port for its own end,
be connected to itself, and keep the port from the P that comes back.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from twolane.launch.plan import PORT_STEP

LOWEST, HIGHEST = 12_000, 32_000
CLAIMS = Path(tempfile.gettempdir(), f"twolane-test-ports-{os.getuid()}")

# A lock on the byte at a port's number claims it until this process ends: it may be bound much later. Locks don't keep
# their own process out: it goes through all ports in order before it takes one again.
_claims = CLAIMS.open("w")
_steps = itertools.cycle(range(LOWEST, HIGHEST, PORT_STEP))
next(itertools.islice(_steps, random.Random().randrange(HIGHEST), None))  # others begin elsewhere
_singles: list[int] = []


def free_ports(count: int, room: int = PORT_STEP) -> list[int]:
    """With `room` ports behind each, for the next instances' ports and the other ranks'."""
    found: list[int] = []
    for _ in range(LOWEST, HIGHEST, PORT_STEP):
        ports = _following(room)
        if _claim(ports):
            found.append(ports.start)
        if len(found) == count:
            return found
    raise AssertionError("other tests have all ports")


def free_ports_of(names: Sequence[str]) -> dict[str, str]:
    """For the settings of these names, as an environment; for up to six instances in each lane."""
    return dict(zip(names, map(str, free_ports(len(names), room=6 * PORT_STEP)), strict=True))


def free_port() -> int:
    """One, with no room behind it."""
    if not _singles:
        _singles.extend(range(base := free_ports(1)[0], base + PORT_STEP))
    return _singles.pop()


def _following(room: int) -> range:
    steps = list(itertools.islice(_steps, -(-room // PORT_STEP)))
    return range(steps[0], steps[0] + room) if steps[0] <= steps[-1] else _following(room)


def _claim(ports: range) -> bool:
    try:
        fcntl.lockf(_claims, fcntl.LOCK_EX | fcntl.LOCK_NB, len(ports), ports.start)
    except OSError:
        return False
    return all(_is_free(port) for port in ports)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
