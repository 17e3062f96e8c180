"""The two state machines of a transfer, without sockets: what is sent when, and who may touch which block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.connector.sim_transport import StillComputing
from twolane.connector.incoming import Incoming, IncomingState
from twolane.connector.messages import Announce
from twolane.connector.outgoing import Outgoing
from twolane.connector.parts import Part
from twolane.connector.stats import Cause
from twolane.connector.transport.base import Extent, Fence, extent_of_slot
from twolane.errors import TransferError

BLOCK_SIZE = 4
LAYERS = 3
FENCE = Fence()


def part(first_block: int, num_blocks: int, first_layer: int = 0, end_layer: int = LAYERS) -> Part:
    return Part(first_block, num_blocks, range(first_layer, end_layer))


def next_part(out: Outgoing, num_items: int = 100) -> Part | None:
    """As much as a slot of so many items holds."""
    if not out.is_ready:
        return None
    extent = extent_of_slot([1] * LAYERS, num_items, *out.next_size(), out.push_fence)
    return out.next_part(extent) if extent else None


def outgoing(num_tokens: int = 10, first_block: int = 0, digest: bytes = b"same") -> tuple[Outgoing, Announce]:
    blocks = -(-num_tokens // BLOCK_SIZE)
    announce = Announce("t", num_tokens, first_block, list(range(100 + first_block, 100 + blocks)), digest)
    return Outgoing("r", "t", b"same", BLOCK_SIZE, LAYERS), announce


def incoming(num_tokens: int = 10, first_block: int = 0) -> Incoming:
    _, announce = outgoing(num_tokens, first_block)
    made = Incoming("r", announce, "p:1", LAYERS, BLOCK_SIZE, progress_at_s=0.0)
    made.announced(0.0)
    return made


def land(inc: Incoming, push: Part, now_s: float) -> None:
    inc.begun(push)
    inc.has_landed(push, now_s)


def drain(out: Outgoing, num_items: int = 100) -> list[Part]:
    pushes = []
    while push := next_part(out, num_items):
        out.begun(push)
        out.done()
        pushes.append(push)
    return pushes


def test_a_chunk_is_sent_as_soon_as_its_blocks_are_full() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    assert drain(out) == []
    out.advance([7, 8], FENCE, replace=True, num_valid_tokens=6)
    assert drain(out) == [part(0, 1)]  # block 0 is full, block 1 isn't
    out.advance([9], FENCE, replace=False, num_valid_tokens=11)
    assert drain(out) == [part(1, 2)]  # the tail too: all that D needs is valid
    assert out.ended == ""


def test_a_late_announce_gets_everything_at_once() -> None:
    out, announce = outgoing(num_tokens=10)
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    assert not out.is_ready
    out.accept(announce, b"peer")
    assert next_part(out) == part(0, 3)
    assert list(out.sources(part(1, 2, 1, 2))) == [(8, 1), (9, 1)]


def test_blocks_that_d_has_are_not_sent() -> None:
    out, announce = outgoing(num_tokens=10, first_block=2)
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    out.accept(announce, b"peer")
    push = next_part(out)
    assert push == part(0, 1)
    assert list(out.sources(push)) == [(9, 0), (9, 1), (9, 2)]
    assert out.num_tokens == 2


def test_preemption_stops_reading_and_resumes_with_the_new_blocks() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    out.advance([7, 8], FENCE, replace=True, num_valid_tokens=8)
    out.begun(part(0, 1, 0, 1))
    out.done()
    out.retract()
    assert next_part(out) is None
    out.advance([1, 2, 3], FENCE, replace=True, num_valid_tokens=11)
    push = next_part(out)
    assert push == part(0, 1, 1)
    assert list(out.sources(push)) == [(1, 1), (1, 2)]
    assert drain(out) == [part(0, 1, 1), part(1, 2)]


def test_another_prompt_is_refused() -> None:
    out, announce = outgoing(digest=b"other")
    with pytest.raises(TransferError, match="different prompts"):
        out.accept(announce, b"peer")


def test_the_lease_begins_with_the_end_of_the_request_and_is_renewed_by_every_word() -> None:
    out, _ = outgoing()
    assert not out.lease_over(1000.0, 0.0, 30.0)  # still computing
    out.computed(1000.0)
    assert not out.lease_over(1029.0, 0.0, 30.0)
    assert out.lease_over(1031.0, 0.0, 30.0)
    assert not out.lease_over(1031.0, 1010.0, 30.0)


WRONG = [part(1, 2), part(0, 4), part(0, 0), part(0, 1, 0, 0), part(0, 1, 1), part(0, 1, 0, LAYERS + 1), part(-1, 1)]


@pytest.mark.parametrize("push", WRONG)
def test_a_gap_an_overrun_or_nothing_is_an_error(push: Part) -> None:
    with pytest.raises(TransferError, match="was due"):
        incoming().targets(push)


def test_a_repeated_push_is_an_error() -> None:
    inc = incoming()
    land(inc, part(0, 2), 1.0)
    with pytest.raises(TransferError, match="was due"):
        inc.targets(part(0, 2))


@pytest.mark.parametrize("push", [part(0, 1, 1), part(0, 3, 1), part(1, 2, 1), part(0, 2, 2), part(0, 2), part(2, 1)])
def test_what_was_begun_layer_by_layer_goes_on_with_the_same_blocks(push: Part) -> None:
    inc = incoming()
    land(inc, part(0, 2, 0, 1), 1.0)
    with pytest.raises(TransferError, match="was due"):
        inc.targets(push)
    assert list(inc.targets(part(0, 2, 1))) == [(100, 1), (100, 2), (101, 1), (101, 2)]


def test_a_block_of_which_a_layer_is_missing_is_invalid() -> None:
    inc = incoming(num_tokens=10)
    land(inc, part(0, 1), 1.0)
    land(inc, part(1, 2, 0, LAYERS - 1), 1.0)
    inc.fail(Cause.PEER_DIED, "P died", 2.0)
    assert inc.invalid_blocks() == [101, 102]
    assert inc.landed_tokens == BLOCK_SIZE


def test_blocks_that_are_being_read_are_not_free() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    out.begun(part(0, 3))
    assert next_part(out) is None
    out.end("cancelled")
    before = out.is_over
    out.done()
    assert (before, out.is_over) == (False, True)
    assert out.ended == "cancelled"


def test_a_failed_transfer_is_over_only_when_p_writes_no_more() -> None:
    inc = incoming()
    inc.begun(part(0, 2))
    inc.fail(Cause.CANCELLED, "client gone", 1.0, dropped=True)
    assert inc.state is IncomingState.ENDING
    inc.fence()
    before = inc.is_over  # a read is in flight
    inc.has_landed(part(0, 2), 2.0)
    assert (before, inc.is_over) == (False, True)
    assert inc.state.value == "failed"


def test_a_transfer_nobody_knows_of_is_over_at_once() -> None:
    _, announce = outgoing()
    inc = Incoming("r", announce, "p:1", LAYERS, BLOCK_SIZE, progress_at_s=0.0)
    inc.fail(Cause.CANCELLED, "client gone", 1.0, dropped=True)
    assert inc.is_over


def test_layers_of_a_pass_that_computes_go_ahead_and_the_later_pass_holds_up_none_of_them() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    first, second = StillComputing(), StillComputing()
    out.advance([7, 8], first, replace=True, num_valid_tokens=8)
    push = next_part(out, num_items=4)
    assert push == part(0, 2, 0, 2)
    assert out.push_fence is first
    out.begun(push)
    out.advance([9], second, replace=False, num_valid_tokens=11)
    assert out.push_fence is first
    push = next_part(out, num_items=4)
    assert push == part(0, 2, 2)
    out.begun(push)
    assert out.push_fence is second
    assert next_part(out, num_items=4) == part(2, 1)


def test_layers_that_are_not_sent_yet_are_computed_anew_after_a_preemption() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    out.advance([7, 8], StillComputing(), replace=True, num_valid_tokens=8)
    out.begun(part(0, 2, 0, 1))
    out.retract()
    out.advance([1], FENCE, replace=True, num_valid_tokens=4)
    assert next_part(out) is None, "one of the two blocks that were begun isn't final"
    out.advance([2, 3], FENCE, replace=False, num_valid_tokens=11)
    assert out.push_fence is FENCE
    push = next_part(out)
    assert push == part(0, 2, 1)
    assert list(out.sources(push)) == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("slot", "blocks", "first_layer", "fence", "extent"),
    [
        (100, 7, 0, FENCE, Extent(7, range(3))),
        (13, 7, 0, FENCE, Extent(2, range(3))),
        (5, 7, 0, FENCE, Extent(1, range(2))),  # a block is larger than the slot
        (5, 1, 2, FENCE, Extent(1, range(2, 3))),
        (100, 7, 0, StillComputing(), Extent(7, range(3))),
        (13, 7, 0, StillComputing(), Extent(4, range(2))),  # a layer of as many blocks as possible, and one more
        (13, 4, 2, FENCE, Extent(4, range(2, 3))),  # goes on so when the pass is over
        (2, 7, 0, StillComputing(), Extent(0, range(3))),
    ],
)
def test_what_a_slot_holds(slot: int, blocks: int, first_layer: int, fence: Fence, extent: Extent) -> None:
    """Layers of 1, 2 and 3 bytes a block."""
    assert extent_of_slot([1, 2, 3], slot, blocks, first_layer, fence) == extent
    assert bool(extent) == (slot > 2)


def test_progress_moves_the_deadline() -> None:
    inc = incoming()
    assert inc.overdue(11.0, 10.0)
    land(inc, part(0, 1, 0, 1), 5.0)
    assert not inc.overdue(11.0, 10.0)


@given(
    num_tokens=st.integers(1, 60),
    steps=st.lists(st.integers(1, 17), max_size=30),
    announce_at=st.integers(0, 10),
    num_items=st.integers(1, 7),
    fence=st.sampled_from([FENCE, StillComputing()]),
    data=st.data(),
)
def test_whatever_the_chunks_every_item_is_sent_once_in_order_and_never_too_early(
    num_tokens: int, steps: list[int], announce_at: int, num_items: int, fence: Fence, data: st.DataObject
) -> None:
    first_block = data.draw(st.integers(0, (num_tokens - 1) // BLOCK_SIZE))
    out, announce = outgoing(num_tokens, first_block)
    inc = incoming(num_tokens, first_block)
    total, valid, blocks = num_tokens + 1, 0, 0
    for index, step in enumerate([*steps, total]):
        if index == min(announce_at, len(steps)):
            out.accept(announce, b"peer")
        valid = min(total, valid + step)
        new = list(range(blocks, -(-valid // BLOCK_SIZE)))
        blocks += len(new)
        out.advance(new, fence, replace=False, num_valid_tokens=valid)
        while push := next_part(out, num_items):
            assert list(out.targets(push)) == list(inc.targets(push))
            for (source, layer), (target, target_layer) in zip(out.sources(push), inc.targets(push), strict=True):
                assert target - 100 == source
                assert layer == target_layer
                assert min((source + 1) * BLOCK_SIZE, num_tokens) <= valid
            out.begun(push)
            out.done()
            land(inc, push, 0.0)
    assert out.ended == ""
    assert inc.state is IncomingState.LANDED
    assert inc.landed_tokens == out.num_tokens
