"""When a forward pass that runs will be through, told from how far it has come, or from others of its size. Pure."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

NUM_MARKS = 8  # how many times a pass is looked at on its way through the layers
NEAR_S = 0.02
SHORT_S = 0.05

PassSize = tuple[int, int]  # tokens that it computes, and tokens that those attend to


@dataclass(frozen=True)
class Forecast:
    """`number`: of the pass, counted from 0 by its fences. `at_s`: monotonic."""

    number: int
    at_s: float


class Pace:
    """The layers of one pass take equally long: a straight line through its first mark and its last."""

    def __init__(self) -> None:
        self._number = -1
        self._first = (0.0, 0.0)  # (share of the layers, monotonic seconds)
        self._last_s = 0.0
        self.forecast: Forecast | None = None

    def mark(self, number: int, share: float, now_s: float) -> bool:
        """This `share` of the pass's layers is computed, 0 < share <= 1. Whether somebody should look at the forecast:
        the next one would come near the end."""
        last_s, self._last_s = self._last_s, now_s
        if number != self._number:
            self._number, self._first, self.forecast = number, (share, now_s), None
            return False
        first_share, first_s = self._first
        if share > first_share:
            a_layer_s = (now_s - first_s) / (share - first_share)
            self.forecast = Forecast(number, now_s + a_layer_s * (1 - share))
        return self.forecast is not None and self.forecast.at_s - now_s < NEAR_S + (now_s - last_s)


class History:
    """How long passes took, by their size. For short ones alone: of those, the layers tell too late, and the others
    vary by more than a forecast may be wrong.

    Mutable state: the latest few of each size, of which there are some hundreds.
    """

    def __init__(self) -> None:
        self._took_s: defaultdict[tuple[int, ...], deque[float]] = defaultdict(lambda: deque(maxlen=5))

    @staticmethod
    def _near(size: PassSize) -> tuple[int, ...]:
        """The same for sizes that differ by less than a tenth."""
        return tuple(round(8 * math.log2(max(1, number))) for number in size)

    def add(self, size: PassSize, seconds: float) -> None:
        self._took_s[self._near(size)].append(seconds)

    def expect(self, size: PassSize) -> float | None:
        """Seconds; None if none like it was seen, or if it is long."""
        took_s = self._took_s.get(self._near(size))
        return expected_s if took_s and (expected_s := median(took_s)) < SHORT_S else None


def marks_every(num_layers: int) -> int:
    """After how many layers a pass is marked."""
    return -(-num_layers // NUM_MARKS)
