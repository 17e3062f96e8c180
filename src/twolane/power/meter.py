"""Pure: from what one GPU says at one moment after the other to joules, and to how often its power really changes."""

from __future__ import annotations

import statistics
from collections import deque

from twolane.power.nvml import GpuReading

_NUM_INTERVALS = 50
_ENOUGH_INTERVALS = 5  # fewer say little
_LONGEST_GAP_S = 5.0  # what a GPU took while it couldn't be asked for longer than this is not guessed


class Joules:
    """What one GPU took since its first reading: by its own counter, or where it has none from its watts."""

    def __init__(self) -> None:
        self.total_j = 0.0
        self._last: GpuReading | None = None

    def add(self, reading: GpuReading) -> float:
        """The joules since the last reading."""
        last, self._last = self._last, reading
        taken_j = 0.0 if last is None else _between(last, reading)
        self.total_j += taken_j
        return taken_j


def _between(last: GpuReading, now: GpuReading) -> float:
    """A counter that went back began anew, with its driver: then, too, the watts say what was taken."""
    if last.counter_j is not None and now.counter_j is not None and now.counter_j >= last.counter_j:
        return now.counter_j - last.counter_j
    gap_s = now.at_s - last.at_s
    if last.watts is None or now.watts is None or gap_s > _LONGEST_GAP_S:
        return 0.0
    return (last.watts + now.watts) / 2 * gap_s


class UpdateInterval:
    """How often the power that a GPU tells really changes. No finer than one looks: what changes at every look may
    change more often."""

    def __init__(self) -> None:
        self._intervals_s: deque[float] = deque(maxlen=_NUM_INTERVALS)
        self._watts: float | None = None
        self._changed_at_s: float | None = None

    def add(self, reading: GpuReading) -> None:
        if reading.watts is None or reading.watts == self._watts:
            return
        if self._changed_at_s is not None:
            self._intervals_s.append(reading.at_s - self._changed_at_s)
        if self._watts is not None:
            self._changed_at_s = reading.at_s
        self._watts = reading.watts

    def forget(self) -> None:
        """One looks at another pace from now on."""
        self._intervals_s.clear()
        self._watts = self._changed_at_s = None

    @property
    def median_s(self) -> float | None:
        """None until known."""
        return statistics.median(self._intervals_s) if len(self._intervals_s) >= _ENOUGH_INTERVALS else None


class Tokens:
    """One instance's cumulative count of tokens -> how many more there are. An instance that restarts counts anew."""

    def __init__(self) -> None:
        self._last: float | None = None

    def add(self, count: float) -> float:
        last, self._last = self._last, count
        if last is None:
            return 0.0
        return count - last if count >= last else count
