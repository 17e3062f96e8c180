"""What every transport must do, whichever it is: a sender and a receiver over two KV memories."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from twolane.connector.layout import layout_of
from twolane.connector.transport.base import Receiver, Sender
from twolane.connector.transport.copier import copier_for
from twolane.connector.transport.shm import ShmReceiver, ShmSender
from twolane.errors import TransferError

NUM_BLOCKS = 8
SHAPES = {
    "one piece a block": (NUM_BLOCKS, 3, 16, 8),
    "two pieces a block": (2, NUM_BLOCKS, 16, 3, 4),
    "large items": (NUM_BLOCKS, 512, 1024),
}


def kv_memory(shape: tuple[int, ...], *, layers: int, fill: bool, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    make = torch.randn if fill else torch.zeros
    kwargs = {"generator": generator} if fill else {}
    return {f"layer.{i}": make(*shape, **kwargs).to(torch.bfloat16).to(device) for i in range(layers)}


def block_of(tensor: torch.Tensor, block: int) -> torch.Tensor:
    return tensor[:, block] if tensor.shape[0] == 2 else tensor[block]


@dataclass
class Pair:
    source: dict[str, torch.Tensor]
    target: dict[str, torch.Tensor]
    sender: Sender
    receiver: Receiver
    description: dict[str, object]
    more: Callable[[], Receiver]
    layers: int = field(default=0)

    def move(self, blocks: list[tuple[int, int]]) -> int:
        """Moves (source, target) block pairs with as many slots as it takes; returns bytes."""
        items = [(block, layer) for block in range(len(blocks)) for layer in range(self.layers)]
        first, moved = 0, 0
        while first < len(items):
            slot = self.sender.acquire(b"peer")
            assert slot is not None
            part = items[first : first + self.sender.capacity(first)]
            self.sender.fence()
            written = self.sender.write(slot, [(blocks[i][0], layer) for i, layer in part])
            read = self.receiver.read(slot, [(blocks[i][1], layer) for i, layer in part])
            assert written == read
            self.sender.release(slot, b"peer")
            first, moved = first + len(part), moved + read
        return moved


def device_params() -> list[object]:
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return ["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, gpu])]


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


@pytest.fixture(params=device_params())
def pair(request: pytest.FixtureRequest, shape: tuple[int, ...]) -> Iterator[Pair]:
    layers = 3
    source = kv_memory(shape, layers=layers, fill=True, device=request.param)
    target = kv_memory(shape, layers=layers, fill=False, device=request.param)
    source_layout, target_layout = layout_of(source, NUM_BLOCKS), layout_of(target, NUM_BLOCKS)
    sender = ShmSender(source_layout, copier_for(source_layout, source), slot_bytes=1 << 16, num_slots=4)
    copier = copier_for(target_layout, target)
    description = sender.describe()

    def connect() -> ShmReceiver:
        return ShmReceiver(target_layout, copier, os.getpid(), description)

    made = Pair(source, target, sender, connect(), description, connect, layers)
    yield made
    made.receiver.close()
    made.sender.close()


def test_bytes_arrive_in_shuffled_blocks_and_nowhere_else(pair: Pair) -> None:
    moves = [(0, 5), (3, 1), (7, 7), (2, 0)]
    assert pair.move(moves) > 0
    for name, tensor in pair.target.items():
        for source, target in moves:
            assert torch.equal(block_of(tensor, target), block_of(pair.source[name], source))
        for untouched in (2, 3, 4, 6):
            assert not block_of(tensor, untouched).any()


def test_a_slot_has_one_owner_until_it_is_released(pair: Pair) -> None:
    mine = {pair.sender.acquire(b"a"), pair.sender.acquire(b"a")}
    assert None not in mine
    assert len(mine) == 2
    assert pair.sender.acquire(b"a") is None, "a peer's share is bounded"
    assert pair.sender.acquire(b"b") not in mine
    for slot in mine:
        assert slot is not None
        pair.sender.release(slot, b"b")
    assert pair.sender.acquire(b"a") is None, "nobody gives back what isn't his"
    pair.sender.release_peer(b"a")
    assert pair.sender.acquire(b"a") in mine


def test_a_slot_that_comes_back_brings_those_that_were_sent_before_it(pair: Pair) -> None:
    lost, answered = pair.sender.acquire(b"a"), pair.sender.acquire(b"a")
    assert answered is not None
    pair.sender.release(answered, b"a")
    assert {pair.sender.acquire(b"a"), pair.sender.acquire(b"a")} == {lost, answered}


def test_a_slot_that_was_sent_later_stays_taken(pair: Pair) -> None:
    first, later = pair.sender.acquire(b"a"), pair.sender.acquire(b"a")
    assert first is not None
    pair.sender.release(first, b"a")
    assert pair.sender.acquire(b"a") == first
    assert pair.sender.acquire(b"a") is None, f"{later} is the peer's still"


def test_a_written_slot_keeps_its_bytes_when_the_blocks_change(pair: Pair) -> None:
    slot = pair.sender.acquire(b"peer")
    assert slot is not None
    expected = block_of(pair.source["layer.0"], 4).clone()
    pair.sender.write(slot, [(4, 0)])
    block_of(pair.source["layer.0"], 4).zero_()
    pair.receiver.read(slot, [(4, 0)])
    assert torch.equal(block_of(pair.target["layer.0"], 4), expected)


@pytest.mark.parametrize("slot", [-1, 4, 1 << 40])
def test_a_slot_outside_the_arena_is_an_error(pair: Pair, slot: int) -> None:
    with pytest.raises(TransferError, match="outside the arena"):
        pair.receiver.read(slot, [(0, 0)])


def test_200_reconnects_leave_no_descriptor_and_no_mapping_behind(pair: Pair) -> None:
    def footprint() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/maps").read_text().count("twolane-kv")

    before = footprint()
    for _ in range(200):
        pair.more().close()
    assert footprint() == before


def test_shared_memory_has_no_name(pair: Pair) -> None:
    assert not list(Path("/dev/shm").glob("*twolane*"))  # noqa: S108


def test_another_processes_memory_is_not_taken_for_the_arena(pair: Pair) -> None:
    layout = layout_of(pair.target, NUM_BLOCKS)
    copier = copier_for(layout, pair.target)
    with pytest.raises(TransferError, match="nonce differs"):
        ShmReceiver(layout, copier, os.getpid(), {**pair.description, "nonce": b"0" * 16})
    with pytest.raises(TransferError, match="same user, in the same PID namespace"):
        ShmReceiver(layout, copier, 1 << 22, pair.description)
