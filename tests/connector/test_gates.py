"""D's gates on simulated streams (sim_streams.py): what D's GPU reads behind one is all there, whatever comes first."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.connector.sim_pair import LAYERS, NUM_BLOCKS, PATIENCE_S, SOURCES, TARGETS, memory
from tests.connector.sim_streams import PACKAGE, Device, simulated
from twolane.connector.host import host_identity
from twolane.connector.layout import layout_of
from twolane.connector.messages import TransportOffer
from twolane.connector.transport.base import Fence, Gate, Items, Opening, Ticket
from twolane.connector.transport.hub import Receivers, Senders

FIRST, LAST = slice(0, 3), slice(3, None)  # of the blocks: two pushes


class Pair:
    """P and D over cuda_ipc, in one process. Mutable state: whether P's pass is over, and what D's step has read."""

    def __init__(self, device: Device) -> None:
        self.is_computed = False
        self.read: dict[str, torch.Tensor] = {}
        self._device = device
        self._engine_of_d = device.stream()
        self.source, self.target = memory(fill=True), memory(fill=False)
        ours, theirs = (layout_of(kv, NUM_BLOCKS) for kv in (self.source, self.target))
        ipc, copier = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("ipc", "copier"))
        own, other = (copier.CudaCopier(layout, lambda: None) for layout in (ours, theirs))
        self.senders = Senders(own, [ipc.IpcSend(own)])
        self.receivers = Receivers(other, [ipc.IpcReceive(theirs)])
        self.channel_of_d = self.receivers.open()
        self.channel, self.chosen = self.senders.open(self.channel_of_d.offers, os.getpid(), host_identity())

    def attach(self) -> None:
        self.channel_of_d.attach(self.chosen, os.getpid())

    def fence(self) -> Fence:
        """Behind a pass."""
        self._device.enqueue(self._device.current(), lambda: self.is_computed)
        return self.senders.fence()

    def compute(self) -> None:
        self.is_computed = True
        self._device.advance()

    def push(self, blocks: slice, fence: Fence, opening: Opening | None = None) -> Ticket:
        layers = range(LAYERS)
        return self.channel.push(Items(SOURCES[blocks], layers), Items(TARGETS[blocks], layers), fence, opening)

    def step(self, gate: Gate) -> None:
        """D launches one that reads the blocks."""

        def op() -> bool:
            self.read = {name: tensor[TARGETS].clone() for name, tensor in self.target.items()}
            return True

        with self._device.using(self._engine_of_d):
            gate.hold()
            self._device.enqueue(self._device.current(), op)

    def wait(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline_s
            self.senders.poll()
            self.receivers.poll()
            time.sleep(0.001)

    def has_read_all(self) -> bool:
        return all(torch.equal(tensor, self.source[name][SOURCES]) for name, tensor in self.read.items())

    def close(self) -> None:
        self.channel.close()
        self.channel_of_d.close()
        self.senders.close()
        self.receivers.close()


@pytest.fixture(params=range(6))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with simulated(request.param) as device:
        made = Pair(device)
        yield made
        made.compute()
        made.close()


def gate_of(pair: Pair) -> Gate:
    gate = pair.channel_of_d.gate()
    assert gate is not None
    return gate


def test_a_step_launched_before_the_pass_is_over_reads_what_it_computes(pair: Pair) -> None:
    pair.attach()
    gate = gate_of(pair)
    assert gate.is_kept
    pair.step(gate)
    first = pair.push(FIRST, pair.fence())
    last = pair.push(LAST, pair.fence(), Opening(gate.word, [first]))
    assert not pair.read
    pair.compute()
    pair.wait(lambda: bool(pair.read))
    assert pair.has_read_all()
    pair.wait(lambda: last.done)
    gate.close()


def test_the_last_push_opens_behind_one_that_it_overtakes(pair: Pair) -> None:
    """Its own pass was over at once, so it goes on the other stream."""
    pair.attach()
    gate = gate_of(pair)
    pair.step(gate)
    last_fence = pair.senders.fence()
    first = pair.push(FIRST, pair.fence())
    last = pair.push(LAST, last_fence, Opening(gate.word, [first]))
    pair.senders.poll()
    assert not pair.read
    pair.compute()
    pair.wait(lambda: first.done and last.done)
    pair.wait(lambda: bool(pair.read))
    assert pair.has_read_all()


def test_a_gate_that_p_never_opens_opens_when_its_transfer_is_over(pair: Pair) -> None:
    pair.attach()
    gate = gate_of(pair)
    pair.step(gate)
    assert not pair.read
    gate.close()
    pair.wait(lambda: bool(pair.read))
    assert not pair.has_read_all()


def test_a_gate_that_nobody_closes_opens_in_the_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody who could is stuck."""
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.gates"), "HELD_AT_MOST_S", 0.05)
    pair.attach()
    pair.step(gate_of(pair))
    pair.wait(lambda: bool(pair.read))


def test_a_p_that_was_revoked_opens_nothing(pair: Pair) -> None:
    pair.attach()
    gate = gate_of(pair)
    pair.step(gate)
    last = pair.push(slice(None), pair.fence(), Opening(gate.word, []))
    pair.channel_of_d.revoke()
    pair.compute()
    pair.wait(lambda: last.done)
    assert not pair.read
    assert all(not tensor.any() for tensor in pair.target.values())
    gate.close()
    pair.wait(lambda: bool(pair.read))


def test_a_p_that_has_not_said_so_keeps_no_gate(pair: Pair) -> None:
    gate = gate_of(pair)
    assert not gate.is_kept, "before the handshake"
    without: dict[str, Any] = {}
    pair.channel_of_d.attach(TransportOffer("cuda_ipc", without), os.getpid())
    assert not gate.is_kept


def test_a_word_that_is_none_of_ds_gates_is_not_written(pair: Pair) -> None:
    pair.attach()
    gate = gate_of(pair)
    for index in (-1, 1024, 1 << 40):
        done = pair.push(slice(None), pair.senders.fence(), Opening(type(gate.word)(index, 1), []))
        pair.wait(lambda done=done: done.done)  # type: ignore[misc]
    assert not done.error
    gate.close()
