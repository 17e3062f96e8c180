"""Writing one answer to a client, with the framing that the client's HTTP version allows."""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from twolane.errors import MethodNotAllowedError, NoInstanceError, TooBusyError, TwoLaneError, UnauthorizedError
from twolane.proxy.headers import Headers, encode, status_line

if TYPE_CHECKING:
    from twolane.proxy.request_reader import Request

_RETRY_AFTER_S = b"1"


class Responder:
    """The answer to one request. Calls go start, write..., end; or send; or abort at any time.

    Writes never block: who writes much sets `on_flow` and stops on True (client reads too slowly) until False.
    `on_done(reusable)` is called once, at end or abort. After `disconnected` turns true all writes are ignored.
    """

    def __init__(self, request: Request, transport: asyncio.Transport, on_done: Callable[[bool], None]) -> None:
        self._transport = transport
        self._on_done = on_done
        self._is_http10 = request.http_version == "1.0"
        self._is_head = request.method == "HEAD"
        self._chunked = False
        self._head = b""  # written with what follows it: a system call less
        self.keep_alive = request.keep_alive
        self.status = 0  # 0 until started
        self.ended = False
        self.disconnected = False
        self.paused = False
        self.on_flow: Callable[[bool], None] | None = None

    def start(self, status: int, headers: Headers, length_bytes: int | None) -> None:
        """The head goes out with the first of the body. Without a length the body is chunked, or for HTTP/1.0 ends
        with the connection."""
        assert not self.status, "an answer starts once"
        self.status = status
        framing: Headers = []
        if length_bytes is not None:
            framing.append((b"content-length", b"%d" % length_bytes))
        elif self._is_http10:
            self.keep_alive = False
        else:
            self._chunked = not self._is_head
            framing.append((b"transfer-encoding", b"chunked"))
        if not self.keep_alive:
            framing.append((b"connection", b"close"))
        elif self._is_http10:
            framing.append((b"connection", b"keep-alive"))
        self._head = b"%b%b\r\n" % (status_line(status), encode(headers + framing))

    def write(self, data: bytes) -> None:
        if not data or self._is_head or self.ended:
            return
        if self._chunked:
            data = b"%b%x\r\n%b\r\n" % (self._head, len(data), data)
        elif self._head:
            data = self._head + data
        self._head = b""
        self._put(data)

    def end(self, data: bytes = b"") -> None:
        """With the last of the body, if there is any."""
        if self.ended:
            return
        if self._is_head:
            data = self._head
        elif self._chunked and data:
            data = b"%b%x\r\n%b\r\n0\r\n\r\n" % (self._head, len(data), data)
        else:
            data = self._head + data + (b"0\r\n\r\n" if self._chunked else b"")
        if data:
            self._put(data)
        self.ended = True
        self._on_done(self.keep_alive)

    def abort(self) -> None:
        """Ends the connection where it is, so that the client can't take the answer for a whole one."""
        if not self.ended:
            self.ended = True
            self.keep_alive = False
            self._transport.abort()
            self._on_done(False)

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.start(status, headers, len(body))
        self.end(body)

    def send_json(self, status: int, value: object, headers: Headers | None = None) -> None:
        """An answer of our own."""
        date = email.utils.formatdate(usegmt=True).encode()
        own: Headers = [(b"date", date), (b"content-type", b"application/json"), *(headers or [])]
        self.send(status, own, msgspec.json.encode(value))

    def send_error(self, error: TwoLaneError, headers: Headers | None = None) -> None:
        extra = list(headers or [])
        if isinstance(error, (NoInstanceError, TooBusyError)):
            extra.append((b"retry-after", _RETRY_AFTER_S))
        if isinstance(error, UnauthorizedError):
            extra.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowedError):
            extra.append((b"allow", ", ".join(error.allowed).encode()))
        self.send_json(error.status, error_object(error), extra)

    def _put(self, data: bytes) -> None:
        if not self.disconnected:
            self._transport.write(data)

    def set_flow(self, paused: bool) -> None:
        """From the transport, by way of the connection."""
        self.paused = paused
        if self.on_flow is not None:
            self.on_flow(paused)


def error_object(error: TwoLaneError) -> dict[str, object]:
    """What the OpenAI API answers with: {"error": {"message", "type", "param", "code"}}."""
    return {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}}
