"""The two state machines of a transfer, without sockets: what is sent when, and who may touch which block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twolane.connector.stats import Cause
from twolane.connector.transfer import Incoming, IncomingState, ItemRange, Outgoing
from twolane.connector.transport.base import Fence
from twolane.errors import TransferError
from twolane.protocol import Announce

FENCE = Fence()
BLOCK_SIZE = 4
LAYERS = 3


def outgoing(num_tokens: int = 10, first_block: int = 0, digest: bytes = b"same") -> tuple[Outgoing, Announce]:
    blocks = -(-num_tokens // BLOCK_SIZE)
    announce = Announce("t", num_tokens, first_block, list(range(100 + first_block, 100 + blocks)), digest)
    return Outgoing("r", "t", b"same", BLOCK_SIZE, LAYERS), announce


def incoming(num_tokens: int = 10, first_block: int = 0) -> Incoming:
    _, announce = outgoing(num_tokens, first_block)
    made = Incoming("r", announce, "p:1", LAYERS, BLOCK_SIZE, progress_at_s=0.0)
    made.announced(0.0)
    return made


def land(inc: Incoming, push: ItemRange, now_s: float) -> None:
    inc.begun(push)
    inc.landed(push, now_s)


def drain(out: Outgoing, max_items: int = 100) -> list[ItemRange]:
    pushes = []
    while push := out.next_push(max_items):
        out.begun(push)
        out.done()
        pushes.append(push)
    return pushes


def test_a_chunk_is_sent_as_soon_as_its_blocks_are_full() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    assert drain(out) == []
    out.advance([7, 8], FENCE, replace=True, num_valid_tokens=6)
    assert drain(out) == [ItemRange(0, LAYERS)]  # block 0 is full, block 1 isn't
    out.advance([9], FENCE, replace=False, num_valid_tokens=11)
    assert drain(out) == [ItemRange(LAYERS, 2 * LAYERS)]  # the tail too: all that D needs is valid
    assert out.ended == ""


def test_a_late_announce_gets_everything_at_once() -> None:
    out, announce = outgoing(num_tokens=10)
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    assert out.next_push(100) is None
    out.accept(announce, b"peer")
    assert out.next_push(100) == ItemRange(0, 3 * LAYERS)
    assert list(out.sources(ItemRange(2, 2))) == [(7, 2), (8, 0)]


def test_blocks_that_d_has_are_not_sent() -> None:
    out, announce = outgoing(num_tokens=10, first_block=2)
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    out.accept(announce, b"peer")
    push = out.next_push(100)
    assert push == ItemRange(0, LAYERS)
    assert list(out.sources(push)) == [(9, 0), (9, 1), (9, 2)]
    assert out.num_tokens == 2


def test_preemption_stops_reading_and_resumes_with_the_new_blocks() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    out.advance([7, 8], FENCE, replace=True, num_valid_tokens=8)
    out.begun(ItemRange(0, 1))
    out.done()
    out.retract()
    assert out.next_push(100) is None
    out.advance([1, 2, 3], FENCE, replace=True, num_valid_tokens=11)
    push = out.next_push(100)
    assert push == ItemRange(1, 3 * LAYERS - 1)
    assert next(iter(out.sources(push))) == (1, 1)


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


@pytest.mark.parametrize("push", [ItemRange(1, 2), ItemRange(0, 10), ItemRange(0, 0)])
def test_a_gap_an_overrun_or_nothing_is_an_error(push: ItemRange) -> None:
    with pytest.raises(TransferError, match="were due"):
        incoming().targets(push)


def test_a_repeated_push_is_an_error() -> None:
    inc = incoming()
    land(inc, ItemRange(0, 2), 1.0)
    with pytest.raises(TransferError, match="were due"):
        inc.targets(ItemRange(0, 2))


def test_a_block_of_which_a_layer_is_missing_is_invalid() -> None:
    inc = incoming(num_tokens=10)
    land(inc, ItemRange(0, LAYERS + 2), 1.0)
    inc.fail(Cause.PEER_DIED, "P died", 2.0)
    assert inc.invalid_blocks() == [101, 102]
    assert inc.landed_tokens == BLOCK_SIZE


def test_blocks_that_are_being_read_are_not_free() -> None:
    out, announce = outgoing(num_tokens=10)
    out.accept(announce, b"peer")
    out.advance([7, 8, 9], FENCE, replace=True, num_valid_tokens=11)
    out.begun(ItemRange(0, 3 * LAYERS))
    assert out.next_push(100) is None
    out.end("cancelled")
    before = out.is_over
    out.done()
    assert (before, out.is_over) == (False, True)
    assert out.ended == "cancelled"


def test_a_failed_transfer_is_over_only_when_p_writes_no_more() -> None:
    inc = incoming()
    inc.begun(ItemRange(0, 2))
    inc.fail(Cause.CANCELLED, "client gone", 1.0, dropped=True)
    assert inc.state is IncomingState.ENDING
    inc.fence()
    before = inc.is_over  # a read is in flight
    inc.landed(ItemRange(0, 2), 2.0)
    assert (before, inc.is_over) == (False, True)
    assert inc.state.value == "failed"


def test_a_transfer_nobody_knows_of_is_over_at_once() -> None:
    _, announce = outgoing()
    inc = Incoming("r", announce, "p:1", LAYERS, BLOCK_SIZE, progress_at_s=0.0)
    inc.fail(Cause.CANCELLED, "client gone", 1.0, dropped=True)
    assert inc.is_over


def test_progress_moves_the_deadline() -> None:
    inc = incoming()
    assert inc.overdue(11.0, 10.0)
    land(inc, ItemRange(0, 1), 5.0)
    assert not inc.overdue(11.0, 10.0)


@given(
    num_tokens=st.integers(1, 60),
    steps=st.lists(st.integers(1, 17), max_size=30),
    announce_at=st.integers(0, 10),
    max_items=st.integers(1, 7),
    data=st.data(),
)
def test_whatever_the_chunks_every_item_is_sent_once_in_order_and_never_too_early(
    num_tokens: int, steps: list[int], announce_at: int, max_items: int, data: st.DataObject
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
        out.advance(new, FENCE, replace=False, num_valid_tokens=valid)
        while push := out.next_push(max_items):
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
