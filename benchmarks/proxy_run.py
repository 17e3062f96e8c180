"""A proxy process on a core of its own, with mock instances on the other: for benchmarks/proxy.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import psutil
from benchmarks.proxy_peers import Peer, Ports

PROXY_CORE, LOAD_CORE = 0, 1
START_TIMEOUT_S = 300.0


def free_ports() -> Ports:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(5)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return Ports(*(s.getsockname()[1] for s in sockets))


@contextmanager
def process(argv: list[str], core: int, log: Path) -> Iterator[psutil.Process]:
    """On one core, with its output in `log`; ended with its children."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        child = subprocess.Popen(["taskset", "-c", str(core), *argv], stdout=output, stderr=output, env=env)
    watched = psutil.Process(child.pid)
    try:
        yield watched
    finally:
        family = [*watched.children(recursive=True), watched] if child.poll() is None else []
        for member in family:
            member.terminate()
        _, alive = psutil.wait_procs(family[:-1], timeout=5)
        for member in alive:
            member.kill()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Candidate:
    """A running proxy with mock instances of its own."""

    def __init__(self, peer: Peer, ports: Ports, proxy: psutil.Process) -> None:
        self.peer = peer
        self.ports = ports
        self.proxy = proxy

    def cpu_s(self) -> float:
        return sum(map(cpu_s, [self.proxy, *self.proxy.children(recursive=True)]))

    def rss_mb(self) -> float:
        family = [self.proxy, *self.proxy.children(recursive=True)]
        rss_bytes: int = sum(member.memory_info().rss for member in family)
        return rss_bytes / 1e6


def cpu_s(process: psutil.Process) -> float:
    """User and system time of all threads, to the nanosecond; in ticks of 10 ms where the kernel keeps no schedstat."""
    try:
        threads = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9 if threads else ticks_s(process)
    except OSError:  # a thread that ended meanwhile
        return ticks_s(process)


def ticks_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def candidate(peer: Peer, cache: Path) -> Iterator[Candidate]:
    home = peer.install(cache)
    ports = free_ports()
    mock = [sys.executable, str(Path(__file__).with_name("proxy_mock.py")), str(ports.prefill), str(ports.decode)]
    if peer.kind:
        mock.append(f"{ports.discovery}={peer.kind}")
    with process(mock, LOAD_CORE, home / "mock.log"):
        wait_for_port(ports.decode)
        with process(peer.argv(home, ports), PROXY_CORE, home / "proxy.log") as proxy:
            made = Candidate(peer, ports, proxy)
            wait_until_it_serves(made)
            yield made


def wait_for_port(port: int) -> None:
    give_up_at = monotonic() + START_TIMEOUT_S
    while monotonic() < give_up_at:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")


def wait_until_it_serves(made: Candidate) -> None:
    give_up_at = monotonic() + START_TIMEOUT_S
    body = json.dumps({"model": "mock", "prompt": "hello", "max_tokens": 1}).encode()
    url = f"http://127.0.0.1:{made.ports.http}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while monotonic() < give_up_at and made.proxy.is_running() and made.proxy.status() != psutil.STATUS_ZOMBIE:
        try:
            with opener.open(request, timeout=5) as answer:
                if b'"choices"' in answer.read():
                    return
        except OSError:
            pass
        sleep(0.2)
    raise TimeoutError(f"{made.peer.name} does not serve; see its proxy.log in the cache folder")
