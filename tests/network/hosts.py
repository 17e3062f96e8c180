"""Hosts made of network namespaces, and a network between them that can be slow, lossy, or cut.

The network is a thread of the test: each host has a TUN device, whose packets the thread passes on when it likes. The
kernel's own way (tc netem) isn't built into every kernel. Namespaces have no name: they end with the processes in them,
and those end with the test's, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
SUBNET = "10.77.0.0/24"
_START_S = 30.0
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why hosts can't be made here; empty: they can."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"needs root, for network namespaces: {tried.stderr.strip()}"


def enter(namespace: str) -> None:
    """This thread's sockets, and those of threads and processes that it makes, belong to that host from now on."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", namespace)
    finally:
        os.close(fd)


def made_in(namespace: str, make: Callable[[], T]) -> T:
    """For contract.target.TargetProcess: a child that lives on that host."""
    enter(namespace)
    return make()


def called_in(namespace: str, function: Callable[[], T]) -> T:
    """Calls it on that host; what it raises is raised here."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            enter(namespace)
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - passed on
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Host:
    """A namespace, held by a process that ends when this one does. Owns its end of the network."""

    def __init__(self, number: int, mtu: int) -> None:
        self.address = SUBNET.replace("0/24", str(number))
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.namespace = f"/proc/{self._holder.pid}/ns/net"
        self.tun = -1
        try:
            self._set_up(mtu)
        except BaseException:
            self.close()
            raise

    def _set_up(self, mtu: int) -> None:
        deadline_s = time.monotonic() + _START_S
        own = Path("/proc/thread-self/ns/net").readlink()
        while Path(self.namespace).readlink() == own:
            assert time.monotonic() < deadline_s, "unshare doesn't come to its end"
            time.sleep(0.005)
        self.tun = self.call(self._open_tun)
        for words in (f"addr add {self.address}/24 dev lane", f"link set lane mtu {mtu} up", "link set lo up"):
            subprocess.run(self.argv("ip", *words.split()), check=True)

    @staticmethod
    def _open_tun() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"lane", _IFF_TUN | _IFF_NO_PI))
        return fd

    def argv(self, *words: str) -> list[str]:
        """A command, run on this host."""
        return ["nsenter", f"--net={self.namespace}", "--", *words]

    def call(self, function: Callable[[], T]) -> T:
        """Calls it on this host; what it raises is raised here."""
        return called_in(self.namespace, function)

    def close(self) -> None:
        """What still runs on the host loses its network, and the namespace ends with it."""
        if self.tun >= 0:
            os.close(self.tun)
            self.tun = -1
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(_START_S)


@dataclass
class Weather:
    """What the network is like. `delay_s`: one way."""

    delay_s: float = 0.0
    loss: float = 0.0
    is_cut: bool = False


class Network:
    """Some hosts, and the thread that carries their packets. `weather` may be changed at any time; a packet meets that
    of the moment when it sets out, and is lost if the network is cut when it should arrive."""

    def __init__(self, num_hosts: int, *, mtu: int = 1500, seed: int = 1) -> None:
        self.weather = Weather()
        self.num_lost = 0
        self.num_carried = 0
        self.hosts: list[Host] = []
        self._random = random.Random(seed)
        self._on_the_way: list[tuple[float, int, int, bytes]] = []  # (when it arrives, number, to which host, packet)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="test-network", daemon=True)
        try:
            for number in range(1, num_hosts + 1):
                self.hosts.append(Host(number, mtu))
        except BaseException:
            self._close_hosts()
            raise
        self._thread.start()

    def _run(self) -> None:
        fds = {host.tun: host for host in self.hosts}
        while True:
            timeout_s = max(0.0, self._on_the_way[0][0] - time.monotonic()) if self._on_the_way else None
            ready, _, _ = select.select([*fds, self._stop_read], [], [], timeout_s)
            if self._stop_read in ready:
                return
            for fd in ready:
                self._take_from(fd)
            while self._on_the_way and self._on_the_way[0][0] <= time.monotonic():
                _, _, number, packet = heapq.heappop(self._on_the_way)
                self._deliver(number, packet)

    def _take_from(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(fd, 65536)
                to_host = packet[19] if packet[0] >> 4 == 4 else 0
                if not 1 <= to_host <= len(self.hosts):
                    continue  # IPv6's neighbour discovery
                if self._random.random() < self.weather.loss:
                    self.num_lost += 1
                    continue
                self.num_carried += 1
                due_s = time.monotonic() + self.weather.delay_s
                heapq.heappush(self._on_the_way, (due_s, self.num_carried, to_host, packet))

    def _deliver(self, number: int, packet: bytes) -> None:
        if self.weather.is_cut:
            self.num_lost += 1
        else:
            with contextlib.suppress(OSError):  # its queue is full: lost, as in any network
                os.write(self.hosts[number - 1].tun, packet)

    def _close_hosts(self) -> None:
        for host in self.hosts:
            host.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        self._close_hosts()
