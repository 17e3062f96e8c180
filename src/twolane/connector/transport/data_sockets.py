"""The data connections of transport `tcp`, over ZMQ, apart from those of the control messages.

P listens at a port that the system chooses, on the address that it is configured with. D connects, and says the token
from the handshake; whoever doesn't know one gets nothing. With keys all of it is encrypted. A connection that is lost
isn't made again: the two begin anew with a handshake. P finds out, since it says a word on each of them every second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import zmq

from twolane.connector import sockets
from twolane.connector.transport.frames import ALIVE, MAX_DATA_BYTES, MAX_HEAD_BYTES, TOKEN_BYTES
from twolane.curve import Keys, ZmqContext, ZmqSocket
from twolane.errors import TransferError

_ALIVE_EVERY_S = 1.0
_MIN_TIMEOUT_S = 2.0
_RECEIVE_AHEAD = 8  # chunks that wait in D's socket

IsSent = Callable[[], bool]  # the bytes aren't needed any more


class SendLine(Protocol):
    """P's end of a connection. `is_joined`: D is there. `error`: why nothing can be sent any more."""

    is_joined: bool
    error: str

    def send(self, head: bytes, data: memoryview) -> IsSent:
        """Returns at once; `data` is read later. Sets `error` where D is gone."""
        ...

    def close(self) -> None: ...


class DataServer(Protocol):
    """P's, for all D."""

    address: str

    def admit(self, token: bytes) -> SendLine:
        """Who says this token, gets what is sent on this line."""
        ...

    def poll(self) -> None: ...

    def take_refused(self) -> int:
        """How many frames and connections were strangers', since the last call."""
        ...

    def close(self) -> None: ...


class ReceiveLine(Protocol):
    """D's end of a connection."""

    def next_head(self) -> bytes | None:
        """None: nothing is there. Raises FrameError."""
        ...

    def take(self, into: memoryview | None) -> int:
        """The bytes behind the head; None: they are thrown away. Returns how many there were, which may be more than
        fit."""
        ...

    def close(self) -> None: ...


class DataClient(Protocol):
    """D's, for all P."""

    def join(self, address: str, token: bytes) -> ReceiveLine:
        """Doesn't wait for P. Raises TransferError."""
        ...

    def close(self) -> None: ...


class ZmqServer:
    """DataServer. A context of its own, so that no ping waits behind megabytes."""

    def __init__(self, host: str, timeout_s: float, poller: zmq.Poller | None, keys: Keys | None = None) -> None:
        """`poller`: told of the sockets, so that their owner calls `poll`. Raises TransferError."""
        self._num_refused = 0
        self._num_told = 0
        self._timeout_s = max(_MIN_TIMEOUT_S, timeout_s)
        self._context: ZmqContext = zmq.Context(io_threads=1)
        self._poller = poller
        try:
            self._socket, self._door = sockets.listen(
                self._context,
                f"[{host}]:*" if ":" in host else f"{host}:*",
                keys,
                max_bytes=MAX_HEAD_BYTES,
                timeout_s=self._timeout_s,
            )
        except zmq.ZMQError as error:
            self._context.term()
            raise TransferError(f"can't listen on {host} for data connections: {error.strerror}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self._lines: dict[bytes, ZmqSendLine] = {}
        self._said_at_s = 0.0
        if poller is not None:
            for socket in (self._socket, *self._door.sockets):
                poller.register(socket, zmq.POLLIN)

    def admit(self, token: bytes) -> SendLine:
        line = self._lines[token] = ZmqSendLine(self._socket, lambda: self._lines.pop(token, None))
        return line

    def poll(self) -> None:
        self._door.look()
        while True:
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            line = self._lines.get(frames[0]) if len(frames) == 1 else None
            if line is None or line.route:
                self._num_refused += 1
            else:
                line.route, line.is_joined = route, True
        now_s = time.monotonic()
        if now_s - self._said_at_s > _ALIVE_EVERY_S:
            self._said_at_s = now_s
            for line in list(self._lines.values()):
                line.say_alive(now_s, self._timeout_s, self.address)

    def take_refused(self) -> int:
        told, self._num_told = self._num_told, self._num_refused + self._door.counts.refused
        return self._num_told - told

    def close(self) -> None:
        if self._poller is not None:
            for socket in (self._socket, *self._door.sockets):
                self._poller.unregister(socket)
        self._door.close()
        self._socket.close()
        self._context.term()


class ZmqSendLine:
    """SendLine."""

    def __init__(self, socket: ZmqSocket, on_close: Callable[[], object]) -> None:
        self.is_joined = False
        self.error = ""
        self.route = b""
        self._socket = socket
        self._on_close = on_close
        self._since_s = time.monotonic()

    def send(self, head: bytes, data: memoryview) -> IsSent:
        if not self._begin():
            return lambda: True
        self._socket.send(head, zmq.NOBLOCK | zmq.SNDMORE)
        tracker = self._socket.send(data, zmq.NOBLOCK, copy=False, track=True)
        assert tracker is not None
        return lambda: tracker.done

    def _begin(self) -> bool:
        try:
            self._socket.send(self.route, zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.ZMQError as error:
            self.error = f"the data connection is lost ({error.strerror})"
        return not self.error

    def say_alive(self, now_s: float, timeout_s: float, address: str) -> None:
        if self.is_joined and not self.error:
            if self._begin():
                self._socket.send(ALIVE, zmq.NOBLOCK)
        elif now_s - self._since_s > timeout_s:
            self.error = self.error or (
                f"no data connection to {address} within {timeout_s:g} s: does a firewall let D reach this host?"
            )

    def close(self) -> None:
        self._on_close()


class ZmqClient:
    """DataClient."""

    def __init__(self, timeout_s: float, poller: zmq.Poller | None, keys: Keys | None = None) -> None:
        """`poller`: told of the sockets, so that its owner looks what has come."""
        self._keys = keys
        self._timeout_s = max(_MIN_TIMEOUT_S, timeout_s)
        self._poller = poller
        self._context: ZmqContext | None = None  # a thread that most D never need

    def join(self, address: str, token: bytes) -> ReceiveLine:
        assert len(token) == TOKEN_BYTES
        self._context = self._context or zmq.Context(io_threads=1)
        try:
            socket, knock = sockets.connect(
                self._context,
                address,
                self._keys,
                max_bytes=MAX_DATA_BYTES,
                timeout_s=self._timeout_s,
                receive_ahead=_RECEIVE_AHEAD,
            )
        except zmq.ZMQError as error:
            raise TransferError(f"can't connect to {address} for data: {error.strerror}") from error
        knock.close()  # D has been let in by this P already, or wouldn't know the token
        socket.send(token)
        return ZmqReceiveLine(socket, self._poller)

    def close(self) -> None:
        if self._context is not None:
            self._context.term()


class ZmqReceiveLine:
    """ReceiveLine."""

    def __init__(self, socket: ZmqSocket, poller: zmq.Poller | None) -> None:
        self._socket = socket
        self._poller = poller
        if poller is not None:
            poller.register(socket, zmq.POLLIN)

    def next_head(self) -> bytes | None:
        try:
            frame = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return frame

    def take(self, into: memoryview | None) -> int:
        if not self._socket.getsockopt(zmq.RCVMORE):
            return 0
        size = len(self._socket.recv(copy=False)) if into is None else self._socket.recv_into(into)
        while self._socket.getsockopt(zmq.RCVMORE):
            size += 1 + len(self._socket.recv())  # no message of ours
        return size

    def close(self) -> None:
        if not self._socket.closed:
            if self._poller is not None:
                self._poller.unregister(self._socket)
            self._socket.close()
