"""Faults that once broke something, each as one plain story in the simulated world."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.connector.sim_transport import GRACE_S, LAYERS
from tests.connector.sim_world import SETTINGS, World
from twolane.connector.messages import Ping, Push


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One P, which writes to D's blocks itself if the parameter says so, and one D."""
    made = World([getattr(request, "param", "shm")], 1)
    yield made
    made.close()


def start(world: World, num_tokens: int = 5) -> str:
    """A handoff whose Announce is on its way to P, and whose prompt P has computed."""
    handoff = world.handoff(0, num_tokens)
    world.prefills[0].arrive(handoff, f"p-{handoff.transfer_id}")
    assert world.decodes[0].arrive(handoff, f"d-{handoff.transfer_id}")
    world.decodes[0].step()
    world.decodes[0].turn()
    world.prefills[0].step(f"p-{handoff.transfer_id}", num_tokens + 1)
    return handoff.transfer_id


def push(world: World) -> None:
    """P's turn; its copies are through; the Pushes are on their way."""
    prefill = world.prefills[0]
    prefill.turn()
    for op in list(prefill.copier.ops):
        op.advance(world.now_s)
        op.advance(world.now_s)
    prefill.turn()


def announce(world: World) -> None:
    """D's passes in flight are through, so that its Announce is on its way; P hears it."""
    world.move_all()
    world.decodes[0].turn()
    world.deliver_all()


def deliver(world: World, kind: type, *, to_p: bool) -> None:
    """The first message of this kind, ahead of what was sent before it."""
    wire = next(iter(world.wires.values()))
    queue = wire.to_p if to_p else wire.to_d
    index = next(index for index, message in enumerate(queue) if isinstance(message, kind))
    (world.deliver_to_p if to_p else world.deliver_to_d)(wire, index)


def test_a_slot_is_not_given_back_past_one_that_is_being_read(world: World) -> None:
    """A Credit gives back the slots before it too; D threw the second push away while it still read the first."""
    first, second = start(world, 1), start(world, 1)
    world.deliver_all()
    push(world)
    decode = world.decodes[0]
    decode.drop(f"d-{second}")
    decode.step()
    decode.turn()
    world.deliver_all()  # D begins to read the first slot, and has no use for the second
    world.deliver_all()
    assert f"d-{first}" in decode.waiting
    assert world.prefills[0].shm.free_slots <= 3, "D still reads the first"


def test_a_slot_that_is_thrown_away_is_given_back_once_d_is_through_with_it(world: World) -> None:
    """Not when the Push comes: its bytes may still be on their way out of it."""
    name = start(world, 1)
    world.deliver_all()
    push(world)
    prefill, decode = world.prefills[0], world.decodes[0]
    decode.drop(f"d-{name}")
    for _ in range(3):
        decode.step()
        decode.turn()
        world.deliver_all()
    assert prefill.shm.free_slots == 3
    world.move_all()
    decode.turn()
    world.deliver_all()
    assert prefill.shm.free_slots == 4


@pytest.mark.parametrize("numbers", [(-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, -1, 1), (0, 1, 0, 0), (0, 1, 1, LAYERS)])
def test_a_push_whose_numbers_cant_be_ends_the_connection(world: World, numbers: tuple[int, int, int, int]) -> None:
    """Also where nobody waits for it: it says how much is to be thrown away."""
    start(world, 1)
    world.calm(10)
    wire, prefill = next(iter(world.wires.values())), world.prefills[0]
    prefill.side._peers.say(prefill.name_of(wire), Push("nobody's", *numbers, slot=0))
    world.deliver_to_d(wire)
    assert not wire.is_open


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_push_that_d_finds_late_is_not_read_out_of_a_slot_of_somebody_else(world: World, is_reading: bool) -> None:
    """D hangs until P has given its slots to others; then it goes on where it was, its copy begun or not."""
    start(world, 2)
    world.deliver_all()
    push(world)
    decode = world.decodes[0]
    if is_reading:
        world.deliver_all()
        assert decode.copier.ops
    decode.is_hung = True
    world.pass_time(SETTINGS.peer_timeout_s + 0.1)
    prefill = world.prefills[0]
    prefill.turn()
    assert prefill.shm.free_slots == 4
    other = world.add_decode()
    handoff = world.handoff(0, 2)
    prefill.arrive(handoff, "p-other")
    assert other.arrive(handoff, "d-other")
    other.step()
    other.turn()
    prefill.step("p-other", 3)
    world.deliver_all()
    push(world)
    decode.is_hung = False
    world.deliver_all()
    world.calm(100)
    decode.check_nothing_left()


