"""D's answer to the client: bytes go from one socket's callback into the other's buffer, nothing is parsed."""

from __future__ import annotations

import asyncio
from time import monotonic

import msgspec

from twolane.config import ProxySettings
from twolane.errors import UpstreamError, UpstreamTimeoutError
from twolane.proxy.attempt import Attempt
from twolane.proxy.headers import HOP_BY_HOP, Headers, end_to_end
from twolane.proxy.responder import Responder, error_object

_MAX_PARTIAL_EVENT_BYTES = 1024 * 1024
_NOT_RETURNED = HOP_BY_HOP | {b"x-request-id"}  # ours goes back in its place


class EventCutter:
    """Passes on whole server-sent events only, so that an error event can follow at any time."""

    def __init__(self) -> None:
        self._partial = b""

    def whole(self, data: bytes) -> bytes:
        """What may be sent now; the rest is kept, up to a bound."""
        if self._partial:
            data = self._partial + data
            self._partial = b""
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            return data
        lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        cut = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if len(data) - cut > _MAX_PARTIAL_EVENT_BYTES:
            return data
        self._partial = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        rest, self._partial = self._partial, b""
        return rest


class ClientTooSlowError(UpstreamError):
    """The client hasn't read for so long that the answer was cut. No instance is to blame."""


class Relay:
    """One answer on its way. `run` returns when it has ended, for better or worse."""

    def __init__(self, attempt: Attempt, responder: Responder, settings: ProxySettings, headers: Headers) -> None:
        self._leg = attempt.decode
        assert attempt.decode_exchange is not None, "there is no verdict for D before its leg is sent"
        self._exchange = attempt.decode_exchange
        self._responder = responder
        self._settings = settings
        self._headers = headers  # ours, added to D's
        self._cutter = EventCutter()
        self._idle_timer: asyncio.TimerHandle | None = None

    async def run(self) -> UpstreamError | None:
        """None if the client has got D's whole answer, else why not. Raises UpstreamError if it has got nothing."""
        try:
            if not self._leg.is_stream and not await self._held_whole():
                raise self._leg.state.error or UpstreamError("the answer broke off")
            self._pass_on()
            await self._until(self._leg.settled)
            return self._finish()
        finally:
            if self._idle_timer is not None:
                self._idle_timer.cancel()

    async def _held_whole(self) -> bool:
        """Holds back an answer that is no stream, until it is whole or too large to hold. False if it broke off."""
        limit_bytes = self._settings.max_held_body_bytes
        enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def is_enough(_settled: object = None) -> None:
            if not enough.done():
                enough.set_result(None)

        def on_held() -> None:
            if self._leg.held.num_bytes > limit_bytes and not enough.done():
                self._exchange.pause()
                is_enough()

        self._leg.on_held = on_held
        on_held()
        if self._leg.settled.done():
            is_enough()
        self._leg.settled.add_done_callback(is_enough)
        await self._until(enough)
        self._leg.on_held = None
        return self._leg.state.error is None

    def _pass_on(self) -> None:
        """From here on the leg writes to the client by itself."""
        leg, responder = self._leg, self._responder
        assert leg.head is not None
        whole = leg.state.ended
        length_bytes = leg.held.num_bytes if whole and not leg.is_stream else leg.head.length_bytes
        responder.start(leg.head.status, end_to_end(leg.head.headers, _NOT_RETURNED) + self._headers, length_bytes)
        responder.on_flow = self._flow
        sink = self._write_events if leg.is_stream else self._write
        sink(leg.held.take(), whole)
        leg.sink = sink
        if responder.paused or self._exchange.paused:
            self._flow(responder.paused)

    def _write(self, data: bytes, is_last: bool) -> None:
        if is_last:
            self._responder.end(data)
        else:
            self._responder.write(data)

    def _write_events(self, data: bytes, is_last: bool) -> None:
        events = self._cutter.whole(data)
        if is_last:
            self._responder.end(events + self._cutter.rest())
        else:
            self._responder.write(events)

    def _flow(self, paused: bool) -> None:
        if paused:
            self._exchange.pause()
        else:
            self._leg.last_data_at = monotonic()
            self._exchange.resume()

    async def _until(self, done: asyncio.Future[None]) -> None:
        """`done` is a future that only this request waits for: cancelling the request cancels it. The leg's end or
        failure ends the wait at the latest."""
        if not done.done():
            if self._idle_timer is None:
                self._check_idle()
            await done

    def _check_idle(self) -> None:
        """Comes back when the answer may have been silent for too long, which fails the leg."""
        idle_s = self._settings.stream_idle_timeout_s
        left_s = self._leg.last_data_at + idle_s - monotonic()
        if left_s > 0:
            self._idle_timer = asyncio.get_running_loop().call_later(left_s, self._check_idle)
        elif self._responder.paused:
            self._leg.failed(ClientTooSlowError(f"the client read nothing for {idle_s:g} s"))
        else:
            self._leg.failed(UpstreamTimeoutError(f"the decode instance was silent for {idle_s:g} s"))

    def _finish(self) -> UpstreamError | None:
        error, responder = self._leg.state.error, self._responder
        self._leg.sink = None
        if error is None:
            responder.end(self._cutter.rest())
        elif self._leg.is_stream and not isinstance(error, ClientTooSlowError):
            responder.keep_alive = False
            responder.end(b"event: error\ndata: " + msgspec.json.encode(error_object(error)) + b"\n\n")
        else:
            responder.abort()
        return error
