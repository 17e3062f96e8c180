"""The staged GPU transports on simulated streams (sim_streams.py): layers go ahead while a pass computes the next ones.

tests/contract and tests/gpu have the real thing, on GPUs.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.connector.sim_streams import PACKAGE, Device, simulated
from twolane.connector.host import host_identity
from twolane.connector.layout import KVLayout, layout_of
from twolane.connector.parts import Cursor, Part
from twolane.connector.transport.base import Fence, Ticket
from twolane.connector.transport.hub import Receivers, Senders
from twolane.connector.transport.shm import ShmReceive, ShmSend

NUM_BLOCKS, LAYERS = 12, 18
SOURCES, TARGETS = [3, 7, 1, 9, 0, 5, 11], [2, 4, 6, 8, 10, 0, 1]
MARKED = 6  # layers: of 18 every third is
PATIENCE_S = 30.0


def memory(*, fill: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_BLOCKS, 2, 4, 8)
    return {
        f"layer.{i}": torch.randn(shape, generator=generator) if fill else torch.zeros(shape) for i in range(LAYERS)
    }


class Pair:
    """P and D with a stream of P's engine. Mutable state: how many layers the engine may compute."""

    def __init__(self, device: Device, transport: str, slot_bytes: int) -> None:
        self.num_computed = 0
        self._device = device
        self._truth, self._source, self.target = memory(fill=True), memory(fill=False), memory(fill=False)
        ours, theirs = (layout_of(kv, NUM_BLOCKS) for kv in (self._source, self.target))
        make = {"shm": self._shm, "nccl": self._nccl}[transport]
        self._senders, self._receivers = make(ours, theirs, slot_bytes)
        self._channel_of_d = self._receivers.open()
        self._channel, chosen = self._senders.open(self._channel_of_d.offers, os.getpid(), host_identity())
        self._channel_of_d.attach(chosen, os.getpid())
        self._begun, self.landed = Cursor(LAYERS), Cursor(LAYERS)
        self._flying: list[tuple[Part, Ticket]] = []
        self._reads: list[tuple[Part, Ticket, int]] = []
        self.parts: list[Part] = []

    @staticmethod
    def _copiers(*layouts: KVLayout) -> list[Any]:
        make = importlib.import_module(f"{PACKAGE}.copier").CudaCopier
        return [make(layout, lambda: None) for layout in layouts]

    def _shm(self, ours: KVLayout, theirs: KVLayout, slot_bytes: int) -> tuple[Senders, Receivers]:
        own, other = self._copiers(ours, theirs)
        send = ShmSend(ours, own, slot_bytes=slot_bytes, num_slots=8)
        return Senders(own, [send]), Receivers(other, [ShmReceive(theirs, other)])

    def _nccl(self, ours: KVLayout, theirs: KVLayout, slot_bytes: int) -> tuple[Senders, Receivers]:
        own, other = self._copiers(ours, theirs)
        nccl = importlib.import_module(f"{PACKAGE}.nccl")
        send = nccl.NcclSend(own, slot_bytes=slot_bytes, num_slots=4)
        return Senders(own, [send]), Receivers(other, [nccl.NcclReceive(other)])

    def launch_pass(self) -> Fence:
        for layer in range(LAYERS):
            self._device.enqueue(self._device.current(), self._compute(layer))
            self._senders.layer_done(f"layer.{layer}")
        return self._senders.fence()

    def _compute(self, layer: int) -> Callable[[], bool]:
        name = f"layer.{layer}"

        def op() -> bool:
            if self.num_computed <= layer:
                return False
            self._source[name][SOURCES] = self._truth[name][SOURCES]
            return True

        return op

    def compute(self, num_layers: int) -> None:
        self.num_computed = num_layers
        self._device.advance()

    def move_until(self, fence: Fence, is_there: Callable[[], bool]) -> None:
        """What both sides' agents do."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_there():
            assert time.monotonic() < deadline_s
            self._push(fence)
            self._senders.poll()
            while self._flying and self._flying[0][1].done:
                part, ticket = self._flying.pop(0)
                assert not ticket.error
                assert ticket.slot is not None
                read = self._channel_of_d.read(ticket.slot, part.of(TARGETS))
                self._reads.append((part, read, ticket.slot))
            self._receivers.poll()
            while self._reads and self._reads[0][1].done:
                part, ticket, slot = self._reads.pop(0)
                assert (ticket.error, ticket.is_intact()) == ("", True)
                self.landed.pass_by(part)
                self._channel.release(slot)
            time.sleep(0.001)

    def _push(self, fence: Fence) -> None:
        left = len(SOURCES) - self._begun.block
        if left and (extent := self._channel.room(self._begun.num_open or left, self._begun.layer, fence)):
            part = Part(self._begun.block, *extent)
            self._flying.append((part, self._channel.push(part.of(SOURCES), part.of(TARGETS), fence)))
            self._begun.pass_by(part)
            self.parts.append(part)

    def check(self) -> None:
        for name, tensor in self.target.items():
            expected = torch.zeros_like(tensor)
            expected[TARGETS] = self._truth[name][SOURCES]
            assert torch.equal(tensor, expected), name

    def close(self) -> None:
        self._channel.close()
        self._channel_of_d.close()
        self._senders.close()
        self._receivers.close()


ITEM_BYTES = 2 * 4 * 8 * 4


@pytest.fixture(params=[0, 1, 2])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with simulated(request.param) as made:
        yield made


@pytest.mark.parametrize("transport", ["shm", "nccl"])
@pytest.mark.parametrize("slot_items", [1, 8, 40])
def test_layers_arrive_while_the_pass_computes_the_next_ones(device: Device, transport: str, slot_items: int) -> None:
    pair = Pair(device, transport, slot_items * ITEM_BYTES)
    fence = pair.launch_pass()
    pair.compute(MARKED)
    pair.move_until(fence, lambda: pair.landed.layer > 0)
    assert pair.landed.num_open == min(slot_items, len(SOURCES)), "of as many blocks as a slot holds a layer of"
    pair.compute(LAYERS)
    pair.move_until(fence, lambda: pair.landed.block == len(SOURCES))
    pair.check()
    pair.close()


@pytest.mark.parametrize("transport", ["shm", "nccl"])
def test_of_a_pass_that_is_over_whole_blocks_go(device: Device, transport: str) -> None:
    pair = Pair(device, transport, 2 * LAYERS * ITEM_BYTES)
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    pair.move_until(fence, lambda: pair.landed.block == len(SOURCES))
    assert [(part.num_blocks, len(part.layers)) for part in pair.parts] == [(2, LAYERS)] * 3 + [(1, LAYERS)]
    pair.check()
    pair.close()
