"""The data connections of transport `tcp` in the simulated world: its halves are the real ones, the sockets are these.

Bytes move when the world likes, apart from the messages and from the copies; they are read when they move, as a socket
without copies does. A connection may be cut at any time: P finds out when it looks, D only if it is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twolane.connector.transport.data_sockets import DataServer, IsSent, ReceiveLine, SendLine
from twolane.errors import TransferError


@dataclass(eq=False)
class Frame:
    head: bytes
    data: memoryview
    is_sent: bool = False


@dataclass(eq=False)
class Pipe:
    """One connection. `line`: P's end, once it was found by its token."""

    server: SimServer
    token: bytes
    line: SimSendLine | None = None
    on_the_way: list[Frame] = field(default_factory=list)
    arrived: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_cut: bool = False

    @property
    def can_move(self) -> bool:
        return not self.is_cut and (self.line is None or bool(self.on_the_way))

    def move(self) -> None:
        """The connection is made, or one frame goes over."""
        if not self.can_move:
            return
        if self.line is None:
            self.line = self.server.lines.get(self.token)
            if self.line is None:
                self.cut()
            else:
                self.line.is_joined, self.line.pipe = True, self
            return
        frame = self.on_the_way.pop(0)
        self.arrived.append((frame.head, bytes(frame.data)))
        frame.is_sent = True

    def cut(self) -> None:
        self.is_cut = True
        for frame in self.on_the_way:
            frame.is_sent = True
        self.on_the_way.clear()


class SimSendLine:
    """SendLine."""

    def __init__(self, server: SimServer, token: bytes) -> None:
        self.is_joined = False
        self.error = ""
        self.pipe: Pipe | None = None
        self._server = server
        self._token = token

    def send(self, head: bytes, data: memoryview) -> IsSent:
        assert self.pipe is not None
        if self.pipe.is_cut:
            self.error = "the data connection is lost"
            return lambda: True
        frame = Frame(head, data)
        self.pipe.on_the_way.append(frame)
        return lambda: frame.is_sent

    def close(self) -> None:
        self._server.lines.pop(self._token, None)


class SimServer:
    """DataServer."""

    def __init__(self, network: Network) -> None:
        self.lines: dict[bytes, SimSendLine] = {}
        self._network = network
        self.address = f"server {len(network.servers)}"
        network.servers[self.address] = self

    def admit(self, token: bytes) -> SendLine:
        line = self.lines[token] = SimSendLine(self, token)
        return line

    def poll(self) -> None:
        for line in self.lines.values():
            if line.pipe is not None and line.pipe.is_cut:
                line.error = "the data connection is lost"

    def take_refused(self) -> int:
        return 0

    def close(self) -> None:
        self.lines.clear()
        for pipe in self._network.pipes:
            if pipe.server is self:
                pipe.cut()


class SimReceiveLine:
    """ReceiveLine."""

    def __init__(self, network: Network, pipe: Pipe) -> None:
        self._network = network
        self._pipe = pipe
        self._data = b""

    def next_head(self) -> bytes | None:
        if not self._pipe.arrived:
            return None
        head, self._data = self._pipe.arrived.pop(0)
        return head

    def take(self, into: memoryview | None) -> int:
        if into is not None:
            into[:] = self._data[: len(into)]
        return len(self._data)

    def close(self) -> None:
        self._pipe.cut()
        if self._pipe in self._network.pipes:
            self._network.pipes.remove(self._pipe)


class SimClient:
    """DataClient."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._pipes: list[Pipe] = []

    def join(self, address: str, token: bytes) -> ReceiveLine:
        if address not in self._network.servers:
            raise TransferError(f"no {address}")
        pipe = Pipe(self._network.servers[address], token)
        self._pipes.append(pipe)
        self._network.pipes.append(pipe)
        return SimReceiveLine(self._network, pipe)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.cut()


class Network:
    """Where every P's server is found, and all connections."""

    def __init__(self) -> None:
        self.servers: dict[str, SimServer] = {}
        self.pipes: list[Pipe] = []

    def serve(self) -> DataServer:
        return SimServer(self)

    def move_all(self) -> None:
        for pipe in self.pipes:
            while pipe.can_move:
                pipe.move()
