"""Transport `tcp`: staging slots on both sides and a data connection between; for other hosts, else the last resort.

P copies blocks into a slot and sends its bytes from there, without another copy; D receives them into a slot of its own
and copies them into its waiting blocks. D says how many slots of which size it has for this P; P has no more loans out,
and takes one back with D's Credit. So memory is bounded on both sides, whoever is slow. What doesn't fit what D knows
ends the connection: a wrong token is worse than an error. D alone writes to D's KV memory.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from twolane.connector.layout import KVLayout
from twolane.connector.settings import ConnectorSettings, keys_of
from twolane.connector.transport.base import NO_ROOM, Extent, Fence, Items, Opening, Ticket, extent_of_slot
from twolane.connector.transport.copier import Copier
from twolane.connector.transport.data_sockets import (
    DataServer,
    IsSent,
    SendLine,
    ZmqServer,
)
from twolane.connector.transport.frames import (
    CHUNK_BYTES,
    KEY_BYTES,
    TOKEN_BYTES,
    Head,
    Positive,
    Seal,
    checksum,
)
from twolane.connector.transport.hub import SendWay
from twolane.connector.transport.slots import Slots, Staging
from twolane.errors import TransferError


class Room(msgspec.Struct, frozen=True):
    """What D has for one P."""

    num_slots: Positive
    slot_bytes: Positive


class Invitation(msgspec.Struct, frozen=True):
    """How D reaches P's data, and how the two know each other: who says `token` gets what is sealed with `key`."""

    address: str
    token: bytes
    key: bytes
    room: Room


def tcp_send(
    layout: KVLayout, copier: Copier, settings: ConnectorSettings, poller: zmq.Poller | None, *, zero: bool
) -> TcpSend:
    keys = keys_of(settings)

    def serve() -> DataServer:
        return ZmqServer(settings.host, settings.peer_timeout_s, poller, keys)

    slot_bytes = max(settings.slot_bytes or copier.slot_bytes, layout.max_item_bytes)
    return TcpSend(copier, serve, layout.layer_bytes, slot_bytes=slot_bytes, num_slots=settings.num_slots, zero=zero)


class TcpSend(SendWay):
    """P's half. Mutable state: the slots and the channels. Listens and has memory from the first D on that needs it."""

    name = "tcp"

    def __init__(
        self,
        copier: Copier,
        serve: Callable[[], DataServer],
        layer_bytes: list[int],
        *,
        slot_bytes: int,
        num_slots: int,
        chunk_bytes: int = CHUNK_BYTES,
        zero: bool = False,
    ) -> None:
        self.copier = copier
        self.layer_bytes = layer_bytes
        self.chunk_bytes = chunk_bytes
        self.slots = Slots(num_slots)
        self.zero = zero
        self._serve = serve
        self._server: DataServer | None = None
        self._room = Room(num_slots, slot_bytes)
        self._staging: Staging | None = None
        self._channels: list[TcpSendChannel] = []

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[TcpSendChannel, dict[str, Any]]:  # noqa: ARG002
        try:
            offered = msgspec.convert(data, Room)
        except msgspec.ValidationError as error:
            raise TransferError(f"the decode worker's offer isn't understood: {error}") from error
        room = Room(min(offered.num_slots, self.slots.peer_share), min(offered.slot_bytes, self._room.slot_bytes))
        self._check_fits(room.slot_bytes)
        self.copier.bind()
        if self._server is None:
            self._server = self._serve()
            self._staging = Staging(self.copier, self._room.num_slots, self._room.slot_bytes)
        invitation = Invitation(
            self._server.address, secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(KEY_BYTES), room
        )
        channel = TcpSendChannel(self, room, Seal(invitation.key), self._server.admit(invitation.token))
        self._channels.append(channel)
        return channel, msgspec.to_builtins(invitation, builtin_types=(bytes,))

    def _check_fits(self, slot_bytes: int) -> None:
        if slot_bytes < max(self.layer_bytes):
            raise TransferError(f"the decode worker's slots of {slot_bytes} bytes hold nothing: raise its slot_bytes")

    @property
    def staging(self) -> Staging:
        assert self._staging is not None, "made with the first channel"
        return self._staging

    @property
    def free_slots(self) -> int:
        return self.slots.num_free

    def forget(self, channel: TcpSendChannel) -> None:
        self.slots.release_all(channel)
        self.poll()

    def poll(self) -> None:
        if self._server is not None:
            self._server.poll()
        for channel in self._channels:
            channel.advance()
        self._channels = [channel for channel in self._channels if not channel.is_over]

    def take_refused(self) -> int:
        return 0 if self._server is None else self._server.take_refused()

    def close(self) -> None:
        if self._server is not None and self._staging is not None:
            self._server.close()
            self._staging.close()
            self._server = None


