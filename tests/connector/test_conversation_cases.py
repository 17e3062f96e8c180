"""Faults that once broke something, each as one plain story in the simulated world."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.connector.sim_world import World


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One P, which writes to D's blocks itself if the parameter says so, and one D."""
    made = World([getattr(request, "param", False)], 1)
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
