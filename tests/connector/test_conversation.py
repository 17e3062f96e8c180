"""The whole conversation between P and D under every fault there is, in a simulated world (see sim_world.py).

`make test` runs a fixed set of examples. TWOLANE_CONVERSATION=long tries new ones, many (`make faults`);
TWOLANE_CONVERSATION=find takes the first failure as it is, for scripts/mutate.py.
"""

from __future__ import annotations

import logging
import os

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.connector.sim_world import (
    D_ENDS_WITHIN_S,
    P_ENDS_WITHIN_S,
    TURN_S,
    Decode,
    Handoff,
    Prefill,
    Way,
    Wire,
    World,
)

logger = logging.getLogger("vllm.twolane")
PROFILE = os.environ.get("TWOLANE_CONVERSATION", "")
IS_LONG = PROFILE == "long"
WAYS: list[Way] = ["direct", "shm", "tcp"]
INDEX = st.integers(0, 7)
CHANCE = st.sampled_from([True, False, False])  # of what would otherwise end most of what goes on


class Conversation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logger.disabled = True  # thousands of warnings
        self.world = World([], 0)
        self.heals = True
        self.for_p: list[Handoff] = []  # legs that are on their way
        self.for_d: list[Handoff] = []

    @initialize(
        ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=2), num_decodes=st.integers(1, 2), heals=st.booleans()
    )
    def begin(self, ways: list[Way], num_decodes: int, heals: bool) -> None:
        self.world = World(ways, num_decodes)
        self.heals = heals

    # -- whom a rule is about

    def prefill(self, index: int) -> Prefill:
        return self.world.prefills[index % len(self.world.prefills)]

    def decode(self, index: int) -> Decode:
        return self.world.decodes[index % len(self.world.decodes)]

    def wire(self, index: int) -> Wire | None:
        wires = list(self.world.wires.values())
        return wires[-1 - index % len(wires)] if wires else None

    # -- requests

    @rule(
        p=INDEX,
        d=INDEX,
        num_tokens=st.integers(1, 5),
        first_block=st.sampled_from([0, 0, 1]),
        legs=st.sampled_from(["both", "both", "both", "P", "D", "differ"]),
    )
    def client_asks(self, p: int, d: int, num_tokens: int, first_block: int, legs: str) -> None:
        """The legs that aren't named come later, or never."""
        made = self.world.handoff(p % len(self.world.prefills), num_tokens, first_block, differs=legs == "differ")
        self.for_p.append(made)
        self.for_d.append(made)
        if legs != "D":
            self.p_gets_its_leg(-1)
        if legs != "P":
            self.d_gets_its_leg(-1, d)

    @precondition(lambda self: self.for_p)
    @rule(index=INDEX)
    def p_gets_its_leg(self, index: int) -> None:
        made = self.for_p.pop(index % len(self.for_p))
        prefill = next(one for one in self.world.prefills if one.address == made.address)
        if prefill.runs:
            prefill.arrive(made, f"p-{made.transfer_id}")

    @precondition(lambda self: self.for_d)
    @rule(index=INDEX, d=INDEX)
    def d_gets_its_leg(self, index: int, d: int) -> None:
        decode = self.decode(d)
        made = self.for_d.pop(index % len(self.for_d))
        if decode.runs and not decode.arrive(made, f"d-{made.transfer_id}"):
            self.for_d.append(made)

    @rule(p=INDEX, request=INDEX, num_tokens=st.integers(1, 6))
    def p_is_preempted(self, p: int, request: int, num_tokens: int) -> None:
        """One request; another one gets the blocks in the same step."""
        prefill = self.prefill(p)
        names = list(prefill.running)
        if prefill.runs and names:
            victim = names.pop(request % len(names))
            prefill.step(names[0] if names else "", num_tokens, victim)

    @rule(p=INDEX, request=INDEX, gives_up=st.booleans())
    def p_request_ends(self, p: int, request: int, gives_up: bool) -> None:
        prefill = self.prefill(p)
        names = prefill.computed + (list(prefill.running) if gives_up else [])
        if prefill.runs and names:
            prefill.end(names[request % len(names)])
            prefill.step()

    @rule(d=INDEX, request=INDEX)
    def d_request_ends(self, d: int, request: int) -> None:
        decode = self.decode(d)
        if decode.runs and decode.blocks:
            decode.drop(list(decode.blocks)[request % len(decode.blocks)])
            decode.step()
            decode.turn()
            decode.step()

    # -- how things go on: one rule, since each of these alone comes to nothing

    @rule(
        moves=st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        "p computes",
                        "p computes",
                        "p turns",
                        "d steps",
                        "d turns",
                        "to p",
                        "to p",
                        "to d",
                        "to d",
                        "bytes",
                        "data",
                        "data",
                    ]
                ),
                INDEX,
                INDEX,
            ),
            min_size=1,
            max_size=12,
        )
    )
    def some_things_go_on(self, moves: list[tuple[str, int, int]]) -> None:
        for what, which, detail in moves:
            self.go_on(what, which, detail)

    def go_on(self, what: str, which: int, detail: int) -> None:
        prefill, decode = self.prefill(which), self.decode(which)
        match what:
            case "p computes" if prefill.runs:
                names = list(prefill.running)
                prefill.step(names[detail % len(names)] if names else "", 1 + detail)
            case "p turns" if prefill.runs:
                prefill.turn()
            case "d steps" if decode.runs:
                decode.step()
            case "d turns" if decode.runs:
                decode.turn()
            case "to p" if wires := [one for one in self.world.wires.values() if one.to_p]:
                self.world.deliver_to_p(wires[which % len(wires)])
            case "to d" if wires := [one for one in self.world.wires.values() if one.to_d]:
                self.world.deliver_to_d(wires[which % len(wires)])
            case "bytes" if workers := [one for one in self.world.workers.values() if one.copier.ops]:
                ops = workers[which % len(workers)].copier.ops
                ops[detail % len(ops)].advance(self.world.now_s)
            case "data" if pipes := [pipe for pipe in self.world.network.pipes if pipe.can_move]:
                pipes[which % len(pipes)].move()

    @rule(rounds=st.integers(1, 8))
    def all_goes_well(self, rounds: int) -> None:
        self.world.calm(rounds)

    # -- the network's faults

    @rule(wire=INDEX, to_p=st.booleans(), index=INDEX)
    def message_arrives_out_of_order(self, wire: int, to_p: bool, index: int) -> None:
        if chosen := self.wire(wire):
            queue = chosen.to_p if to_p else chosen.to_d
            if queue:
                (self.world.deliver_to_p if to_p else self.world.deliver_to_d)(chosen, index % len(queue))

    @rule(chance=CHANCE, wire=INDEX, to_p=st.booleans(), index=INDEX, is_lost=st.booleans())
    def message_is_lost_or_doubled(self, chance: bool, wire: int, to_p: bool, index: int, is_lost: bool) -> None:
        if chance and (chosen := self.wire(wire)):
            queue: list[object] = chosen.to_p if to_p else chosen.to_d  # type: ignore[assignment]
            if queue and is_lost:
                queue.pop(index % len(queue))
            elif queue:
                queue.append(queue[index % len(queue)])

    @rule(chance=CHANCE, pipe=INDEX)
    def data_connection_is_cut(self, chance: bool, pipe: int) -> None:
        pipes = self.world.network.pipes
        if chance and pipes:
            pipes[pipe % len(pipes)].cut()

    # -- life and death

    @rule(chance=CHANCE, is_p=st.booleans(), index=INDEX, restarts=st.booleans())
    def dies_or_comes_back(self, chance: bool, is_p: bool, index: int, restarts: bool) -> None:
        worker = self.prefill(index) if is_p else self.decode(index)
        was_alive = worker.is_alive
        if was_alive and chance:
            self.world.kill(worker)
        if not worker.is_alive and (restarts or not was_alive):
            self.world.restart(worker)

    @rule(chance=CHANCE, is_p=st.booleans(), index=INDEX)
    def hangs_or_goes_on(self, chance: bool, is_p: bool, index: int) -> None:
        worker = self.prefill(index) if is_p else self.decode(index)
        worker.is_hung = chance and not worker.is_hung

    @rule()
    def deaths_are_heard_of(self) -> None:
        self.world.tell_deaths()

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.1, 2.2, 4.4]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # -- the end

    def teardown(self) -> None:
        """No more faults. Who hangs or is dead stays so, unless the world heals."""
        world = self.world
        for worker in (*world.prefills, *world.decodes):
            if self.heals:
                worker.is_hung = False
        for prefill in world.prefills:
            if prefill.runs:
                for name in list(prefill.running):
                    prefill.end(name)
        try:
            world.calm(int(D_ENDS_WITHIN_S / TURN_S) + 1)
            for decode in world.decodes:
                if decode.runs:
                    decode.check_nothing_left()
            world.calm(int((P_ENDS_WITHIN_S - D_ENDS_WITHIN_S) / TURN_S) + 1)
            for prefill in world.prefills:
                if prefill.runs:
                    prefill.check_nothing_left()
        finally:
            world.close()
            logger.disabled = False


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    max_examples=5_000 if IS_LONG else 500,
    stateful_step_count=60,
    deadline=None,
    derandomize=not IS_LONG,
    phases=[Phase.generate] if PROFILE == "find" else list(Phase),
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestConversation.pytestmark = [pytest.mark.timeout(36_000)] if IS_LONG else []  # type: ignore[attr-defined]
