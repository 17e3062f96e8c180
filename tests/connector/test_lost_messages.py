"""A P that loses every tenth message: D computes what didn't come; nobody waits for ever, and no slot stays taken."""

from __future__ import annotations

import msgspec

from tests.connector import agents
from tests.connector.agents import SETTINGS, Decode, Prefill, start_decode, start_prefill
from tests.connector.test_agents import assert_equal_blocks

NUM_TRANSFERS = 40


def hand_off(prefill: Prefill, decode: Decode, number: int) -> bool:
    """Whether it landed. P's blocks come back in any case."""
    for tensor in decode.kv.values():
        tensor.zero_()
    prefill.offer(f"t{number}", f"p{number}")
    decode.receive(prefill.address, [20, 21], num_tokens=8, transfer_id=f"t{number}")
    prefill.compute([3, 4], 9, f"p{number}")
    prefill.finish(f"p{number}")
    landed = not decode.wait_finished()
    if landed:
        assert_equal_blocks(prefill, decode, [(3, 20), (4, 21)])
    prefill.wait_freed(f"p{number}")
    return landed


def test_every_transfer_ends_and_every_slot_comes_back() -> None:
    settings = msgspec.structs.replace(SETTINGS, fault="drop_tenth", transfer_timeout_s=0.3)
    prefill, decode = start_prefill(settings), start_decode(settings)
    try:
        landed = [hand_off(prefill, decode, number) for number in range(NUM_TRANSFERS)]
        assert NUM_TRANSFERS / 2 < sum(landed) < NUM_TRANSFERS
        dropped = prefill.agent.take_counts()["kv_dropped_messages"]
        assert isinstance(dropped, int)
        assert dropped >= NUM_TRANSFERS // 10
        while not hand_off(prefill, decode, len(landed)):  # a slot comes back when a later one does
            landed.append(False)
        agents.wait_for(lambda: prefill.free_slots == SETTINGS.num_slots)
    finally:
        prefill.agent.stop()
        decode.agent.stop()
