"""When a forward pass that runs will be through, told from how far it has come. Pure."""

from __future__ import annotations

from dataclasses import dataclass

NUM_MARKS = 8  # how many times a pass is looked at on its way through the layers
NEAR_S = 0.02


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


def marks_every(num_layers: int) -> int:
    """After how many layers a pass is marked."""
    return -(-num_layers // NUM_MARKS)
