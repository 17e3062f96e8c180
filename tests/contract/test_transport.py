"""What every transport must do, whichever it is: P's KV memory here, D's in another process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from tests.contract.target import NUM_BLOCKS, TWO_HOSTS, Footprint, Memory, TargetProcess, footprint, no_wake
from twolane.connector.host import host_identity
from twolane.connector.layout import layout_of
from twolane.connector.messages import TransportOffer
from twolane.connector.parts import Cursor, Part
from twolane.connector.transport.base import Extent, Fence, Items, Opening, SendChannel, Ticket
from twolane.connector.transport.hub import Senders
from twolane.connector.transport.select import senders_for
from twolane.errors import TransferError

SHAPES = {
    "one piece a block": (NUM_BLOCKS, 3, 16, 8),
    "two pieces a block": (2, NUM_BLOCKS, 16, 3, 8),
    "large items": (NUM_BLOCKS, 16, 512),
}


def block_of(tensor: torch.Tensor, block: int) -> torch.Tensor:
    return tensor[:, block] if tensor.shape[0] == 2 else tensor[block]


@dataclass
class Link:
    """One D worker, connected."""

    number: int
    channel: SendChannel
    direct: bool


@dataclass
class Pair:
    memory: Memory
    source: dict[str, torch.Tensor]
    senders: Senders
    target: TargetProcess
    pid: int

    opened: list[SendChannel] = field(default_factory=list)

    def connect(self) -> Link:
        number, offers = self.target.open()
        channel, chosen = self.open(offers)
        return Link(number, channel, self.target.attach(number, chosen, os.getpid()))

    def open(self, offers: list[TransportOffer]) -> tuple[SendChannel, TransportOffer]:
        channel, chosen = self.senders.open(offers, self.pid, host_identity())
        self.opened.append(channel)
        return channel, chosen

    def wait(self, ticket: Ticket) -> Ticket:
        deadline_s = time.monotonic() + 10
        while not ticket.done:
            assert time.monotonic() < deadline_s
            self.senders.poll()
            time.sleep(0.001)
        return ticket

    @property
    def layers(self) -> range:
        return range(self.memory.layers)

    def room(self, link: Link, num_blocks: int = 1, first_layer: int = 0, fence: Fence | None = None) -> Extent:
        """Once there is some: the two sides may still be meeting."""
        deadline_s = time.monotonic() + 30
        fence = fence or self.senders.fence()
        while not (room := link.channel.room(num_blocks, first_layer, fence)):
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        return room

    def footprints(self) -> list[Footprint]:
        """P's and D's."""
        return [footprint(), self.target.footprint()]

    def at_rest(self) -> list[Footprint]:
        """Once nothing has changed for half a second."""
        last, since_s = self.footprints(), time.monotonic()
        while time.monotonic() - since_s < 0.5:
            time.sleep(0.1)
            if (now := self.footprints()) != last:
                last, since_s = now, time.monotonic()
        return last

    def push(self, link: Link, blocks: list[tuple[int, int]], fence: Fence | None = None) -> int:
        """Moves (source, target) block pairs with as many pushes as it takes; returns bytes."""
        fence = fence or self.senders.fence()
        sources, targets = [source for source, _ in blocks], [target for _, target in blocks]
        cursor, moved = Cursor(self.memory.layers), 0
        while cursor.block < len(blocks):
            num_blocks = cursor.num_open or len(blocks) - cursor.block
            part = Part(cursor.block, *self.room(link, num_blocks, cursor.layer, fence))
            wanted = part.of(targets)
            ticket = self.wait(link.channel.push(part.of(sources), wanted, fence))
            assert not ticket.error
            if ticket.slot is not None:
                assert self.target.read(link.number, ticket.slot, wanted) == ticket.size_bytes
                link.channel.release(ticket.slot)
            cursor.pass_by(part)
            moved += ticket.size_bytes
        return moved

    def throw_away(self, link: Link, block: int, fence: Fence) -> None:
        """Pushes layers of the block to a D that doesn't want them; a direct P would write them all the same."""
        if link.direct:
            return
        items = Items([block], self.room(link, 1, 0, fence).layers)
        ticket = self.wait(link.channel.push(items, items, fence))
        assert not ticket.error
        assert ticket.slot is not None
        self.target.discard(link.number, ticket.slot, ticket.size_bytes)
        link.channel.release(ticket.slot)


def ways() -> list[object]:
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    on_gpu = [
        pytest.param(("cuda:0", transport), marks=[pytest.mark.gpu, gpu], id=f"gpu-{transport}")
        for transport in ("shm", "cuda_ipc", "tcp", "nccl")
    ]
    two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
    on_gpu += [
        pytest.param(("cuda:0", transport, "cuda:1"), marks=[pytest.mark.gpu, two], id=f"two-gpus-{transport}")
        for transport in ("shm", "cuda_ipc", "nccl", "tcp")
    ]
    return [*(pytest.param(("cpu", transport), id=f"cpu-{transport}") for transport in ("shm", "tcp")), *on_gpu]