@dataclass(frozen=True)
class Load:
    """A push that was begun: on its way into the slot."""

    index: int
    items: Items
    copied: Ticket
    ticket: Ticket


class TcpSendChannel:
    """The connection to one D worker. Mutable state: what isn't sent yet."""

    def __init__(self, way: TcpSend, room: Room, seal: Seal, line: SendLine) -> None:
        self._way = way
        self._room = room
        self._seal = seal
        self._line = line
        self._loads: list[Load] = []
        self._is_closed = False

    @property
    def error(self) -> str:
        return self._line.error

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        if not self._line.is_joined:
            self._way.poll()
        can = self._line.is_joined and self._way.slots.next_free(self, self._room.num_slots) is not None
        if not can and not self._line.error:  # an error is for `push` to say
            return NO_ROOM
        sizes = self._way.layer_bytes, self._room.slot_bytes
        return extent_of_slot(*sizes, num_blocks, first_layer, fence)

    def push(
        self,
        sources: Items,
        targets: Items,  # noqa: ARG002 - D knows its targets
        fence: Fence,
        opening: Opening | None = None,  # noqa: ARG002 - D scatters by itself
    ) -> Ticket:
        if self._line.error:
            return Ticket(0, done=True, error=self._line.error)
        index = self._way.slots.next_free(self, self._room.num_slots)
        assert index is not None, "room said so"
        loan = self._way.slots.lend(index, self)
        copied = self._way.copier.gather(self._way.staging.address(index), sources, fence)
        self._way.slots.occupy(index, lambda: not copied.done)
        ticket = Ticket(copied.size_bytes, loan)
        self._loads.append(Load(index, sources, copied, ticket))
        self.advance()
        return ticket

    def advance(self) -> None:
        """Sends what has come to its slot, in order."""
        while self._loads and self._loads[0].copied.done:
            load = self._loads.pop(0)
            ticket, copied = load.ticket, load.copied
            if not copied.error and not self._line.error:
                self._send(load)
            ticket.error = copied.error or self._line.error
            ticket.ready_at_s, ticket.done_at_s = copied.ready_at_s, copied.done_at_s
            ticket.done = True

    def _send(self, load: Load) -> None:
        assert load.ticket.slot is not None
        sent: list[IsSent] = []
        self._way.slots.occupy(load.index, lambda: not all(is_sent() for is_sent in sent))
        total, items = load.copied.size_bytes, load.items
        for offset in range(0, total, self._way.chunk_bytes):
            size = min(self._way.chunk_bytes, total - offset)
            data = self._way.staging.view(load.index, offset, size)
            if self._way.zero:
                data[:] = bytes(size)
            head = Head(load.ticket.slot, offset, size, total, items.count, items.layers.start, checksum(data))
            sent.append(self._line.send(self._seal.close(head), data))
            if self._line.error:
                return

    def release(self, slot: int) -> None:
        self._way.slots.release(slot, self)

    def close(self) -> None:
        """What is still being copied ends with an error, when it is; what was sent keeps its slot until it is gone."""
        self._line.error = self._line.error or "the decode instance is gone"
        self._is_closed = True
        self._line.close()
        self._way.forget(self)

    @property
    def is_over(self) -> bool:
        return self._is_closed and not self._loads
