"""What happens, told to the dashboards that are open: one stream of server-sent events each, all with the same events.

`hello` has everything, once; then `sample` every second, which is also the heartbeat, and `flow` up to five times a
second when something has moved. `bye` is the last: the proxy stops. Without a watcher only the
history's sample is made.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

import msgspec

from twolane import __version__
from twolane.errors import NoInstanceError, TooBusyError
from twolane.proxy import picture
from twolane.proxy.headers import Headers
from twolane.proxy.history import SAMPLE_EVERY_S, WINDOW_S, History
from twolane.proxy.picture import Sight, Where
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

logger = logging.getLogger(__name__)

MAX_WATCHERS = 16
FLOW_EVERY_S = 0.2
_NUM_RECENT = 50
_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a reverse proxy in front must not collect events
]


class Dashboard:
    """Owns the watchers, the history, and what the watchers know. `run` is the task that tells them."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        self.history = History(sight.stats)
        self._watchers: dict[Responder, asyncio.Future[None]] = {}
        self._sample_at = monotonic()
        self._closed = False
        # What all watchers know.
        self._open: dict[int, Where] = {}
        self._num_ended = 0
        self._marks: list[tuple[object, ...]] = []

    async def events(self, request: Request, responder: Responder, _rest: str) -> None:
        """Until the client leaves, reads too slowly, or the proxy stops."""
        if self._closed:
            raise NoInstanceError("the proxy is shutting down")
        if len(self._watchers) >= MAX_WATCHERS:
            raise TooBusyError(f"{MAX_WATCHERS} dashboards are open already; close one")
        responder.start(200, _HEADERS, None)
        if request.method == "HEAD":
            responder.end()
            return
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tell_flow(monotonic())  # so that the others know what the newcomer will know
        responder.write(event("hello", self._hello(monotonic())))
        self._watchers[responder] = gone
        try:
            with self._sight.engines.watching(), self._sight.power.sampler.watched():
                await gone
        finally:
            self._watchers.pop(responder, None)

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def close(self) -> None:
        """Sends everybody away. Idempotent."""
        self._closed = True
        for responder, gone in self._watchers.items():
            responder.keep_alive = False
            responder.end(event("bye", {}))
            _leave(gone)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            wait_s = self._sample_at - monotonic()
            await asyncio.sleep(max(0.0, min(wait_s, FLOW_EVERY_S) if self._watchers else wait_s))
            try:
                self._tick(monotonic())
            except Exception:  # the boundary: the picture must not end what it shows
                logger.exception("dashboard failed watchers=%d", len(self._watchers))
                await asyncio.sleep(SAMPLE_EVERY_S)

    def _tick(self, now: float) -> None:
        if self._watchers:
            self._tell_flow(now)
        if now < self._sample_at:
            return
        self._sample_at = max(self._sample_at + SAMPLE_EVERY_S, now)  # seconds that were missed stay missed
        admission = self._sight.admission
        sample = self.history.take(now, admission.in_flight, admission.queued, picture.generated(self._sight))
        if self._watchers:
            self._tell("sample", {"now": now, "sample": sample} | self._state(now))

    def _hello(self, now: float) -> dict[str, Any]:
        stats = self._sight.stats
        return {
            "now": now,
            "version": __version__,
            "uptime_s": now - stats.started_at,
            "window_s": WINDOW_S,
            "samples": list(self.history.samples),
            "open": list(self._open.values()),
            "ended": picture.ended_requests(stats, 0, _NUM_RECENT),
        } | self._state(now)

    def _state(self, now: float) -> dict[str, Any]:
        sight = self._sight
        return {
            "instances": picture.instances(sight, now),
            "says": picture.says(sight, self.history.alone()),
            "in_flight": sight.admission.in_flight,
            "queued": sight.admission.queued,
        } | sight.power.as_dict()

    def _tell_flow(self, now: float) -> None:
        """What has changed since the last time."""
        stats, known = self._sight.stats, self._open
        self._open = picture.open_requests(self._sight.in_flight)
        moved = [where for serial, where in self._open.items() if known.get(serial) != where]
        gone = [serial for serial in known if serial not in self._open]
        ended = picture.ended_requests(stats, self._num_ended, _NUM_RECENT)
        self._num_ended = stats.num_ended
        flow: dict[str, Any] = {"now": now, "moved": moved, "gone": gone, "ended": ended}
        marks = picture.marks_of(self._sight.pool)
        if marks != self._marks:
            self._marks = marks
            flow |= self._state(now)
        if self._watchers and (moved or gone or ended or "says" in flow):
            self._tell("flow", flow)

    def _tell(self, name: str, value: dict[str, Any]) -> None:
        data = event(name, value)
        for responder, gone in list(self._watchers.items()):
            if responder.paused:  # it hasn't read what it has: it gets no more, comes back, and begins anew
                responder.abort()
                del self._watchers[responder]
                _leave(gone)
            else:
                responder.write(data)


def event(name: str, value: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(value))


def _leave(gone: asyncio.Future[None]) -> None:
    if not gone.done():
        gone.set_result(None)