def test_a_slot_that_is_still_being_written_is_not_lent_again(world: World) -> None:
    """Its D died, the copy into the slot waits for a forward pass; another D's push overtakes it."""
    start(world, 2)
    world.deliver_all()
    prefill = world.prefills[0]
    prefill.turn()
    assert prefill.copier.ops
    world.kill(world.decodes[0])
    world.tell_deaths()
    assert prefill.shm.free_slots == 3, "one is being written"
    world.move_all()
    prefill.turn()
    assert prefill.shm.free_slots == 4


@pytest.mark.parametrize("world", ["direct"], indirect=True)
def test_an_announce_that_comes_behind_a_ping_is_not_served(world: World) -> None:
    """P has told D that it knows nothing of the transfer, and D has given its blocks to others."""
    name = start(world)
    wire = next(iter(world.wires.values()))
    world.deliver_to_p(wire)
    world.pass_time(1.1)
    world.decodes[0].turn()
    deliver(world, Ping, to_p=True)
    while wire.to_d:
        world.deliver_to_d(wire)
    decode = world.decodes[0]
    decode.step()
    decode.drop(f"d-{name}")
    world.calm(20)


def test_blocks_are_not_announced_while_a_forward_pass_may_still_write_to_them(world: World) -> None:
    first = start(world)
    world.calm(10)
    decode = world.decodes[0]
    assert f"d-{first}" not in decode.waiting
    decode.step()  # launches a pass that writes to the first request's blocks
    decode.drop(f"d-{first}")
    start(world)
    world.deliver_all()
    push(world)
    world.deliver_all()
    for op in decode.copier.ops[1:]:  # the pass is slow
        op.advance(world.now_s)
        op.advance(world.now_s)
    world.calm(10)
    decode.check_nothing_left()


def test_a_d_that_connects_anew_leaves_nothing_of_its_old_connection_on_p(world: World) -> None:
    """At once: not by a deadline."""
    start(world)
    world.deliver_all()
    push(world)  # a slot is lent
    prefill, decode = world.prefills[0], world.decodes[0]
    next(iter(world.wires.values())).to_d.clear()
    decode.side.on_garbage(prefill.address, ValueError("a broken frame"), world.now_s)
    start(world)
    world.deliver_all()
    assert len(prefill.side._peers._by_name) == 1
    assert prefill.shm.free_slots == 4


@pytest.mark.parametrize("world", ["direct"], indirect=True)
def test_d_keeps_blocks_that_p_may_still_write_to(world: World) -> None:
    name = start(world)
    world.deliver_all()
    prefill, decode = world.prefills[0], world.decodes[0]
    prefill.turn()
    prefill.copier.ops[0].advance(world.now_s)  # the kernel has looked at the permission
    decode.drop(f"d-{name}")
    for _ in range(3):
        decode.step()
        decode.turn()
        world.deliver_all()
        prefill.turn()
    assert f"d-{name}" in decode.waiting
    world.calm(10)
    assert f"d-{name}" not in decode.waiting
    decode.check_nothing_left()


def test_what_was_computed_before_a_preemption_is_not_sent_after_it(world: World) -> None:
    name = start(world)
    prefill, decode = world.prefills[0], world.decodes[0]
    prefill.step(preempt=f"p-{name}")
    world.deliver_all()
    push(world)
    assert prefill.shm.free_slots == 4, "the blocks are others' by now"
    world.calm(10)
    assert f"d-{name}" not in decode.waiting
    assert decode.side.take_counters().kv_received_transfers == 1


@pytest.mark.parametrize("world", ["direct"], indirect=True)
def test_what_is_being_sent_at_a_preemption_is_read_before_others_write(world: World) -> None:
    name = start(world)
    world.deliver_all()
    prefill, decode = world.prefills[0], world.decodes[0]
    prefill.turn()
    assert prefill.copier.ops, "pushes in flight"
    prefill.step(preempt=f"p-{name}")
    world.calm(10)  # D looks at what it computes with
    assert f"d-{name}" not in decode.waiting
    assert decode.side.take_counters().kv_received_transfers == 1


