"""Forecasts of when a forward pass on the GPU will be through (pace.py).

A short one takes as long as others of its size did; that is known before it is launched. Others are looked at as they
go. Whoever does takes the interpreter from the thread that launches the kernels, so there are two ways. Where the GPU
keeps up with the launches, the launches are the pace, and the launching thread itself reads it. Where it doesn't, a
thread watches what is left once all is launched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from twolane.connector.transport.base import Wake
from twolane.connector.transport.pace import Forecast, History, Pace, PassSize

_LATER_HALF = 0.5  # before it a forecast isn't worth a look
_CHANGES_S = 0.001  # nor is one that differs by less


@dataclass(frozen=True)
class Begun:
    """A pass that is being launched."""

    number: int
    size: PassSize
    at_s: float


@dataclass(frozen=True)
class Mark:
    """`event` is over when this share of the layers of a pass is computed."""

    of: Begun
    share: float
    event: torch.cuda.Event


class PaceMaker:
    def __init__(self, device: torch.device, wake: Wake) -> None:
        self._device = device
        self._wake = wake
        self._history = History()
        self._launches = Pace()
        self._pass = Pace()
        self._begun = Begun(-1, (0, 0), 0.0)
        self._marks: list[Mark] = []  # of the pass that is being launched
        self._ended_s = 0.0  # when the pass before the one that is watched was through
        self._forecasts: dict[int, Forecast] = {}  # of the two latest passes, by number
        self._queue: SimpleQueue[Mark | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="twolane-pace", daemon=True)
        self._thread.start()

    # -- engine's thread

    def began(self, number: int, size: PassSize) -> None:
        """A pass is about to be launched. Wakes nobody: whoever calls it does so soon."""
        now_s, before = time.monotonic(), self._forecasts.get(number - 1)
        self._begun, self._marks = Begun(number, size, now_s), []
        self._forecasts = {number - 1: before} if before else {}
        if (expected_s := self._history.expect(size)) is not None:
            starts_s = max(now_s, before.at_s) if before else now_s
            self._forecasts[number] = Forecast(number, starts_s + expected_s)

    def launched(self, share: float, event: torch.cuda.Event) -> None:
        """This share of the layers is launched, and computed when `event` is over."""
        keeps_up = not self._marks or self._marks[-1].event.query()
        self._marks.append(Mark(self._begun, share, event))
        is_news = self._launches.mark(self._begun.number, share, time.monotonic())
        if is_news and keeps_up and share > _LATER_HALF:
            self._tell(self._launches.forecast)

    def fenced(self, event: torch.cuda.Event) -> None:
        """All of it is launched."""
        marks, self._marks = self._marks, []
        if marks and not marks[-1].event.query():
            for mark in marks:
                self._queue.put(mark)
        self._queue.put(Mark(self._begun, 1.0, event))

    # -- both

    @property
    def forecasts(self) -> Sequence[Forecast]:
        return list(self._forecasts.values())

    def _tell(self, forecast: Forecast | None) -> None:
        if forecast is None or forecast.number < self._begun.number - 1:
            return
        old = self._forecasts.get(forecast.number)
        self._forecasts[forecast.number] = forecast
        if old is None or abs(old.at_s - forecast.at_s) > _CHANGES_S:
            self._wake()

    # -- its own thread

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (mark := self._queue.get()) is not None:
            if mark.event.query():
                continue  # it went by unseen
            try:
                mark.event.synchronize()
            except RuntimeError:  # the context is lost: the copies say so
                return
            self._went_by(mark, time.monotonic())

    def _went_by(self, mark: Mark, now_s: float) -> None:
        if mark.share == 1.0:
            self._history.add(mark.of.size, now_s - max(mark.of.at_s, self._ended_s))
            self._ended_s = now_s
        elif self._pass.mark(mark.of.number, mark.share, now_s) and mark.share > _LATER_HALF:
            self._tell(self._pass.forecast)

    def close(self, timeout_s: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)