@pytest.fixture(scope="module")
def child() -> Iterator[TargetProcess]:
    process = TargetProcess()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def child_elsewhere() -> Iterator[TargetProcess]:
    process = TargetProcess(env=TWO_HOSTS)
    yield process
    process.stop()


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


@pytest.fixture(params=ways())
def pair(request: pytest.FixtureRequest, shape: tuple[int, ...]) -> Iterator[Pair]:
    device, transport, *other = request.param
    child = request.getfixturevalue("child_elsewhere" if request.param == ("cuda:0", "nccl") else "child")
    memory = Memory(shape, device, transport)
    source = memory.make(fill=True)
    senders = senders_for(layout_of(source, NUM_BLOCKS), memory.settings(), no_wake)
    made = Pair(memory, source, senders, child, child.make(replace(memory, device=other[0]) if other else memory))
    yield made
    for channel in made.opened:
        channel.close()
    senders.close()
    child.end()


def test_bytes_arrive_in_shuffled_blocks_and_nowhere_else(pair: Pair) -> None:
    moves = [(0, 5), (3, 1), (7, 7), (2, 0)]
    size_bytes = sum(block_of(tensor, 0).nbytes for tensor in pair.source.values())
    assert pair.push(pair.connect(), moves) == len(moves) * size_bytes
    for name, tensor in pair.target.contents().items():
        for source, target in moves:
            assert torch.equal(block_of(tensor, target), block_of(pair.source[name], source).cpu())
        for untouched in (2, 3, 4, 6):
            assert not block_of(tensor, untouched).any()


def test_two_d_workers_get_what_is_theirs_and_one_that_leaves_disturbs_nobody(pair: Pair) -> None:
    first, second = pair.connect(), pair.connect()
    pair.push(first, [(1, 1)])
    pair.push(second, [(2, 2)])
    first.channel.close()
    pair.target.close(first.number)
    pair.push(second, [(3, 3)])
    for name, tensor in pair.target.contents().items():
        for block in (1, 2, 3):
            assert torch.equal(block_of(tensor, block), block_of(pair.source[name], block).cpu())


def test_what_was_pushed_is_what_was_there_when_it_was_pushed(pair: Pair) -> None:
    link = pair.connect()
    expected = {name: block_of(tensor, 4).cpu().clone() for name, tensor in pair.source.items()}
    wanted = Items([4], pair.layers)
    assert pair.room(link) == Extent(1, pair.layers)
    ticket = link.channel.push(wanted, wanted, pair.senders.fence())
    pair.senders.quiesce()  # what follows on the compute stream runs behind the push
    for tensor in pair.source.values():
        block_of(tensor, 4).zero_()
    pair.wait(ticket)
    if ticket.slot is not None:
        pair.target.read(link.number, ticket.slot, wanted)
    for name, tensor in pair.target.contents().items():
        assert torch.equal(block_of(tensor, 4), expected[name])


def test_a_push_waits_for_the_forward_pass_it_is_behind(pair: Pair) -> None:
    link = pair.connect()
    if pair.memory.device != "cpu":
        torch.cuda._sleep(200_000_000)  # about 0.1 s of a forward pass  # type: ignore[no-untyped-call]
    moves = [(6, 6), (0, 3), (5, 1), (2, 2), (7, 0)]  # of large items a slot holds one layer of four
    for layer, (name, tensor) in enumerate(pair.source.items()):
        for source, _ in moves:
            block_of(tensor, source).fill_(8.0 * layer + source)
        pair.senders.layer_done(name)
    pair.push(link, moves)
    for layer, tensor in enumerate(pair.target.contents().values()):
        for source, target in moves:
            assert bool((block_of(tensor, target) == 8.0 * layer + source).all())


def test_a_revoked_p_writes_nothing_more(pair: Pair) -> None:
    link = pair.connect()
    if not link.direct:
        pytest.skip("only D writes to D's memory")
    time.sleep(pair.target.revoke(link.number))
    pair.push(link, [(0, 0)])
    assert not any(tensor.any() for tensor in pair.target.contents().values())


@pytest.mark.parametrize("is_over", [False, True])
def test_what_ds_gpu_reads_behind_a_gate_is_all_there(pair: Pair, is_over: bool) -> None:
    """P's pass goes on when the push begins, or is over."""
    link, blocks = pair.connect(), Items(list(range(NUM_BLOCKS)), pair.layers)
    for _ in range(10):
        if (word := pair.target.launch_behind_gate(link.number)) is None:
            pytest.skip("D reads what it has copied itself")
        if not is_over:
            torch.cuda._sleep(100_000_000)  # some 50 ms
        ticket = link.channel.push(blocks, blocks, pair.senders.fence(), Opening(word, []))
        if not is_over:
            assert not pair.target.has_stepped()
        pair.wait(ticket)
        for name, tensor in pair.target.seen().items():
            assert torch.equal(tensor, pair.source[name].cpu())


