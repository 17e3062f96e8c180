"""Transport `tcp` alone: what doesn't fit changes nothing; nobody gets more memory than there is."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch
import zmq

from tests.connector.agents import SETTINGS, Memory, wait_for
from twolane.connector.host import host_identity
from twolane.connector.layout import layout_of
from twolane.connector.messages import TransportOffer
from twolane.connector.transport.base import Fence, Items, Ticket
from twolane.connector.transport.data_sockets import ZmqClient, ZmqServer
from twolane.connector.transport.frames import ALIVE, CHUNK_BYTES, FrameError, Head, Seal, checksum
from twolane.connector.transport.inbox import Inbox, Size
from twolane.connector.transport.select import senders_for
from twolane.connector.transport.slots import Staging
from twolane.connector.transport.tcp import Invitation, Room
from twolane.connector.transport.tcp_receive import TcpReceive, TcpReceiveHalf
from twolane.errors import TransferError

MEMORY = Memory()
LAYOUT = layout_of(MEMORY.make(fill=False), MEMORY.num_blocks)
ITEM = LAYOUT.max_item_bytes
ITEMS = Items([20], range(MEMORY.layers))
ROOM = (1, 0, Fence())
TOTAL = ITEM * MEMORY.layers
BYTES = bytes(range(256)) * (TOTAL // 256 + 1)
KEY, TOKEN = b"k" * 32, b"t" * 32


def head(loan: int = 7, **changes: int) -> Head:
    data = BYTES[:TOTAL]
    made = Head(loan, 0, TOTAL, TOTAL, MEMORY.layers, 0, checksum(data))
    return msgspec.structs.replace(made, **changes)


class Copier:
    """Of a D in host memory; says what was written."""

    slot_bytes = 4096

    def __init__(self) -> None:
        self.scattered: list[bytes] = []

    def pin(self, address: int, size_bytes: int) -> None: ...

    def unpin(self, address: int) -> None: ...

    def scatter(self, address: int, items: object) -> Ticket:
        self.scattered.append(ctypes.string_at(address, TOTAL))
        return Ticket(TOTAL, done=True)


@dataclass
class Fake:
    """A P that says what the test wants, and a real D's half."""

    router: zmq.Socket[bytes]
    route: bytes
    way: TcpReceive
    half: TcpReceiveHalf
    copier: Copier

    def send(self, *frames: bytes) -> None:
        self.router.send_multipart([self.route, *frames])

    def poll_until(self, ticket: Ticket) -> None:
        def is_done() -> bool:
            self.way.poll()
            return ticket.done

        wait_for(is_done, 30.0)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        copier = Copier()
        way = TcpReceive(LAYOUT, copier, ZmqClient(5.0, None), slot_bytes=4096, num_slots=4)  # type: ignore[arg-type]
        half = way.open()
        invitation = Invitation(f"127.0.0.1:{port}", TOKEN, KEY, Room(2, 4096))
        half.attach(msgspec.to_builtins(invitation, builtin_types=(bytes,)), 0)
        assert router.poll(30_000)
        route, token = router.recv_multipart()
        assert token == TOKEN
        yield Fake(router, route, way, half, copier)
        way.close()


@pytest.mark.parametrize("push_first", [True, False])
def test_bytes_and_push_may_come_in_either_order(fake: Fake, push_first: bool) -> None:
    ticket = fake.half.read(7, ITEMS) if push_first else None
    fake.send(ALIVE)
    first, rest = ITEM, TOTAL - ITEM
    seal = Seal(KEY)
    fake.send(seal.close(head(size=first, crc=checksum(BYTES[:first]))), BYTES[:first])
    wait_for(lambda: _received(fake, 7) == first, 30)
    assert not (ticket and ticket.done), "a part isn't all"
    assert not fake.copier.scattered
    fake.send(seal.close(head(offset=first, size=rest, crc=checksum(BYTES[first:TOTAL]))), BYTES[first:TOTAL])
    if ticket is None:
        wait_for(lambda: _received(fake, 7) == TOTAL, 30)
        ticket = fake.half.read(7, ITEMS)
    fake.poll_until(ticket)
    assert not ticket.error
    assert fake.copier.scattered == [BYTES[:TOTAL]]


def _received(fake: Fake, number: int) -> int:
    fake.way.poll()
    loan = fake.half._inbox._loans.get(number)
    return loan.received if loan else 0


