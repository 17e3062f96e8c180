"""Instructions that a proxy executes for a request, counted by valgrind's callgrind: for benchmarks/proxy.py.

The same on a busy machine as on a quiet one, to within 0.5 %, so it tells differences that no clock tells. It doesn't
see what instructions cost: cache misses, system calls. Some 50 times slower than the real thing, so what the proxy does
every second would weigh 50 times too much: an idle time as long as the load's is counted too, and taken off.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import uvloop
from benchmarks.proxy_load import Load, run
from benchmarks.proxy_peers import Peer, Ports
from benchmarks.proxy_run import Candidate, candidate

WARM_UP_REQUESTS = 200
# Requests, at once, tokens, ms between two: what is read together must not depend on the speed of the machine.
LOADS = {"1 token, one at a time": (1000, 1, 1, 0.0), "16 tokens, each read alone": (64, 8, 16, 100.0)}
_TOTAL = re.compile(rb"^(?:summary|totals): (\d+)", re.MULTILINE)


def under_callgrind(peer: Peer) -> Peer:
    """The same, counted. A fixed hash seed, so that sets and dicts lie the same in every run."""

    def argv(home: Path, ports: Ports) -> list[str]:
        plain = peer.argv(home, ports)
        python = plain.index(sys.executable)
        counted = ("valgrind", "--tool=callgrind", "--callgrind-out-file=callgrind.out")
        return ["env", "-C", str(home), "PYTHONHASHSEED=0", *plain[:python], *counted, *plain[python:]]

    return Peer(f"{peer.name}-counted", argv, kind=peer.kind)


def count(peer: Peer, cache: Path, rounds: int) -> dict[str, list[float]]:
    """Thousands of instructions a request, by load: a figure a round."""
    counted = under_callgrind(peer)
    figures: dict[str, list[float]] = {name: [] for name in LOADS}
    with candidate(counted, cache) as made:
        uvloop.run(run(Load(made.ports.http, WARM_UP_REQUESTS, 8, 16)))
        for number in range(rounds):
            for name, (num_requests, concurrency, num_tokens, pace_ms) in LOADS.items():
                load = Load(made.ports.http, num_requests, concurrency, num_tokens, pace_ms, seed=number)
                figures[name].append(round(_count(made, load, cache / counted.name) / num_requests / 1e3, 1))
    return figures


def _count(made: Candidate, load: Load, home: Path) -> int:
    _control(made, "--zero")
    began_at = monotonic()
    outcome = uvloop.run(run(load))
    assert not outcome.errors, outcome.errors[:1]
    wall_s = monotonic() - began_at
    busy = _dump(made, home)
    sleep(wall_s)
    return busy - _dump(made, home)


def _dump(made: Candidate, home: Path) -> int:
    """What was counted since the last time. Written to a file of its own, which is read and removed."""
    _control(made, "--dump")
    (path,) = home.glob("callgrind.out.*")
    total = _TOTAL.search(path.read_bytes())
    path.unlink()
    assert total is not None, "callgrind wrote no total"
    return int(total[1])


def _control(made: Candidate, what: str) -> None:
    subprocess.run(["callgrind_control", what, str(made.proxy.pid)], check=True, stdout=subprocess.DEVNULL)
