"""The forward passes that P's engine launches: events mark each on its way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twolane.connector.transport.base import Fence, Wake
from twolane.connector.transport.cuda.lane import event_now
from twolane.connector.transport.cuda.pace_maker import PaceMaker
from twolane.connector.transport.pace import Forecast, PassSize, marks_every


@dataclass(frozen=True)
class PassFence(Fence):
    """Marks of one forward pass: once `events[i]` is over, the first `layers[i]` layers are computed."""

    layers: tuple[int, ...]
    events: tuple[torch.cuda.Event, ...]

    def is_over(self) -> bool:
        return bool(self.events[-1].query())

    def behind(self, end_layer: int) -> torch.cuda.Event:
        """Once it is over, the layers before that one are computed."""
        return next(event for layers, event in zip(self.layers, self.events, strict=True) if layers >= end_layer)


class Passes:
    """Mutable state: marks of the pass that is being launched, and the number of those that were. Engine's thread, but
    for the forecasts."""

    def __init__(self, layer_names: Sequence[str], device: torch.device, wake: Wake) -> None:
        self._device = device
        self._layer_index = {name: index for index, name in enumerate(layer_names)}
        self._mark_every = marks_every(len(layer_names))
        self._marks: list[tuple[int, torch.cuda.Event]] = []
        self._pace_maker = PaceMaker(device, wake)
        self.num = 0

    @property
    def forecasts(self) -> Sequence[Forecast]:
        return self._pace_maker.forecasts

    def begin(self, size: PassSize) -> None:
        self._pace_maker.began(self.num, size)

    def layer_done(self, layer_name: str) -> None:
        index = self._layer_index.get(layer_name)
        if index == 0:
            self._marks = []  # of a pass that never came to its end
        if index is not None and (index + 1) % self._mark_every == 0 and index + 1 < len(self._layer_index):
            self._marks.append((index + 1, event_now(self._device)))
            self._pace_maker.launched((index + 1) / len(self._layer_index), self._marks[-1][1])

    def fence(self) -> Fence:
        marks = [*self._marks, (len(self._layer_index), event_now(self._device))]
        self._marks = []
        self._pace_maker.fenced(marks[-1][1])
        self.num += 1
        return PassFence(tuple(layers for layers, _ in marks), tuple(event for _, event in marks))

    def close(self, timeout_s: float) -> None:
        self._pace_maker.close(timeout_s)