BAD = {
    "sealed by nobody": (b"x" * 60, BYTES[:TOTAL]),
    "sealed by somebody else": (Seal(b"z" * 32).close(head()), BYTES[:TOTAL]),
    "not a head": (Seal(KEY).close(head())[:20], BYTES[:TOTAL]),
    "truncated": (Seal(KEY).close(head()), BYTES[: TOTAL - 1]),
    "nothing behind the head": (Seal(KEY).close(head()),),
    "too long": (Seal(KEY).close(head()), BYTES[: TOTAL + 1]),
    "a frame too many": (Seal(KEY).close(head()), BYTES[:TOTAL], b""),
    "changed on the way": (Seal(KEY).close(head()), bytes(TOTAL)),
    "of another size": (Seal(KEY).close(head(total=TOTAL - ITEM, size=TOTAL - ITEM)), BYTES[: TOTAL - ITEM]),
    "of other items": (Seal(KEY).close(head(first_layer=1)), BYTES[:TOTAL]),
    "with a gap": (Seal(KEY).close(head(offset=ITEM, size=TOTAL - ITEM)), BYTES[: TOTAL - ITEM]),
    "larger than a slot": (Seal(KEY).close(head(loan=8, size=5000, total=5000)), BYTES[:5000]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_does_not_fit_is_counted_and_nothing_of_it_is_used(fake: Fake, name: str) -> None:
    ticket = fake.half.read(7, ITEMS)
    fake.send(*BAD[name])
    fake.send(Seal(KEY).close(head()), BYTES[:TOTAL])  # the right one, too late
    fake.poll_until(ticket)
    assert ticket.error
    assert not fake.copier.scattered
    assert fake.way.take_refused() == 1
    with pytest.raises(TransferError):
        fake.half.read(9, ITEMS)


def test_an_oversized_frame_is_not_even_received(fake: Fake) -> None:
    ticket = fake.half.read(7, ITEMS)
    fake.send(Seal(KEY).close(head()), bytes(CHUNK_BYTES + 1))
    wait_for(lambda: fake.router.poll(10) != 0 or not _reaches(fake), 30)
    fake.way.poll()
    assert not ticket.done
    fake.half.revoke()
    assert ticket.error
    assert not fake.copier.scattered


def _reaches(fake: Fake) -> bool:
    fake.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        fake.send(ALIVE)
    except zmq.ZMQError:
        return False
    return True


def test_bytes_that_nobody_wants_take_no_slot(fake: Fake) -> None:
    """More loans than slots, each thrown away before or after its bytes came; then one that is wanted."""
    for loan in range(1, 9):
        if loan % 2:
            assert fake.half.discard(loan, TOTAL).done
        fake.send(Seal(KEY).close(head(loan)), BYTES[:TOTAL])
        if not loan % 2:
            wait_for(lambda loan=loan: _received(fake, loan) == TOTAL, 30)  # type: ignore[misc]
            assert fake.half.discard(loan, TOTAL).done
    ticket = fake.half.read(9, ITEMS)
    fake.send(Seal(KEY).close(head(9)), BYTES[:TOTAL])
    fake.poll_until(ticket)
    assert not ticket.error
    assert len(fake.copier.scattered) == 1


def test_a_stranger_gets_nothing_and_is_counted() -> None:
    kv = MEMORY.make(fill=True)
    settings = msgspec.structs.replace(SETTINGS, transport="tcp")
    senders = senders_for(layout_of(kv, MEMORY.num_blocks), settings, lambda: None)
    half = TcpReceive(LAYOUT, Copier(), ZmqClient(5.0, None), slot_bytes=4096, num_slots=4)  # type: ignore[arg-type]
    channel, chosen = senders.open(half_offers(half.open()), 1, host_identity())
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://{chosen.data['address']}")
        stranger.send(b"open sesame")
        stranger.send_multipart([TOKEN, TOKEN])
        refused: list[int] = []

        def is_refused() -> bool:
            senders.poll()
            refused.append(senders.take_refused())
            return sum(refused) == 2

        wait_for(is_refused, 30)
        assert not channel.room(*ROOM), "D hasn't come yet"
        own = half._halves[0]
        own.attach(chosen.data, 0)
        wait_for(lambda: bool(channel.room(*ROOM)), 30)
        ticket = channel.push(ITEMS, ITEMS, senders.fence())
        assert ticket.slot is not None
        read = own.read(ticket.slot, ITEMS)

        def is_read() -> bool:
            half.poll()
            return read.done

        wait_for(is_read, 30)
        assert not stranger.poll(0)
    half.close()
    senders.close()


def half_offers(half: TcpReceiveHalf) -> list[TransportOffer]:
    return [TransportOffer("tcp", half.offer())]


def test_d_never_promises_more_memory_than_it_has_and_a_slot_each() -> None:
    way = TcpReceive(LAYOUT, Copier(), ZmqClient(5.0, None), slot_bytes=4096, num_slots=8)  # type: ignore[arg-type]
    halves = [way.open() for _ in range(20)]
    rooms = [msgspec.convert(half.offer(), Room) for half in halves]
    assert [room.num_slots for room in rooms] == [4, 4, *[1] * 18]
    for half in halves:
        half.close()
    assert way.open().offer()["num_slots"] == 4
    way.close()


def test_what_p_asks_for_must_be_what_d_offered() -> None:
    way = TcpReceive(LAYOUT, Copier(), ZmqClient(5.0, None), slot_bytes=4096, num_slots=8)  # type: ignore[arg-type]
    for room in (Room(9, 4096), Room(2, 1 << 40)):
        with pytest.raises(TransferError, match="more room than"):
            way.open().attach(msgspec.to_builtins(Invitation("h:1", TOKEN, KEY, room), builtin_types=(bytes,)), 0)
    way.close()


def test_the_inbox_takes_bytes_in_order_only() -> None:
    size = Size(TOTAL, MEMORY.layers, 0)
    inbox = Inbox(1, 4096)
    slot = inbox.place(head(5))
    assert slot is not None
    inbox.arrived(head(5))
    with pytest.raises(FrameError, match="were due"):
        inbox.place(head(5))
    with pytest.raises(FrameError, match="more loans"):
        inbox.place(head(6))
    with pytest.raises(FrameError, match="isn't what its push says"):
        inbox.want(5, Size(TOTAL, MEMORY.layers, 1))
    inbox.want(5, size)
    assert inbox.whole(5) == slot
    with pytest.raises(FrameError, match="isn't lent"):
        inbox.want(5, size)
    inbox.done(5)
    assert inbox.place(head(4)) is None, "its push was lost: another one came after it"
    assert inbox.place(head(6)) is not None


def test_staging_is_given_back_when_a_socket_still_holds_some() -> None:
    staging = Staging(Copier(), 2, 4096)  # type: ignore[arg-type]
    view = staging.view(1, 0, 10)
    staging.close()
    staging.close()
    assert bytes(view) == bytes(10)


def test_sizes_of_items_are_those_of_their_layers() -> None:
    layers = [3, 5, 7]
    for first, end in itertools.combinations(range(4), 2):
        items = Items(list(range(8)), range(first, end))
        assert items.size_bytes(layers) == sum(layers[layer] for _, layer in items)
        assert items.count == len(list(items))


def test_a_pair_that_never_meets_is_given_up() -> None:
    kv = {name: torch.zeros_like(tensor) for name, tensor in MEMORY.make(fill=False).items()}
    settings = msgspec.structs.replace(SETTINGS, transport="tcp", peer_timeout_s=0.1)
    senders = senders_for(layout_of(kv, MEMORY.num_blocks), settings, lambda: None)
    channel, _ = senders.open([TransportOffer("tcp", {"num_slots": 2, "slot_bytes": 4096})], 1, "elsewhere")

    def poll() -> str:
        senders.poll()
        return channel.error

    started_s = time.monotonic()
    wait_for(lambda: "firewall" in poll(), 30)
    assert time.monotonic() - started_s >= 2.0
    assert channel.push(ITEMS, ITEMS, senders.fence()).error
    senders.close()


def test_what_a_d_does_not_take_waits_at_p_and_not_in_ds_memory() -> None:
    server, client = ZmqServer("127.0.0.1", 60.0, None), ZmqClient(60.0, None)
    line = server.admit(TOKEN)
    receiving = client.join(server.address, TOKEN)

    def is_joined() -> bool:
        server.poll()
        return line.is_joined

    wait_for(is_joined, 30)
    chunk = memoryview(bytearray(CHUNK_BYTES))
    sent = [line.send(b"head", chunk) for _ in range(400)]  # of 200 MiB; the system's buffers hold some

    def num_sent() -> int:
        return sum(is_sent() for is_sent in sent)

    wait_for(lambda: num_sent() > 0, 30)
    assert num_sent() < len(sent)
    into = memoryview(bytearray(CHUNK_BYTES))

    def takes_all() -> bool:
        while receiving.next_head() is not None:
            assert receiving.take(into) == CHUNK_BYTES
        return num_sent() == len(sent)

    wait_for(takes_all, 60)
    receiving.close()
    server.close()
    client.close()
