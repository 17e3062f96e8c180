"""One client's socket: requests in, one at a time served, answers out.

Reading goes on while a request is served, since that is how a client's leaving is noticed; what a client pipelines
meanwhile is kept up to a bound.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, cast

from twolane.errors import BadRequestError, RequestTimeoutError, TooBusyError, TwoLaneError
from twolane.proxy.request_reader import Phase, Request, RequestReader
from twolane.proxy.responder import Responder

if TYPE_CHECKING:
    from twolane.proxy.http_server import HttpServer

_MAX_QUEUED_REQUESTS = 64
_WRITE_BUFFER_BYTES = 256 * 1024
_NEVER = float("inf")


class ClientConnection(asyncio.Protocol):
    """Owns one client's socket. States: reading a request, serving one (`_responder` is set), lingering, closed."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._settings = server.settings
        self._reader = RequestReader(self._settings.max_head_bytes, self._settings.max_body_bytes)
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Request | TwoLaneError] = deque()
        self._held = b""  # pipelined bytes, unparsed, while a request is served
        self._overflowed = False
        self._lingering = False
        self._write_paused = False
        self._responder: Responder | None = None
        self._task: asyncio.Task[None] | None = None
        self._deadline = _NEVER
        self._deadline_phase: Phase | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = tcp = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        tcp.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._server.joined(self)
        self._set_deadline()
        try:
            self._server.descriptors.check_client()
        except TooBusyError as error:
            self._refuse(error)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._server.left(self)
        self._transport = None
        self._queue.clear()
        if self._responder is not None and self._task is not None:
            self._responder.disconnected = True
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._overflowed:
            return
        if self._responder is not None or self._queue or self._write_paused:
            self._hold(data)
            return
        self._queue.extend(self._reader.feed(data))
        self._proceed()

    def _hold(self, data: bytes) -> None:
        if len(self._held) + len(data) <= self._settings.max_head_bytes:
            self._held += data
        else:
            self._overflow()

    def _overflow(self) -> None:
        """Too much pipelined: the connection ends after the present answer (RFC 9112 section 9.3.2 lets us)."""
        self._overflowed = True
        self._held = b""
        self._queue.clear()
        if self._responder is not None:
            self._responder.keep_alive = False
        else:
            self._linger()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._responder is not None:
            self._responder.set_flow(True)

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._responder is not None:
            self._responder.set_flow(False)
        else:
            self._proceed()

    def _proceed(self) -> None:
        """Takes the next step that is possible: serve a queued request, parse held bytes, or wait for more."""
        if self._responder is not None or self._transport is None or self._lingering:
            return
        if self._write_paused:  # answers that the client doesn't read must not pile up: no next one before it does
            self._deadline_phase = None
            self._set_deadline()
            return
        if len(self._queue) > _MAX_QUEUED_REQUESTS:
            self._refuse(BadRequestError(f"more than {_MAX_QUEUED_REQUESTS} requests pipelined"))
            return
        if not self._queue and self._held:
            held, self._held = self._held, b""
            self._queue.extend(self._reader.feed(held))
        if not self._queue:
            self._wait_for_more()
            return
        item = self._queue.popleft()
        if isinstance(item, TwoLaneError):
            self._refuse(item)
        else:
            self._serve(item)

    def _wait_for_more(self) -> None:
        if self._reader.wants_continue and self._transport is not None:
            self._reader.wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._set_deadline()

    def _serve(self, request: Request) -> None:
        assert self._transport is not None
        self._deadline, self._deadline_phase = _NEVER, None
        self._responder = Responder(request, self._transport, self._answered)
        self._responder.paused = self._write_paused
        self._task = self._server.serve(request, self._responder)

    def _answered(self, reusable: bool) -> None:
        """The responder has ended. Its task may go on a little, for its own sake: it is cancelled no more."""
        self._responder = None
        self._task = None
        if self._transport is None:
            return
        if not reusable and not self._transport.is_closing():
            self._linger() if self._overflowed else self._transport.close()
        elif reusable:
            self._proceed()

    def _refuse(self, error: TwoLaneError) -> None:
        """Answers what was no request, and closes: nobody knows where the next one would begin."""
        assert self._transport is not None
        responder = Responder(Request(keep_alive=False), self._transport, lambda _reusable: self._linger())
        responder.send_error(error)

    def _linger(self) -> None:
        """Reads and forgets what the client still sends: closing at once would reset it before it has read why."""
        if self._transport is None or self._transport.is_closing():
            return
        self._lingering = True
        self._queue.clear()
        self._transport.write_eof()
        self._deadline = monotonic() + self._settings.linger_s

    def _set_deadline(self) -> None:
        """By the phase that the input is in, from the moment the phase began."""
        phase = self._reader.phase
        if phase is self._deadline_phase:
            return
        if phase is Phase.IDLE:
            timeout_s = self._settings.idle_timeout_s
        else:
            timeout_s = self._settings.head_timeout_s if phase is Phase.HEAD else self._settings.body_timeout_s
        self._deadline_phase = phase
        self._deadline = monotonic() + timeout_s

    def check_deadline(self, now: float) -> None:
        if now < self._deadline or self._transport is None:
            return
        self._deadline = _NEVER
        if self._lingering or self._transport.get_write_buffer_size():
            self._transport.abort()
        elif self._deadline_phase is Phase.IDLE:
            self._transport.close()
        else:
            self._refuse(RequestTimeoutError(f"the request's {self._reader.phase.name.lower()} took too long"))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
