"""The staged GPU transports on simulated streams (sim_streams.py): layers go ahead while a pass computes the next ones.

tests/contract and tests/gpu have the real thing, on GPUs.
"""

from __future__ import annotations

import pytest

from tests.connector.sim_pair import BLOCK_BYTES, ITEM_BYTES, LAYERS, SOURCES, TARGETS, Pair, wait_for
from tests.connector.sim_streams import Device
from twolane.connector.parts import Part

MARKED = 6  # layers: of 18 every third is


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


@pytest.mark.parametrize("transport", ["shm", "nccl"])
@pytest.mark.parametrize("unwanted", [{2}, {0, 3, 4}, {6}])
def test_pushes_that_nobody_wants_leave_the_others_right(device: Device, transport: str, unwanted: set[int]) -> None:
    """More pushes than slots: each comes back."""
    pair = Pair(device, transport, BLOCK_BYTES)
    pair.unwanted = unwanted
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    pair.move_until(fence, lambda: pair.landed.block == len(SOURCES))
    pair.check()
    pair.close()


def test_zeros_for_a_test_that_must_notice_are_what_d_gets(device: Device) -> None:
    """The fault `zero_kv`, in slots that the GPU fills after P's thread has gone on."""
    pair = Pair(device, "shm", BLOCK_BYTES, zero=True)
    fence = pair.launch_pass()
    wait_for(lambda: bool(pair.sending.room(1, 0, fence)))
    part = Part(0, 1, range(LAYERS))
    ticket = pair.sending.push(part.of(SOURCES), part.of(TARGETS), fence)
    pair.compute(LAYERS)
    pair.wait(ticket)
    assert ticket.slot is not None
    pair.wait(pair.receiving.read(ticket.slot, part.of(TARGETS)))
    assert pair.landed_blocks() == []
    pair.close()
