"""The HTTP/1.1 server in front: one `ClientConnection` a socket, one task a request.

Deadlines are looked after by one sweep for all connections, not by a timer each.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from twolane.config import ProxySettings
from twolane.errors import TwoLaneError
from twolane.proxy.client_connection import ClientConnection
from twolane.proxy.descriptors import Descriptors
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

logger = logging.getLogger(__name__)

Handler = Callable[[Request, Responder], Coroutine[Any, Any, None]]


class HttpServer:
    """Owns the listening socket, its connections and their request tasks, which run in the caller's task group."""

    def __init__(
        self, handler: Handler, settings: ProxySettings, tasks: asyncio.TaskGroup, descriptors: Descriptors
    ) -> None:
        self.settings = settings
        self.descriptors = descriptors
        self._handler = handler
        self._tasks = tasks
        self._server: asyncio.Server | None = None
        self._connections: set[ClientConnection] = set()
        self._deserted = asyncio.Event()
        self._deserted.set()
        self._serving: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def start(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self), sock=listener, backlog=4096)

    def stop_accepting(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def sweep(self) -> None:
        """Enforces the connections' deadlines until cancelled."""
        settings = self.settings
        shortest_s = min(settings.head_timeout_s, settings.body_timeout_s, settings.idle_timeout_s, settings.linger_s)
        tick_s = min(1.0, max(0.02, shortest_s / 8))
        while True:
            await asyncio.sleep(tick_s)
            now = monotonic()
            for connection in list(self._connections):
                connection.check_deadline(now)

    async def drained(self) -> None:
        """Returns when no request is being served."""
        await self._quiet.wait()

    async def close_connections(self) -> None:
        """Ends every connection at once, and cancels the requests still served; returns when the sockets are closed."""
        for task in self._serving:
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        await self._deserted.wait()

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def joined(self, connection: ClientConnection) -> None:
        self._connections.add(connection)
        self._deserted.clear()

    def left(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._deserted.set()

    def serve(self, request: Request, responder: Responder) -> asyncio.Task[None]:
        self._quiet.clear()
        task = self._tasks.create_task(self._serve(request, responder))
        self._serving.add(task)
        task.add_done_callback(self._served)  # also for a task that was cancelled before its first step
        return task

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not self._serving:
            self._quiet.set()

    async def _serve(self, request: Request, responder: Responder) -> None:
        try:
            await self._handler(request, responder)
        except TwoLaneError as error:
            _answer_error(responder, error)
        except Exception:  # the boundary: one request's bug must not end the others
            logger.exception("request failed method=%s path=%s", request.method, request.path)
            _answer_error(responder, TwoLaneError("the proxy failed on this request; see its log"))
        finally:
            responder.abort()  # nothing happens if the answer has ended


def _answer_error(responder: Responder, error: TwoLaneError) -> None:
    if not responder.status:
        responder.send_error(error)
