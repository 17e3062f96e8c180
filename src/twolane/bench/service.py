"""Services that a benchmark starts with TwoLane's own supervisor, and stops whatever happens."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from twolane.config import Settings
from twolane.launch import control
from twolane.launch.plan import Plan
from twolane.launch.ports import check_ports


@contextmanager
def started(plan: Plan, settings: Settings, show: control.Show) -> Iterator[None]:
    """All of `plan` is ready inside. StartError if it doesn't come up; `show` may raise to end the wait.

    `settings` say where its own files lie; what a run that was killed has left there is ended first.
    """
    files = control.Files(settings)
    with control.exclusive(files):
        control.stop_all(files)
        check_ports(plan)
        try:
            control.start_supervisor(plan, files)
            control.await_start(files, show)
            yield
        finally:
            with undisturbed():
                control.stop_all(files)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl+C in here: what stops the services is not to be stopped itself. It has deadlines of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


@contextmanager
def ends_in_order() -> Iterator[None]:
    """A closed terminal, `kill` and Ctrl+C end it alike, also where a shell's background has Ctrl+C ignored."""
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: _as_ctrl_c,
        signal.SIGHUP: _as_ctrl_c,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
