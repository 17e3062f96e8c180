"""Asks the GPUs for their power, over and over, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from twolane.power.lanes import Member, Meters, Sample
from twolane.power.nvml import Driver

logger = logging.getLogger(__name__)

EVERY_S = 0.1
UNWATCHED_EVERY_S = 1.0
STALE_S = 10.0  # a driver that hangs tells nothing any more
_STOP_TIMEOUT_S = 5.0

Sink = Callable[[Sample], None]


def nobody() -> Sequence[Member]:
    return ()


class Sampler:
    """Owns a thread, which owns the driver and the meters. Whoever calls `start` calls `stop`.

    Takes a sample every `every_s` while somebody watches, else every second. What others do with a sample is theirs to
    do elsewhere: a sink is called in this thread and returns at once. `members` is called there, too.
    """

    def __init__(self, members: Callable[[], Sequence[Member]] = nobody, every_s: float = EVERY_S) -> None:
        self._members = members
        self._watched_every_s = every_s
        self._driver = Driver()
        self._meters = Meters()
        self._latest: Sample | None = None
        self._changed = threading.Condition()  # guards the next three
        self._num_watchers = 0
        self._sinks: tuple[Sink, ...] = ()
        self._stopping = False
        self._decided = threading.Event()
        # A daemon, since a driver that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="twolane-power", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample. Waits for the thread, but not for a driver that hangs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(_STOP_TIMEOUT_S)

    def wait_decided(self, timeout_s: float) -> bool:
        """Until there is a first sample, or none to come. Whether there is one."""
        self._decided.wait(timeout_s)
        return self._latest is not None

    def latest(self) -> Sample | None:
        """Any thread. None if nothing is measured."""
        sample = self._latest
        return None if sample is None or time.monotonic() - sample.at_s > STALE_S else sample

    @property
    def every_s(self) -> float:
        return self._watched_every_s if self._num_watchers else max(UNWATCHED_EVERY_S, self._watched_every_s)

    @contextmanager
    def watched(self, sink: Sink | None = None) -> Iterator[None]:
        """Samples come at the full pace meanwhile, to `sink`, too, if there is one. Any thread."""
        self._watch(1, sink)
        try:
            yield
        finally:
            self._watch(-1, sink)

    def _watch(self, more: int, sink: Sink | None) -> None:
        with self._changed:
            self._num_watchers += more
            if sink is not None:
                others = tuple(other for other in self._sinks if other != sink)
                self._sinks = (*others, sink) if more > 0 else others
            self._changed.notify()

    def _run(self) -> None:
        try:
            why_not = self._driver.open()
            if why_not:
                logger.info('power is not measured reason="%s"', why_not)
                return
            while self._take_and_wait():
                pass
        except Exception:  # the thread's end: power is told of, never needed
            logger.exception("power is not measured any more")
        finally:
            self._latest = None
            self._decided.set()
            self._driver.close()

    def _take_and_wait(self) -> bool:
        """One sample, and the time to the next. False when that was the last."""
        stopping, every_s, sinks = self._stopping, self.every_s, self._sinks
        at_s, time_s = time.monotonic(), time.time()
        readings = self._driver.read()
        self._latest = self._meters.take(readings, self._members(), at_s, time_s, every_s) if readings else None
        self._decided.set()
        if self._latest is not None:
            for sink in sinks:
                sink(self._latest)
        with self._changed:
            while not self._stopping and (left_s := at_s + self.every_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
        return not stopping
