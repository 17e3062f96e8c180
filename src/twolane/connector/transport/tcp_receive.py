"""Transport `tcp`, D's half: receives into slots of its own, and copies from there into waiting blocks. See tcp.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from twolane.connector.layout import KVLayout
from twolane.connector.settings import ConnectorSettings, keys_of
from twolane.connector.transport.base import Items, Ticket
from twolane.connector.transport.copier import Copier
from twolane.connector.transport.data_sockets import DataClient, ReceiveLine, ZmqClient
from twolane.connector.transport.frames import ALIVE, KEY_BYTES, TOKEN_BYTES, FrameError, Head, Seal, checksum
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay
from twolane.connector.transport.inbox import Inbox, Size
from twolane.connector.transport.slots import Staging
from twolane.connector.transport.tcp import Invitation, Room
from twolane.errors import TransferError


def tcp_receive(layout: KVLayout, copier: Copier, settings: ConnectorSettings, poller: zmq.Poller | None) -> TcpReceive:
    slot_bytes = max(settings.slot_bytes or copier.slot_bytes, layout.max_item_bytes)
    client = ZmqClient(settings.peer_timeout_s, poller, keys_of(settings))
    return TcpReceive(layout, copier, client, slot_bytes=slot_bytes, num_slots=settings.num_slots)


class TcpReceive(ReceiveWay):
    """D's half. Mutable state: its halves, and the slots that it may still promise. A P beyond those gets one."""

    name = "tcp"

    def __init__(
        self, layout: KVLayout, copier: Copier, client: DataClient, *, slot_bytes: int, num_slots: int
    ) -> None:
        self.layer_bytes = layout.layer_bytes
        self.copier = copier
        self.client = client
        self.refused = 0
        self._slot_bytes = slot_bytes
        self._share = max(1, num_slots // 2)
        self._unpromised = num_slots
        self._halves: list[TcpReceiveHalf] = []

    def open(self) -> TcpReceiveHalf:
        room = Room(max(1, min(self._share, self._unpromised)), self._slot_bytes)
        self._unpromised -= room.num_slots
        half = TcpReceiveHalf(self, room)
        self._halves.append(half)
        return half

    def forget(self, half: TcpReceiveHalf, room: Room) -> None:
        if half in self._halves:
            self._halves.remove(half)
            self._unpromised += room.num_slots

    def poll(self) -> None:
        for half in self._halves:
            half.poll()

    def take_refused(self) -> int:
        refused, self.refused = self.refused, 0
        return refused

    def close(self) -> None:
        for half in list(self._halves):
            half.close()
        self.client.close()


@dataclass
class Read:
    """A Push that came. `copied`: on its way into D's blocks."""

    loan: int
    items: Items
    ticket: Ticket
    copied: Ticket | None = None


class TcpReceiveHalf(ReceiveHalf):
    """The connection to one P worker. Mutable state: its slots, reads in the order of their pushes, what went wrong."""

    name = "tcp"
    direct = False

    def __init__(self, way: TcpReceive, room: Room) -> None:
        self._way = way
        self._room = room
        self._error = "there is no data connection"
        self._reads: list[Read] = []
        self._inbox = Inbox(0, 0)
        self._seal = Seal(b"")
        self._staging: Staging | None = None
        self._line: ReceiveLine | None = None

    def offer(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self._room)

    def attach(self, data: dict[str, Any], pid: int) -> None:  # noqa: ARG002 - the connection says who is there
        try:
            invitation = msgspec.convert(data, Invitation)
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's invitation isn't understood: {error}") from error
        room = invitation.room
        if room.num_slots > self._room.num_slots or room.slot_bytes > self._room.slot_bytes:
            raise TransferError("the prefill worker wants more room than it was offered")
        if len(invitation.token) != TOKEN_BYTES or len(invitation.key) != KEY_BYTES:
            raise TransferError("the prefill worker's token or key is too short")
        self._line = self._way.client.join(invitation.address, invitation.token)
        self._inbox = Inbox(room.num_slots, room.slot_bytes)
        self._seal = Seal(invitation.key)
        self._staging = Staging(self._way.copier, room.num_slots, room.slot_bytes)
        self._error = ""

    def read(self, slot: int, items: Items) -> Ticket:
        if self._error:
            raise TransferError(self._error)
        size = Size(items.size_bytes(self._way.layer_bytes), items.count, items.layers.start)
        if size.total > self._room.slot_bytes:
            raise TransferError(f"a push of {items.count} items is larger than its slot")
        try:
            self._inbox.want(slot, size)
        except FrameError as error:
            raise TransferError(str(error)) from error
        ticket = Ticket(size.total, slot)
        self._reads.append(Read(slot, items, ticket))
        self._scatter()
        return ticket

    def discard(self, slot: int, size_bytes: int) -> Ticket:  # noqa: ARG002 - the bytes' head says it
        self._inbox.discard(slot)
        return Ticket(0, slot, done=True)

    def poll(self) -> None:
        """Takes in at most as much as a slot holds, so that nobody waits long for the lock."""
        try:
            self._receive()
        except FrameError as error:
            self._way.refused += 1
            self._break(f"data from the prefill worker: {error}")
        self._scatter()

    def _receive(self) -> None:
        left = self._room.slot_bytes
        while self._line is not None and left > 0 and (frame := self._line.next_head()) is not None:
            if frame != ALIVE:
                left -= self._take(self._seal.open(frame))

    def _take(self, head: Head) -> int:
        assert self._line is not None
        assert self._staging is not None
        slot = self._inbox.place(head)
        if slot is None:
            return self._line.take(None)
        with self._staging.view(slot, head.offset, head.size) as data:
            if self._line.take(data) != head.size:
                raise FrameError("more or fewer bytes than the head says")
            if checksum(data) != head.crc:
                raise FrameError("the bytes changed on the way")
        self._inbox.arrived(head)
        return head.size

    def _scatter(self) -> None:
        """Begins to copy what is whole, and ends what is copied; both in order."""
        for read in self._reads:
            if read.copied is None and (slot := self._inbox.whole(read.loan)) is not None:
                assert self._staging is not None
                read.copied = self._way.copier.scatter(self._staging.address(slot), read.items)
        while self._reads and (copied := self._reads[0].copied) is not None and copied.done:
            read = self._reads.pop(0)
            self._inbox.done(read.loan)
            read.ticket.error, read.ticket.done = copied.error, True

    def _break(self, error: str) -> None:
        """Nothing more comes; what is being copied is."""
        self._error = self._error or error
        if self._line is not None:
            self._line.close()
            self._line = None
        for read in self._reads:
            if read.copied is None:
                read.copied = Ticket(0, done=True, error=self._error)
        self._scatter()

    def revoke(self) -> float:
        self._break("the data connection was closed")
        return 0.0

    def close(self) -> None:
        """Idempotent. No read may be in flight."""
        self.revoke()
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._way.forget(self, self._room)