@pytest.mark.parametrize("world", ["direct"], indirect=True)
@pytest.mark.parametrize("has_begun", [False, True])
def test_what_a_p_that_hangs_still_writes_lands_in_no_blocks_of_others(world: World, has_begun: bool) -> None:
    """Its copy begins after D has revoked the permission, or ends after that."""
    name = start(world)
    world.deliver_all()
    prefill, decode = world.prefills[0], world.decodes[0]
    prefill.turn()
    prefill.is_hung = True
    world.pass_time(SETTINGS.peer_timeout_s + 0.1)
    if has_begun:
        prefill.copier.ops[0].advance(world.now_s)
    decode.turn()
    decode.step()
    assert f"d-{name}" in decode.waiting, "within the grace"
    world.pass_time(GRACE_S + 0.01)
    for _ in range(2):
        decode.turn()
        decode.step()
    assert f"d-{name}" not in decode.waiting
    decode.drop(f"d-{name}")
    world.move_all()
    decode.check_nothing_left()


@pytest.mark.parametrize("world", ["tcp"], indirect=True)
@pytest.mark.parametrize("bytes_first", [True, False])
def test_bytes_that_nobody_wants_leave_room_for_those_that_are_wanted(world: World, bytes_first: bool) -> None:
    """More transfers than D has slots are dropped when their bytes are on the way, and never a connection is lost."""
    decode = world.decodes[0]
    start(world, 1)
    world.calm(10)
    (pipe,) = world.network.pipes
    for _ in range(6):
        name = start(world, 1)
        announce(world)
        push(world)
        if bytes_first:
            world.network.move_all()
        decode.drop(f"d-{name}")
        decode.step()
        decode.turn()
        world.deliver_all()
        world.calm(3)
    last = start(world, 1)
    world.calm(10)
    assert f"d-{last}" not in decode.waiting
    assert world.network.pipes == [pipe]
    assert not pipe.is_cut
    assert decode.side.take_counters().kv_received_transfers == 2


@pytest.mark.parametrize("world", ["tcp"], indirect=True)
def test_bytes_whose_pushes_are_lost_make_room_for_later_ones(world: World) -> None:
    start(world, 1)
    world.calm(10)
    (pipe,) = world.network.pipes
    start(world, 1)
    announce(world)
    push(world)
    world.network.move_all()
    wire = next(iter(world.wires.values()))
    wire.to_d.clear()
    for _ in range(2):
        start(world, 1)
        last = start(world, 1)  # two at once, which take all of D's slots
        announce(world)
        push(world)
        world.network.move_all()
        world.deliver_all()
        world.decodes[0].turn()
        world.move_all()
        world.decodes[0].turn()
        world.deliver_all()
    assert not pipe.is_cut
    world.calm(10)
    assert f"d-{last}" not in world.decodes[0].waiting
    assert not pipe.is_cut


@pytest.mark.parametrize("world", ["tcp"], indirect=True)
def test_a_lost_data_connection_is_made_again_while_messages_still_come_through(world: World) -> None:
    start(world, 1)
    world.calm(10)
    world.network.pipes[0].cut()
    start(world, 1)
    world.calm(30)
    start(world, 1)
    world.calm(10)
    assert not world.decodes[0].waiting
    assert world.decodes[0].side.take_counters().kv_received_transfers >= 2


@pytest.mark.parametrize("world", ["tcp"], indirect=True)
def test_a_slot_that_a_socket_still_reads_is_not_lent_again(world: World) -> None:
    """P gives a D up that hangs; its bytes are still on their way."""
    start(world, 1)
    world.calm(10)
    start(world, 1)
    announce(world)
    push(world)
    (pipe,) = world.network.pipes
    assert pipe.on_the_way
    world.decodes[0].is_hung = True
    world.pass_time(SETTINGS.peer_timeout_s + 0.1)
    prefill = world.prefills[0]
    prefill.turn()
    assert not prefill.side._peers._by_name
    assert prefill.tcp.free_slots == 3
    world.network.move_all()
    assert prefill.tcp.free_slots == 4