def test_a_slot_has_one_owner_until_it_is_given_back(pair: Pair) -> None:
    first, second = pair.connect(), pair.connect()
    pair.room(first)
    item, room = Items([0], pair.layers), (1, 0, pair.senders.fence())
    slots: list[int | None] = []
    while len(slots) < 10 and first.channel.room(*room):
        slots.append(pair.wait(first.channel.push(item, item, pair.senders.fence())).slot)
    if slots[0] is None:
        pytest.skip("no slots")
    share = 4 if pair.memory.transport == "nccl" else 2  # whose slots are the pair's own, none of another peer's
    assert len(slots) == len(set(slots)) == share, "a peer's share is bounded"
    assert pair.room(second), "and leaves room for others"
    for slot in slots:
        assert slot is not None
        second.channel.release(slot)
    assert not first.channel.room(*room), "nobody gives back what isn't his"
    first.channel.close()
    assert pair.room(pair.connect())


def test_bytes_that_nobody_wants_are_not_taken_for_the_next_ones(pair: Pair) -> None:
    """More pushes than slots, every other one thrown away."""
    link = pair.connect()
    fence, moves = pair.senders.fence(), [(block, (block + 3) % NUM_BLOCKS) for block in range(NUM_BLOCKS)]
    for number, move in enumerate(moves):
        if number % 2:
            pair.push(link, [move], fence)
        else:
            pair.throw_away(link, move[0], fence)
    for name, tensor in pair.target.contents().items():
        for number, (source, target) in enumerate(moves):
            expected = block_of(pair.source[name], source).cpu() * (number % 2)
            assert torch.equal(block_of(tensor, target), expected)


@pytest.mark.parametrize("slot", [-1, 4, 1 << 40])
def test_a_slot_that_is_none_is_an_error(pair: Pair, slot: int) -> None:
    link = pair.connect()
    if pair.memory.transport == "tcp" and slot >= 0:
        pytest.skip("its bytes may still come")
    with pytest.raises(TransferError, match=r"isn't lent|has no slots"):
        pair.target.read(link.number, slot, Items([0], range(1)))


def test_many_reconnects_leave_nothing_behind(pair: Pair) -> None:
    """200; of NCCL's, which take a second each, 40."""
    is_nccl = pair.memory.transport == "nccl"

    def reconnect(times: int) -> None:
        for _ in range(times):
            link = pair.connect()
            pair.push(link, [(0, 0)])
            link.channel.close()
            pair.target.close(link.number)

    reconnect(3)
    before = pair.at_rest() if is_nccl else pair.footprints()
    reconnect(40 if is_nccl else 200)
    slack_mib = 16 if is_nccl else 0  # NCCL's pools: not even half a MiB each time
    deadline_s = time.monotonic() + 30
    while not is_back(after := pair.footprints(), before, slack_mib):  # sockets close in their own time
        assert time.monotonic() < deadline_s, f"(descriptors, arenas, free MiB) of P and D: {before}, then {after}"
        time.sleep(0.01)


def is_back(after: list[Footprint], before: list[Footprint], slack_mib: int) -> bool:
    return all(now[:2] == then[:2] and now[2] >= then[2] - slack_mib for now, then in zip(after, before, strict=True))


def test_shared_memory_has_no_name(pair: Pair) -> None:
    assert pair.connect()
    assert not list(Path("/dev/shm").glob("*twolane*"))  # noqa: S108


def test_what_p_does_not_have_is_refused_with_the_reason(pair: Pair) -> None:
    with pytest.raises(TransferError, match="no transport in common"):
        pair.senders.open([TransportOffer("carrier pigeon")], pair.pid, host_identity())
    with pytest.raises(TransferError, match=r"another host|isn't understood"):
        pair.senders.open([TransportOffer(pair.memory.transport)], pair.pid, "elsewhere")


def test_another_processes_memory_is_not_taken_for_the_arena(pair: Pair) -> None:
    number, offers = pair.target.open()
    _, chosen = pair.open(offers)
    if chosen.name != "shm":
        pytest.skip("D maps nothing")
    with pytest.raises(TransferError, match="nonce differs"):
        pair.target.attach(number, TransportOffer("shm", {**chosen.data, "nonce": b"0" * 16}), os.getpid())
    with pytest.raises(TransferError, match="same user, in the same PID namespace"):
        pair.target.attach(number, chosen, 1 << 22)
