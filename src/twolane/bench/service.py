"""Services that a benchmark starts with TwoLane's own supervisor, and stops whatever happens."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from twolane.config import Settings
from twolane.launch import control
from twolane.launch.plan import Plan
from twolane.launch.ports import check_ports

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_EVERY_S = 0.1
T = TypeVar("T")


@contextmanager
def started(plan: Plan, settings: Settings, show: control.Show) -> Iterator[None]:
    """All of `plan` is ready inside. StartError if it doesn't come up; `show` may raise to end the wait."""
    with launched(plan, settings) as files:
        control.await_start(files, show)
        yield


@contextmanager
def launched(plan: Plan, settings: Settings) -> Iterator[control.Files]:
    """All of `plan` is starting inside: `control.await_start` waits for it.

    `settings` say where its own files lie; what a run that was killed has left there is ended first.
    """
    files = control.Files(settings)
    with control.exclusive(files):
        control.stop_all(files)
        check_ports(plan)
        try:
            control.start_supervisor(plan, files)
            yield files
        finally:
            with undisturbed():
                control.stop_all(files)


def stop_together(running: Sequence[control.Files]) -> None:
    """Ends what was launched, all at the same time; whoever launched it finds nothing left to end."""
    if running:
        with undisturbed(), ThreadPoolExecutor(len(running)) as pool:
            list(pool.map(control.stop_all, running))


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl+C in here: what stops the services is not to be stopped itself. It has deadlines of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """Whether somebody wants it to end: by Ctrl+C, `kill`, or a terminal that is closed. Used as a context.

    Its signal handler raises nothing, since what is raised in a destructor is lost, and the wish with it. So whoever
    waits asks: `check`, and `run` for what is asynchronous.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.wanted = True

    def check(self) -> None:
        """KeyboardInterrupt if it is wanted."""
        if self.wanted:
            raise KeyboardInterrupt

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Like asyncio.run; cancels the work when it is wanted, and raises KeyboardInterrupt."""
        try:
            return asyncio.run(self._guarded(work))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    async def _guarded(self, work: Coroutine[Any, Any, T]) -> T:
        me = asyncio.current_task()
        assert me is not None
        watcher = asyncio.create_task(self._cancel_when_wanted(me))  # not in a group: errors of `work` stay as they are
        try:
            return await work
        finally:
            watcher.cancel()

    async def _cancel_when_wanted(self, task: asyncio.Task[Any]) -> None:
        while not self.wanted:  # noqa: ASYNC110 - a signal handler sets it, and no loop hears of that
            await asyncio.sleep(LOOK_EVERY_S)
        task.cancel()
