"""Forecasts of when a forward pass on the GPU will be through (pace.py).

Whoever looks at a pass takes the interpreter from the thread that launches its kernels, so there are two ways. Where
the GPU keeps up with the launches, as with short prompts, the launches are the pace, and the launching thread itself
reads it. Where it doesn't, a thread watches what is left once all is launched.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import torch

from twolane.connector.transport.base import Wake
from twolane.connector.transport.pace import Forecast, Pace

_LATER_HALF = 0.5  # before it a forecast isn't worth a look
_CHANGES_S = 0.001  # nor is one that differs by less


class PaceMaker:
    def __init__(self, device: torch.device, wake: Wake) -> None:
        self._device = device
        self._wake = wake
        self._launches = Pace()
        self._pass = Pace()
        self._marks: list[tuple[float, torch.cuda.Event]] = []  # of the pass that is being launched
        self.forecast: Forecast | None = None
        self._queue: SimpleQueue[tuple[int, float, torch.cuda.Event] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="twolane-pace", daemon=True)
        self._thread.start()

    # -- engine's thread

    def launched(self, number: int, share: float, event: torch.cuda.Event) -> None:
        """This share of the layers of that pass is launched, and computed when `event` is over."""
        keeps_up = not self._marks or self._marks[-1][1].query()
        self._marks.append((share, event))
        is_news = self._launches.mark(number, share, time.monotonic())
        if is_news and keeps_up and share > _LATER_HALF:
            self._tell(self._launches.forecast)

    def fenced(self, number: int, event: torch.cuda.Event) -> None:
        """All of it is launched."""
        marks, self._marks = [*self._marks, (1.0, event)], []
        if len(marks) > 1 and not marks[-2][1].query():
            for share, mark in marks:
                self._queue.put((number, share, mark))

    # -- both

    def _tell(self, forecast: Forecast | None) -> None:
        old, self.forecast = self.forecast, forecast
        if forecast is None:
            return
        if old is None or old.number != forecast.number or abs(old.at_s - forecast.at_s) > _CHANGES_S:
            self._wake()

    # -- its own thread

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (mark := self._queue.get()) is not None:
            number, share, event = mark
            if event.query():
                continue  # it went by unseen
            try:
                event.synchronize()
            except RuntimeError:  # the context is lost: the copies say so
                return
            if self._pass.mark(number, share, time.monotonic()) and share > _LATER_HALF:
                self._tell(self._pass.forecast)

    def close(self, timeout_s: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)
