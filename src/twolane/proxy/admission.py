"""How many requests are served at once, and who is next. First come, first served."""

from __future__ import annotations

import asyncio
from collections import deque

from twolane.errors import TooBusyError


class Admission:
    """Owns the count of admitted requests and the queue of those that wait. Every `enter` is paired with a `leave`.

    A place that is given back goes straight to the longest waiting, so that a newcomer can't overtake.
    """

    def __init__(self, max_in_flight: int, max_queued: int, timeout_s: float) -> None:
        self._max_in_flight = max_in_flight
        self._max_queued = max_queued
        self._timeout_s = timeout_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_flight = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def try_enter(self) -> bool:
        """Without waiting, for the most common case."""
        if self.in_flight >= self._max_in_flight or self._waiting:
            return False
        self.in_flight += 1
        return True

    async def enter(self) -> None:
        """Raises TooBusyError if the queue is full, or no turn came in time. The cancelled leave the queue."""
        if self.try_enter():
            return
        if len(self._waiting) >= self._max_queued:
            raise TooBusyError(f"{self.in_flight} requests are being served and {self.queued} wait; try again later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait((turn,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            self._give_up(turn)
            raise
        if not turn.done():
            self._give_up(turn)
            raise TooBusyError(f"no turn came within {self._timeout_s:g} s; try again later")

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done():  # the turn came in the very moment of giving up
            self.leave()
        else:
            self._waiting.remove(turn)

    def leave(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)  # the place changes hands, the count stays
        else:
            self.in_flight -= 1
