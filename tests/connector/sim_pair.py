"""P's and D's ends of a staged GPU transport in one process, on simulated streams (sim_streams.py)."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.connector.sim_streams import PACKAGE, Device
from twolane.connector.host import host_identity
from twolane.connector.layout import KVLayout, layout_of
from twolane.connector.parts import Cursor, Part
from twolane.connector.transport.base import Fence, Ticket
from twolane.connector.transport.hub import Receivers, Senders
from twolane.connector.transport.shm import ShmReceive, ShmSend

NUM_BLOCKS, LAYERS = 12, 18
SOURCES, TARGETS = [3, 7, 1, 9, 0, 5, 11], [2, 4, 6, 8, 10, 0, 1]
PATIENCE_S = 30.0


def memory(*, fill: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_BLOCKS, 2, 4, 8)
    return {
        f"layer.{i}": torch.randn(shape, generator=generator) if fill else torch.zeros(shape) for i in range(LAYERS)
    }


class Pair:
    """P and D with a stream of P's engine. Mutable state: how many layers the engine may compute."""

    def __init__(self, device: Device, transport: str, slot_bytes: int, *, zero: bool = False) -> None:
        self.num_computed = 0
        self.unwanted: set[int] = set()  # numbers of pushes that D throws away
        self._device = device
        self._zero = zero
        self._truth, self._source, self.target = memory(fill=True), memory(fill=False), memory(fill=False)
        ours, theirs = (layout_of(kv, NUM_BLOCKS) for kv in (self._source, self.target))
        make = {"shm": self._shm, "nccl": self._nccl}[transport]
        self._senders, self._receivers = make(ours, theirs, slot_bytes)
        self._connect()
        self._begun, self.landed = Cursor(LAYERS), Cursor(LAYERS)
        self._flying: list[tuple[Part, Ticket]] = []
        self._reads: list[tuple[Part, Ticket, int]] = []
        self.parts: list[Part] = []

    def _connect(self) -> None:
        self.receiving = self._receivers.open()
        self.sending, chosen = self._senders.open(self.receiving.offers, os.getpid(), host_identity())
        self.receiving.attach(chosen, os.getpid())

    def connect_anew(self) -> None:
        """Once nothing of the old connection is left."""
        self.sending.close()
        self.receiving.close()
        wait_for(lambda: not any(thread.name == "twolane-nccl" for thread in threading.enumerate()))
        self._connect()

    @staticmethod
    def _copiers(*layouts: KVLayout) -> list[Any]:
        make = importlib.import_module(f"{PACKAGE}.copier").CudaCopier
        return [make(layout, lambda: None) for layout in layouts]

    def _shm(self, ours: KVLayout, theirs: KVLayout, slot_bytes: int) -> tuple[Senders, Receivers]:
        own, other = self._copiers(ours, theirs)
        send = ShmSend(ours, own, slot_bytes=slot_bytes, num_slots=8, zero=self._zero)
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
                self._reads.append((part, self._take(part, ticket.slot, ticket.size_bytes), ticket.slot))
            self._receivers.poll()
            while self._reads and self._reads[0][1].done:
                part, ticket, slot = self._reads.pop(0)
                assert (ticket.error, ticket.is_intact()) == ("", True)
                self.landed.pass_by(part)
                self.sending.release(slot)
            time.sleep(0.001)

    def _take(self, part: Part, slot: int, size_bytes: int) -> Ticket:
        if self.parts.index(part) in self.unwanted:
            return self.receiving.discard(slot, size_bytes)
        return self.receiving.read(slot, part.of(TARGETS))

    def push_block(self, number: int, fence: Fence) -> Ticket:
        """All of it, where a slot holds a block; D hears nothing."""
        wait_for(lambda: bool(self.sending.room(1, 0, fence)))
        part = Part(number, 1, range(LAYERS))
        ticket = self.sending.push(part.of(SOURCES), part.of(TARGETS), fence)
        self.wait(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> None:
        def is_done() -> bool:
            self._senders.poll()
            self._receivers.poll()
            return ticket.done

        wait_for(is_done)

    def landed_blocks(self) -> list[int]:
        return [block for block in range(NUM_BLOCKS) if any(tensor[block].any() for tensor in self.target.values())]

    def _push(self, fence: Fence) -> None:
        left = len(SOURCES) - self._begun.block
        if left and (extent := self.sending.room(self._begun.num_open or left, self._begun.layer, fence)):
            part = Part(self._begun.block, *extent)
            self._flying.append((part, self.sending.push(part.of(SOURCES), part.of(TARGETS), fence)))
            self._begun.pass_by(part)
            self.parts.append(part)

    def check(self) -> None:
        """All blocks of wanted pushes are in place, and nothing else is."""
        wanted = [part for number, part in enumerate(self.parts) if number not in self.unwanted]
        for name, tensor in self.target.items():
            expected = torch.zeros_like(tensor)
            for part in wanted:
                expected[part.of(TARGETS).blocks] = self._truth[name][part.of(SOURCES).blocks]
            assert torch.equal(tensor, expected), name

    def close(self) -> None:
        self.sending.close()
        self.receiving.close()
        self._senders.close()
        self._receivers.close()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


ITEM_BYTES = 2 * 4 * 8 * 4
BLOCK_BYTES = LAYERS * ITEM_BYTES
