"""HTTP/1.1 to the instances: kept-alive connections, answers handed on as they come.

An `Exchange` is one request and its answer. The listener is called straight from the socket's callback, so that a
streamed token costs no task switch.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from time import monotonic
from typing import Protocol

from twolane.addresses import split_address
from twolane.config import ProxySettings
from twolane.errors import NoDescriptorError, UpstreamConnectionError, UpstreamError, UpstreamTimeoutError
from twolane.proxy.upstream import ResponseHead, UpstreamConnection

_MAX_IDLE_CONNECTIONS = 1024  # an instance
_MAX_FETCHED_BYTES = 16 * 1024 * 1024  # where the caller names no other bound
# Why a connection can't be made that say nothing about the instance: no descriptors, no memory, no port on our side.
_OUR_LIMITS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))


class Listener(Protocol):
    """What an exchange tells, in order: head, data..., then ended or failed, once. Nothing after `Exchange.close`.

    `is_last`: `ended` follows in the same callback. False promises nothing.
    """

    def head_received(self, head: ResponseHead) -> None: ...
    def data_received(self, data: bytes, is_last: bool) -> None: ...
    def ended(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...


class Exchange:
    """One request to one instance. `close` before the end closes the connection: so vLLM learns that a client left."""

    def __init__(self, address: str, listener: Listener) -> None:
        self.address = address
        self.listener = listener
        self.finished = False
        self._connecting: asyncio.Task[None] | None = None
        self._connection: UpstreamConnection | None = None
        self.paused = False

    def connect_with(self, task: asyncio.Task[None]) -> None:
        self._connecting = task

    def run_on(self, connection: UpstreamConnection, request: bytes) -> None:
        self._connecting = None
        self._connection = connection
        connection.begin(self, request)
        if self.paused:
            connection.pause()

    def pause(self) -> None:
        """Stops reading: the instance is held back by TCP. Idempotent."""
        self.paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self.paused = False
        if self._connection is not None:
            self._connection.resume()

    def finish(self, error: UpstreamError | None = None) -> None:
        """From the connection, or the task that tried to make one."""
        if self.finished:
            return
        self.finished = True
        self._connection = None
        self._connecting = None
        if error is None:
            self.listener.ended()
        else:
            self.listener.failed(error)

    def close(self) -> None:
        """Idempotent; nothing happens after the end."""
        if self.finished:
            return
        self.finished = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


class HttpClient:
    """Owns the connections to the instances. Connects in the caller's task group, within `connect_timeout_s`."""

    def __init__(self, settings: ProxySettings, tasks: asyncio.TaskGroup) -> None:
        self._settings = settings
        self._tasks = tasks
        self._idle: dict[str, deque[UpstreamConnection]] = {}  # by address; most recently used last
        self._open: set[UpstreamConnection] = set()
        self._num_connecting = 0
        self._closed = False
        self._all_lost = asyncio.Event()
        self._all_lost.set()

    @property
    def num_sockets(self) -> int:
        return len(self._open) + self._num_connecting

    def send(self, address: str, request: bytes, listener: Listener) -> Exchange:
        """Sends at once over a kept-alive connection, or connects first. Returns without waiting."""
        exchange = Exchange(address, listener)
        connection = self._take_idle(address)
        if connection is not None:
            exchange.run_on(connection, request)
        else:
            task = self._tasks.create_task(self._connect(exchange, request))
            self._num_connecting += 1
            task.add_done_callback(self._connected)
            exchange.connect_with(task)
        return exchange

    async def fetch(
        self, address: str, request: bytes, timeout_s: float, max_bytes: int = _MAX_FETCHED_BYTES
    ) -> tuple[ResponseHead, bytes]:
        """A whole answer of bounded size. Raises UpstreamError."""
        answer = Whole(max_bytes)
        exchange = self.send(address, request, answer)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer.future
        except TimeoutError as error:
            raise UpstreamTimeoutError(f"{address} did not answer within {timeout_s:g} s") from error
        finally:
            exchange.close()

    def _take_idle(self, address: str) -> UpstreamConnection | None:
        idle = self._idle.get(address)
        if not idle:
            return None
        oldest_allowed = monotonic() - self._settings.upstream_idle_s
        connection = idle.pop()
        if connection.idle_since >= oldest_allowed:
            return connection
        # The most recently used is too old, so all are: the server is about to close them.
        connection.abort()
        self.forget_idle(address)
        return None

    def forget_idle(self, address: str) -> None:
        """Closes the kept-alive connections of an instance: one of them turned out dead."""
        for connection in self._idle.pop(address, ()):
            connection.abort()

    def _connected(self, _task: asyncio.Task[None]) -> None:
        self._num_connecting -= 1

    async def _connect(self, exchange: Exchange, request: bytes) -> None:
        address = exchange.address
        timeout_s = self._settings.connect_timeout_s
        try:
            host, port = split_address(address)
            async with asyncio.timeout(timeout_s):
                connection = await self._open_connection(address, host, port)
        except TimeoutError:
            exchange.finish(UpstreamConnectionError(f"{address} did not accept a connection within {timeout_s:g} s"))
        except (OSError, ValueError) as error:
            ours = isinstance(error, OSError) and error.errno in _OUR_LIMITS
            kind = NoDescriptorError if ours else UpstreamConnectionError
            exchange.finish(kind(f"{address} can't be reached: {error}"))
        else:
            if exchange.finished or self._closed:
                connection.abort()
            else:
                exchange.run_on(connection, request)

    async def _open_connection(self, address: str, host: str, port: int) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        max_head_bytes = self._settings.max_head_bytes
        _, connection = await loop.create_connection(
            lambda: UpstreamConnection(address, max_head_bytes, self), host, port
        )
        # Only now is it ours: cancelled before, uvloop closes the socket and never calls `connection_lost`.
        self._open.add(connection)
        self._all_lost.clear()
        return connection

    # --- what a connection tells its owner -----------------------------------------------------------------

    def idle(self, connection: UpstreamConnection) -> None:
        idle = self._idle.get(connection.address)
        if idle is None:
            idle = self._idle[connection.address] = deque()
        if self._closed or len(idle) >= _MAX_IDLE_CONNECTIONS:
            connection.abort()
        else:
            idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._all_lost.set()
        idle = self._idle.get(connection.address)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.address]

    async def close(self) -> None:
        """Ends every connection at once; returns when their sockets are closed, in the loop's next turns."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        await self._all_lost.wait()


class Whole:
    """A listener that collects a whole answer into `future`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.future: asyncio.Future[tuple[ResponseHead, bytes]] = asyncio.get_running_loop().create_future()
        self._head: ResponseHead | None = None
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def head_received(self, head: ResponseHead) -> None:
        self._head = head

    def data_received(self, data: bytes, is_last: bool) -> None:  # noqa: ARG002
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            self.failed(UpstreamError(f"an answer exceeds {self._max_bytes} bytes"))
        else:
            self._pieces.append(data)

    def ended(self) -> None:
        assert self._head is not None
        if not self.future.done():
            self.future.set_result((self._head, b"".join(self._pieces)))

    def failed(self, error: UpstreamError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def request_bytes(method: str, target: bytes, address: str, headers: bytes, body: bytes = b"") -> bytes:
    """A whole request. `headers` are encoded lines, without Host and Content-Length."""
    if body or method in ("POST", "PUT"):
        headers = b"%bcontent-length: %d\r\n" % (headers, len(body))
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n%b" % (method.encode(), target, address.encode(), headers, body)
