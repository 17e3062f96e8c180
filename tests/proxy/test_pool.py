"""The instances' states, with a clock that the test turns."""

from __future__ import annotations

import pytest

from twolane.protocol import Registration
from twolane.proxy.policy import MAX_ATTEMPTS, Tried, choose_route, least_loaded
from twolane.proxy.pool import Instance, Pool, State, Ticket

EXPIRY_S = 15.0
EVERY_S = 1.0


class Clock:
    """Counts how often the pool asked for a probe."""

    def __init__(self) -> None:
        self.num_wakes = 0

    def wake(self) -> None:
        self.num_wakes += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock: Clock) -> Pool:
    return Pool(EXPIRY_S, EVERY_S, clock.wake)


def registration(role: str = "P", port: int = 1, **changes: object) -> Registration:
    fields = {"type": role, "http_address": f"h:{port}", "zmq_address": f"z:{port}", "kind": "twolane", "epoch": "e1"}
    return Registration(**(fields | changes))  # type: ignore[arg-type]


def ready(pool: Pool, role: str = "P", port: int = 1, now: float = 0.0) -> Instance:
    pool.register(registration(role, port), now)
    (instance,) = pool.due_probes(now)
    pool.probed(instance, healthy=True, now=now)
    return instance


def test_registered_instance_is_probed_at_once_and_ready_when_healthy(pool: Pool, clock: Clock) -> None:
    pool.register(registration(), 0.0)
    assert clock.num_wakes == 1
    (instance,) = pool.due_probes(0.0)
    assert instance.state is State.STARTING
    assert pool.ready("P") == []
    assert pool.due_probes(0.0) == []  # one probe at a time
    pool.probed(instance, healthy=False, now=0.1)
    assert pool.next_probe_at() == pytest.approx(1.1)
    assert pool.due_probes(1.0) == []
    assert pool.due_probes(1.1) == [instance]
    pool.probed(instance, healthy=True, now=1.2)
    assert pool.ready("P") == [instance]
    assert pool.ready("D") == []
    assert pool.next_probe_at() is None


def test_failed_connection_ejects_at_once_and_a_probe_takes_back(pool: Pool, clock: Clock) -> None:
    instance = ready(pool)
    wakes = clock.num_wakes
    pool.connection_failed(instance, "refused", 5.0)
    assert (instance.state, instance.since, instance.reason) == (State.EJECTED, 5.0, "refused")
    assert clock.num_wakes == wakes + 1
    assert pool.ready("P") == []
    assert pool.due_probes(5.0) == [instance]
    pool.probed(instance, healthy=True, now=5.1)
    assert pool.ready("P") == [instance]
    assert instance.num_failures == 1


def test_late_failure_of_an_old_connection_does_not_eject_twice(pool: Pool, clock: Clock) -> None:
    instance = ready(pool)
    pool.connection_failed(instance, "refused", 5.0)
    wakes = clock.num_wakes
    pool.connection_failed(instance, "refused", 5.5)
    assert instance.since == 5.0
    assert clock.num_wakes == wakes


def test_silence_forgets_an_instance_and_one_late_ping_does_not(pool: Pool) -> None:
    ready(pool)
    pool.expire(EXPIRY_S)
    assert len(pool) == 1
    pool.register(registration(), 14.0)
    pool.expire(20.0)
    assert len(pool.ready("P")) == 1
    pool.expire(29.1)
    assert len(pool) == 0


def test_leaving_instance_gets_nothing_new_until_it_comes_back_with_a_new_epoch(pool: Pool) -> None:
    instance = ready(pool)
    pool.register(registration(leaving=True), 1.0)
    assert instance.state is State.LEAVING
    assert pool.ready("P") == []
    pool.register(registration(), 2.0)  # a belated ping of the same process
    assert pool.due_probes(2.0) == []
    pool.register(registration(epoch="e2"), 3.0)
    assert pool.due_probes(3.0) == [instance]


def test_last_words_of_an_unknown_instance_add_nothing(pool: Pool) -> None:
    pool.register(registration(leaving=True), 0.0)
    assert len(pool) == 0


def test_restart_at_the_same_address_is_probed_anew(pool: Pool) -> None:
    instance = ready(pool)
    pool.register(registration(epoch="e2", zmq_address="z:9"), 1.0)
    assert instance.state is State.STARTING
    assert instance.control_address == "z:9"


@pytest.mark.parametrize("kind", ["p2pnccl", "nixl"])
def test_kind_that_is_not_served_yet_is_listed_and_never_chosen(pool: Pool, kind: str) -> None:
    pool.register(registration(kind=kind), 0.0)
    assert [i.state for i in pool] == [State.UNSUPPORTED]
    assert pool.due_probes(99.0) == []


def test_probe_answered_after_expiry_changes_nothing(pool: Pool) -> None:
    pool.register(registration(), 0.0)
    (instance,) = pool.due_probes(0.0)
    pool.expire(16.0)
    pool.probed(instance, healthy=True, now=16.0)
    assert instance.state is State.LEAVING
    assert pool.ready("P") == []


def test_ticket_counts_once(pool: Pool) -> None:
    instance = ready(pool)
    ticket = Ticket(instance, 100)
    assert (instance.in_flight, instance.in_flight_bytes, instance.num_requests) == (1, 100, 1)
    ticket.give_back()
    ticket.give_back()
    assert (instance.in_flight, instance.in_flight_bytes, instance.num_requests) == (0, 0, 1)


def test_prefill_is_chosen_by_prompt_bytes_and_decode_by_requests(pool: Pool) -> None:
    p1, p2 = ready(pool, "P", 1), ready(pool, "P", 2)
    d1, d2 = ready(pool, "D", 3), ready(pool, "D", 4)
    Ticket(p1, 1000)
    Ticket(p2, 10)
    Ticket(p2, 10)
    Ticket(d1, 10)
    Ticket(d1, 10)
    Ticket(d2, 1000)
    assert least_loaded([p1, p2]) is p2
    assert least_loaded([d1, d2]) is d2
    assert least_loaded([]) is None


def test_equal_load_is_spread(pool: Pool) -> None:
    instances = [ready(pool, "D", port) for port in range(1, 4)]
    chosen = []
    for _ in range(6):
        instance = least_loaded(instances)
        assert instance is not None
        Ticket(instance, 1).give_back()
        chosen.append(instance.address)
    assert chosen == ["h:1", "h:2", "h:3"] * 2


def test_route_leaves_out_who_failed_and_falls_back_to_decode_alone(pool: Pool) -> None:
    p1, p2, d1 = ready(pool, "P", 1), ready(pool, "P", 2), ready(pool, "D", 3)
    tried = Tried()
    route = choose_route([p1, p2], [d1], tried, split=True)
    assert route is not None
    assert (route.prefill, route.decode) == (p1, d1)
    tried.failed.add(p1)
    route = choose_route([p1, p2], [d1], tried, split=True)
    assert route is not None
    assert route.prefill is p2
    tried.failed.add(p2)
    route = choose_route([p1, p2], [d1], tried, split=True)
    assert route is not None
    assert route.prefill is None
    tried.failed.add(d1)
    assert choose_route([p1, p2], [d1], tried, split=True) is None


def test_last_attempt_and_unsplittable_requests_use_no_prefill(pool: Pool) -> None:
    p1, d1 = ready(pool, "P", 1), ready(pool, "D", 2)
    for tried, split in ((Tried(attempts=MAX_ATTEMPTS - 1), True), (Tried(), False)):
        route = choose_route([p1], [d1], tried, split)
        assert route is not None
        assert route.prefill is None
