"""One kept-alive connection to an instance: the socket, the response parser, one exchange at a time."""

from __future__ import annotations

import asyncio
import socket
from time import monotonic
from typing import TYPE_CHECKING, Protocol, cast

import httptools
import msgspec

from twolane.errors import StaleConnectionError, UpstreamConnectionError, UpstreamError
from twolane.proxy.headers import Headers

if TYPE_CHECKING:
    from twolane.proxy.http_client import Exchange


# A host that is gone sends no end: the kernel finds out, from what isn't acknowledged or from a silent one's probes.
LOST_HOST_S = 30
LOST_HOST = (
    (socket.TCP_USER_TIMEOUT, 1000 * LOST_HOST_S),
    (socket.TCP_KEEPIDLE, LOST_HOST_S // 2),
    (socket.TCP_KEEPINTVL, LOST_HOST_S // 6),
    (socket.TCP_KEEPCNT, 3),
)


class ResponseHead(msgspec.Struct, frozen=True):
    """An answer's head. `length_bytes` is None for a chunked body, or one that ends with the connection."""

    status: int
    headers: Headers
    length_bytes: int | None
    ends_at_eof: bool


class Owner(Protocol):
    """Who keeps the connections."""

    def idle(self, connection: UpstreamConnection) -> None: ...
    def lost(self, connection: UpstreamConnection) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """Idle, or busy with `_exchange`. It goes back to its owner when an answer has ended and both sides keep it."""

    def __init__(self, address: str, max_head_bytes: int, owner: Owner) -> None:
        self.address = address
        self.idle_since = 0.0
        self._max_head_bytes = max_head_bytes
        self._owner = owner
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._num_exchanges = 0
        self._reset()

    def _reset(self) -> None:
        self._received = False  # any byte of the present answer
        self._head_bytes = 0
        self._headers: Headers = []
        self._head: ResponseHead | None = None
        self._head_told = False
        self._pieces: list[bytes] = []
        self._complete = False
        self._keep_alive = False

    def begin(self, exchange: Exchange, request: bytes) -> None:
        self._exchange = exchange
        self._num_exchanges += 1
        if self._transport is not None:
            self._transport.write(request)
        else:  # it ended between being made and being used; told later, like every other failure
            asyncio.get_running_loop().call_soon(self.connection_lost, None)

    def pause(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()

    def abort(self) -> None:
        """The exchange hears nothing more."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        for option, value in LOST_HOST:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # an answer to nothing
            self.abort()
            return
        self._received = True
        try:
            self._parser.feed_data(data)
            if self._head is None:
                self._limit_head(len(data))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(UpstreamError(f"{self.address} sent no valid HTTP: {error}"))
            return
        except UpstreamError as error:
            self._fail(error)
            return
        self._tell(self._exchange)

    def _limit_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_head_bytes:
            raise UpstreamError(f"{self.address} sent a head of more than {self._max_head_bytes} bytes")

    def _tell(self, exchange: Exchange) -> None:
        """Hands on what the parser found. Any call may close the exchange, which ends this."""
        if self._head is not None and not self._head_told:
            self._head_told = True
            exchange.listener.head_received(self._head)
        if self._pieces and self._exchange is exchange:
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            exchange.listener.data_received(data, self._complete)
        if self._complete and self._exchange is exchange:
            self._release(exchange)

    def _release(self, exchange: Exchange) -> None:
        self._exchange = None
        transport = self._transport
        # An answer before the whole request was sent (a 4xx, mostly): the rest would be taken for the next request.
        if transport is None or not self._keep_alive or transport.get_write_buffer_size():
            self.abort()
        else:
            self._reset()
            if exchange.paused:
                self.resume()
            self.idle_since = monotonic()
            self._owner.idle(self)
        exchange.finish()

    def _fail(self, error: UpstreamError) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.finish(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._owner.lost(self)
        exchange = self._exchange
        if exchange is None:
            return
        if self._head is not None and self._head.ends_at_eof and exc is None:
            self._exchange = None
            exchange.finish()
        else:
            self._fail(self._loss(exc))

    def _loss(self, exc: Exception | None) -> UpstreamConnectionError:
        why = str(exc) if exc is not None else "closed the connection"
        if self._received:
            return UpstreamConnectionError(f"{self.address} broke off its answer: {why}")
        if self._num_exchanges > 1:
            # It may have crossed the server's close of an idle connection: also seconds later, where the server was
            # stopped meanwhile. If the server fell instead, a fresh connection finds out at once.
            return StaleConnectionError(f"a kept-alive connection to {self.address} had ended: {why}")
        return UpstreamConnectionError(f"{self.address} ended the connection without an answer: {why}")

    # --- httptools callbacks -------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is None:  # trailers are dropped
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # `100 Continue`, `103 Early Hints`: the answer is still to come
            self._headers = []
            return
        if self._complete:
            raise UpstreamError(f"{self.address} sent more than one answer")
        fields = dict(self._headers)
        length = fields.get(b"content-length")
        no_body = status in (204, 304)
        length_bytes = 0 if no_body else int(length) if length is not None else None
        ends_at_eof = length_bytes is None and b"transfer-encoding" not in fields
        self._head = ResponseHead(status, self._headers, length_bytes, ends_at_eof)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        if self._head is not None:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()
