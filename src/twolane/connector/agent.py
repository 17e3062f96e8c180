"""The thread beside vLLM's engine that owns a worker's sockets. Base of the prefill and the decode agent.

Engine thread and agent thread meet in one lock, `self.lock`, which guards an agent's side (the conversation and the
state machines). It is held for one slot's copy at most, some milliseconds.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod

import zmq

from twolane.connector.host import open_pidfd
from twolane.connector.register import Registrar
from twolane.connector.stats import Counters, Counts
from twolane.protocol import Load

# vLLM configures the logger "vllm" in its processes, nobody the root logger: only below "vllm" are we seen.
logger = logging.getLogger("vllm.twolane")

TICK_MS = 200  # how often deadlines are looked at; every deadline is seconds

# How long a thread that computes in Python may keep the interpreter while another wants it. Python's 5 ms are as long
# as a step of D: word of the last byte waited that long for P's engine to finish its bookkeeping (docs/LOG.md). It
# changes hands four times on the way of that word.
SWITCH_INTERVAL_S = 0.00005


class Agent(ABC):
    """Life: `start`, engine-thread calls, `stop`. Sockets belong to the agent thread alone; the engine thread queues
    what it wants sent in the subclass's state and calls `wake`."""

    def __init__(self, name: str, registrar: Registrar | None, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Takes ownership of `registrar` and `context`."""
        self.lock = threading.Lock()
        self.context = context
        self.poller = zmq.Poller()
        self._registrar = registrar
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._fatal: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._pidfds: dict[int, bytes | str] = {}  # descriptor -> peer
        self._deadline_s: float | None = None

    # -- engine thread

    def start(self) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self.poller.register(self._wake_fd, zmq.POLLIN)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and closes all it owns. Nothing is read or written afterwards."""
        if self._thread.is_alive():
            self._stopping = True
            self.wake()
            self._thread.join(timeout_s)

    def wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def check(self) -> None:
        """Raises in the engine's thread what killed the agent's: an instance without its agent would only hang."""
        if self._fatal is not None:
            raise RuntimeError("TwoLane's transfer thread died; this instance can't go on") from self._fatal

    def tell_load(self, load: Load | None) -> None:
        """For the next registration, which comes the sooner the more it changed."""
        if self._registrar is not None:
            self._registrar.load = load

    def take_counts(self) -> Counts:
        """What was counted since the last call, without what didn't."""
        with self.lock:
            return self.take_counters().nonzero()

    @abstractmethod
    def take_counters(self) -> Counters:
        """What the side counted since the last call. Under the lock."""

    # -- agent thread

    @abstractmethod
    def on_readable(self, ready: dict[object, int]) -> None:
        """Handles what the poller reported (socket or descriptor -> events). Takes the lock itself."""

    @abstractmethod
    def on_tick(self, now_s: float) -> float | None:
        """Deadlines, transfers, and the messages that are to be sent. Takes the lock itself. Returns when it must be
        called again at the latest, if sooner than usual."""

    @abstractmethod
    def on_peer_death(self, peer: bytes | str) -> None:
        """The process behind `peer` is dead. Takes the lock itself."""

    @abstractmethod
    def close(self) -> None:
        """Closes sockets and transports; the last thing the thread does."""

    def tell_proxy(self, problem: str) -> None:
        """What the proxy shows beside this instance; empty: no trouble. Under the lock."""
        if self._registrar is not None:
            self._registrar.problem = problem

    def watch_process(self, peer: bytes | str, pid: int, host: str) -> None:
        """Raises ProcessLookupError if it is dead already."""
        pidfd = open_pidfd(pid, host)
        if pidfd is not None:
            self._pidfds[pidfd] = peer
            self.poller.register(pidfd, zmq.POLLIN)

    def unwatch_process(self, peer: bytes | str) -> None:
        for pidfd in [fd for fd, watched in self._pidfds.items() if watched == peer]:
            self.poller.unregister(pidfd)
            del self._pidfds[pidfd]
            os.close(pidfd)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self._fatal = error
            logger.exception("twolane agent died")
        finally:
            self._close_all()

    def _turn(self) -> None:
        ready = dict(self.poller.poll(self._patience_ms()))
        if ready.pop(self._wake_fd, 0):
            os.eventfd_read(self._wake_fd)
        for pidfd in [fd for fd in ready if fd in self._pidfds]:
            del ready[pidfd]
            peer = self._pidfds[pidfd]
            self.unwatch_process(peer)
            self.on_peer_death(peer)
        if ready:
            self.on_readable(ready)
        now_s = time.monotonic()
        self._deadline_s = self.on_tick(now_s)
        if self._registrar is not None:
            self._registrar.tick(now_s)

    def _patience_ms(self) -> int:
        if self._deadline_s is None:
            return TICK_MS
        return max(0, min(TICK_MS, int((self._deadline_s - time.monotonic()) * 1000) + 1))

    def _close_all(self) -> None:
        with self.lock:
            if self._registrar is not None:
                self._registrar.close()
            self.close()
            for pidfd in self._pidfds:
                os.close(pidfd)
            self.context.destroy(linger=200)  # ms, for the registrar's last words
