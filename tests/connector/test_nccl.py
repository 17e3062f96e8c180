"""NCCL matches sends with receives by their order alone: what keeps the transport `nccl` from taking one's bytes for
another's, on simulated streams (sim_streams.py). tests/contract and tests/gpu have the real thing, on GPUs."""

from __future__ import annotations

import gc
import time
import weakref
from functools import partial

import pytest

from tests.connector.sim_pair import BLOCK_BYTES, LAYERS, TARGETS, Pair, wait_for
from tests.connector.sim_streams import Device
from twolane.connector.parts import Part
from twolane.errors import TransferError


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_push_that_was_lost_is_noticed_at_the_next(device: Device, is_wanted: bool) -> None:
    pair = Pair(device, "nccl", BLOCK_BYTES)
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    _, second = pair.push_block(0, fence), pair.push_block(1, fence)
    assert second.slot is not None
    take = (
        partial(pair.receiving.read, second.slot, Part(1, 1, range(LAYERS)).of(TARGETS))
        if is_wanted
        else partial(pair.receiving.discard, second.slot, BLOCK_BYTES)
    )
    with pytest.raises(TransferError, match="isn't lent to us"):
        take()
    device.advance()
    assert pair.landed_blocks() == []
    pair.close()


def test_no_number_is_used_again(device: Device) -> None:
    """More loans than slots; a Credit that came twice, or of a loan that never was, frees none."""
    pair = Pair(device, "nccl", BLOCK_BYTES)
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    slots = []
    for number in range(6):
        slot = pair.push_block(number, fence).slot
        assert slot is not None
        slots.append(slot)
        pair.wait(pair.receiving.discard(slot, BLOCK_BYTES))
        pair.sending.release(slot)
    assert slots == list(range(6))
    for number in range(4):
        pair.push_block(number, fence)
    for stale in (-1, 0, 5, 10):
        pair.sending.release(stale)
    assert not pair.sending.room(1, 0, fence)
    pair.close()


def test_a_slot_that_is_thrown_away_is_ps_again_once_its_bytes_have_come(device: Device) -> None:
    """P sends out of it until then."""
    pair = Pair(device, "nccl", BLOCK_BYTES)
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    ticket = pair.receiving.discard(0, BLOCK_BYTES)
    time.sleep(0.05)
    pair._receivers.poll()
    assert not ticket.done
    pair.push_block(0, fence)
    pair.wait(ticket)
    assert not ticket.error
    assert pair.landed_blocks() == []
    pair.close()


@pytest.mark.parametrize("size_bytes", [0, -1, BLOCK_BYTES + 1])
def test_what_fits_no_slot_is_not_thrown_away(device: Device, size_bytes: int) -> None:
    pair = Pair(device, "nccl", BLOCK_BYTES)
    with pytest.raises(TransferError, match="doesn't fit"):
        pair.receiving.discard(0, size_bytes)
    pair.close()


@pytest.mark.parametrize("is_revoked", [True, False])
def test_a_read_that_is_cut_off_has_failed_and_writes_nothing_more(
    device: Device,
    is_revoked: bool,
) -> None:
    """The abort ends the receive like any other, and what lies behind it on the stream runs: with whose bytes ever."""
    pair = Pair(device, "nccl", BLOCK_BYTES)
    ticket = pair.receiving.read(0, Part(0, 1, range(LAYERS)).of(TARGETS))
    wait_for(lambda: any(stream.ops for stream in device._streams))
    if is_revoked:
        assert pair.receiving.revoke() == 0
    else:
        device.is_cut = True
    pair.wait(ticket)
    assert ticket.error or not ticket.is_intact()
    wait_for(lambda: bool(pair.sending.error) or is_revoked)
    for tensor in pair.target.values():
        tensor.zero_()  # the blocks are others' now
    device.advance()
    assert not any(stream.ops for stream in device._streams)
    assert pair.landed_blocks() == []
    pair.close()


def test_a_read_that_never_began_fails_with_its_connection(device: Device) -> None:
    device.have_met = False
    pair = Pair(device, "nccl", BLOCK_BYTES)
    pair.num_computed = LAYERS
    assert not pair.sending.room(1, 0, pair.launch_pass())
    ticket = pair.receiving.read(0, Part(0, 1, range(LAYERS)).of(TARGETS))
    pair.receiving.revoke()
    pair.wait(ticket)
    assert ticket.error
    with pytest.raises(TransferError, match="there is no communicator"):
        pair.receiving.discard(1, BLOCK_BYTES)
    pair.close()


def test_new_connections_take_no_new_streams(device: Device) -> None:
    """Of torch's few: sooner or later one that others copy on."""
    pair, nums = Pair(device, "nccl", BLOCK_BYTES), []
    pair.num_computed = LAYERS
    fence = pair.launch_pass()
    for _ in range(3):
        slot = pair.push_block(0, fence).slot
        assert slot == 0
        pair.wait(pair.receiving.discard(slot, BLOCK_BYTES))
        nums.append(device.num_asked_for)
        pair.connect_anew()
    assert nums[0] == nums[2]
    pair.close()


def test_a_closed_channel_keeps_no_memory(device: Device) -> None:
    """Also with pushes and reads in mid-air, and without a garbage collector (vLLM freezes it)."""
    gc.disable()
    try:
        pair = Pair(device, "nccl", BLOCK_BYTES)
        pair.num_computed = LAYERS
        fence = pair.launch_pass()
        pair.push_block(0, fence)
        for number in range(3):
            pair.receiving.discard(number, BLOCK_BYTES)
        halves = [pair.sending, next(iter(pair.receiving._halves.values()))]  # type: ignore[attr-defined]
        buffers = [weakref.ref(buffer) for half in halves for buffer in half._buffers]
        assert len(buffers) == 8
        pair.sending.close()
        pair.receiving.close()

        def are_gone() -> bool:
            pair._senders.poll()
            pair._receivers.poll()
            return not any(buffer() is not None for buffer in buffers)

        wait_for(are_gone)
    finally:
        gc.enable()
    pair.close()
