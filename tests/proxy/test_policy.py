"""Which P and which D, and how the load spreads."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from tests.proxy.scripted import MODEL, cluster, hang

from twolane.config import ProxySettings
from twolane.protocol import Kind, Role
from twolane.proxy.policy import MAX_ATTEMPTS, Ask, RoundRobin, Route, Router, Tried, least_loaded, prefix_affinity
from twolane.proxy.pool import Instance, State, Ticket

SPLIT = Ask(num_tokens=100)


def instance(role: Role, number: int, kind: Kind = "twolane") -> Instance:
    return Instance(role, f"h:{number}", f"z:{number}", kind, "", State.READY, 0.0, 0.0, 0.0)


def router(**settings: Any) -> Router:
    return Router(ProxySettings(**settings))


def route(
    prefills: list[Instance], decodes: list[Instance], ask: Ask = SPLIT, tried: Tried | None = None, **settings: Any
) -> Route | None:
    return router(**settings).route(prefills, decodes, tried or Tried(), ask)


def test_prefill_is_chosen_by_prompt_tokens_and_decode_by_requests() -> None:
    p1, p2, d1, d2 = instance("P", 1), instance("P", 2), instance("D", 3), instance("D", 4)
    Ticket(p1, 1000)
    Ticket(p2, 10)
    Ticket(p2, 10)
    Ticket(d1, 10)
    Ticket(d1, 10)
    Ticket(d2, 1000)
    assert least_loaded([p1, p2]) is p2
    assert least_loaded([d1, d2]) is d2


def test_equal_load_is_spread() -> None:
    instances = [instance("D", number) for number in range(1, 4)]
    chosen = []
    for _ in range(6):
        picked = least_loaded(instances)
        Ticket(picked, 1).give_back()
        chosen.append(picked.address)
    assert chosen == ["h:1", "h:2", "h:3"] * 2


def test_least_loaded_evens_out_prompts_of_very_different_length() -> None:
    rng = random.Random(1)
    instances = [instance("P", number) for number in range(4)]
    for _ in range(400):
        Ticket(least_loaded(instances), rng.choice((10, 100, 8000)))
    tokens = [i.in_flight_tokens for i in instances]
    assert max(tokens) - min(tokens) <= 8000


def test_round_robin_takes_turns_and_goes_on_when_one_leaves() -> None:
    turn = RoundRobin()
    instances = [instance("D", number) for number in range(1, 5)]
    assert [turn(instances).address for _ in range(5)] == ["h:1", "h:2", "h:3", "h:4", "h:1"]
    del instances[1]
    assert [turn(instances).address for _ in range(3)] == ["h:3", "h:4", "h:1"]
    others = [instance("P", number) for number in range(1, 3)]
    assert [turn(others).address for _ in range(2)] == ["h:1", "h:2"]  # roles have turns of their own


def test_prefix_affinity_sends_the_same_beginning_to_the_same_instance_and_spreads_the_rest() -> None:
    instances = [instance("P", number) for number in range(4)]
    beginnings = [b"system prompt %d" % number for number in range(400)]
    first = {beginning: prefix_affinity(instances, beginning) for beginning in beginnings}
    assert all(prefix_affinity(instances[::-1], beginning) is chosen for beginning, chosen in first.items())
    spread = Counter(chosen.address for chosen in first.values())
    assert min(spread.values()) > 60  # of 100
    left = [i for i in instances if i is not instances[2]]
    moved = sum(prefix_affinity(left, beginning) is not chosen for beginning, chosen in first.items())
    assert moved == spread[instances[2].address]  # nobody else's prompts move


@pytest.mark.parametrize(("role", "tokens", "num_requests"), [("P", 9000, 1), ("D", 1, 9)])
def test_prefix_affinity_gives_way_to_overload(role: Role, tokens: int, num_requests: int) -> None:
    instances = [instance(role, number) for number in range(2)]
    favourite = prefix_affinity(instances, b"x")
    tickets = [Ticket(favourite, tokens) for _ in range(num_requests)]
    assert prefix_affinity(instances, b"x") is not favourite
    for ticket in tickets:
        ticket.give_back()
    assert prefix_affinity(instances, b"x") is favourite


def test_route_leaves_out_who_failed_and_falls_back_to_decode_alone() -> None:
    p1, p2, d1 = instance("P", 1), instance("P", 2), instance("D", 3)
    tried = Tried()
    assert route([p1, p2], [d1], tried=tried) == Route(d1, p1)
    tried.failed.add(p1)
    tried.attempts = 1
    assert route([p1, p2], [d1], tried=tried) == Route(d1, p2)
    tried.failed.add(p2)
    assert route([p1, p2], [d1], tried=tried) == Route(d1, None, "prefill_failed")
    tried.failed.add(d1)
    assert route([p1, p2], [d1], tried=tried) is None


def test_no_prefill_at_all_says_so() -> None:
    d1 = instance("D", 1)
    assert route([], [d1]) == Route(d1, None, "no_prefill")


def test_last_attempt_and_unsplittable_requests_use_no_prefill() -> None:
    p1, d1 = instance("P", 1), instance("D", 2)
    assert route([p1], [d1], tried=Tried(attempts=MAX_ATTEMPTS - 1)) == Route(d1, None, "prefill_failed")
    assert route([p1], [d1], Ask(alone_because="body:n")) == Route(d1, None, "body:n")
    assert route([p1], [d1], Ask(splits=False, alone_because="path")) == Route(d1, None, "path")


def test_kinds_are_never_mixed() -> None:
    nixl_p, twolane_d, nixl_d = instance("P", 1, "nixl"), instance("D", 2), instance("D", 3, "nixl")
    assert route([nixl_p], [twolane_d, nixl_d]) == Route(nixl_d, nixl_p)
    assert route([nixl_p], [twolane_d]) == Route(twolane_d, None, "no_prefill")


def test_p2pnccl_decode_is_never_asked_alone() -> None:
    p, d = instance("P", 1, "p2pnccl"), instance("D", 2, "p2pnccl")
    assert route([], [d]) is None
    assert route([p], [d], Ask(alone_because="body:n")) == Route(d, p)
    assert route([p], [d], Ask(num_tokens=1), min_prefill_tokens=10) == Route(d, p)
    assert route([p], [d], tried=Tried(attempts=MAX_ATTEMPTS - 1)) == Route(d, p)
    assert route([p], [d], Ask(splits=False, alone_because="path")) is None
    assert route([p], [d], Ask(computes=False, splits=False)) == Route(d, None)


def test_short_prompts_and_busy_prefills_go_to_decode_alone_if_told_so() -> None:
    p1, p2, d1 = instance("P", 1), instance("P", 2), instance("D", 3)
    assert route([p1], [d1], Ask(num_tokens=0)) == Route(d1, p1)  # off by default
    assert route([p1], [d1], Ask(num_tokens=9), min_prefill_tokens=10) == Route(d1, None, "short_prompt")
    assert route([p1], [d1], Ask(num_tokens=10), min_prefill_tokens=10) == Route(d1, p1)
    Ticket(p1, 1)
    Ticket(p1, 1)
    assert route([p1], [d1], max_prefill_queue=2) == Route(d1, None, "prefill_busy")
    assert route([p1, p2], [d1], max_prefill_queue=2) == Route(d1, p2)


async def test_conditional_disaggregation_is_counted() -> None:
    async with cluster(min_prefill_tokens=20, max_prefill_queue=1) as c:
        assert (await c.complete(prompt=[1] * 19)).status_code == 200
        assert not c.p.calls
        assert (await c.complete(prompt=[1] * 20)).status_code == 200
        assert len(c.p.calls) == 1
        c.p.behave = hang
        assert (await c.complete(prompt=[1] * 20)).status_code == 200  # P is busy with it for the linger's second
        assert (await c.stats())["decode_alone"] == {"short_prompt": 1}
    async with cluster(max_prefill_queue=1) as c:
        Ticket(c.view(c.p), 1)
        assert (await c.complete()).status_code == 200
        assert not c.p.calls
        assert (await c.stats())["decode_alone"] == {"prefill_busy": 1}


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin"])
async def test_requests_one_after_another_are_spread_evenly(policy: str) -> None:
    async with cluster(2, 3, policy=policy) as c:
        for _ in range(12):
            assert (await c.complete()).status_code == 200
        assert [len(p.calls) for p in c.prefills] == [6, 6]
        assert [len(d.calls) for d in c.decodes] == [4, 4, 4]


async def test_prefix_affinity_keeps_a_conversation_on_its_instances() -> None:
    async with cluster(3, 3, policy="prefix_affinity") as c:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        for _ in range(4):
            body = {"model": MODEL, "messages": messages}
            assert (await c.http.post("/v1/chat/completions", json=body)).status_code == 200
            messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
        assert sorted(len(p.calls) for p in c.prefills) == [0, 0, 4]
        assert sorted(len(d.calls) for d in c.decodes) == [0, 0, 4]
        for number in range(60):
            await c.complete(prompt=f"{number} quite another one")
        assert all(i.calls for i in (*c.prefills, *c.decodes))
