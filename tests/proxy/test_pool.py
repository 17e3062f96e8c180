"""The instances' states, with a clock that the test turns."""

from __future__ import annotations

import pytest

from twolane.protocol import Registration
from twolane.proxy.pool import Instance, Pool, Probe, State, Ticket
from twolane.proxy.stats import instance_dict

EXPIRY_S = 15.0
EVERY_S = 1.0
READY_EVERY_S = 5.0


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
    return Pool(EXPIRY_S, EVERY_S, READY_EVERY_S, clock.wake)


def registration(role: str = "P", port: int = 1, **changes: object) -> Registration:
    fields = {"type": role, "http_address": f"h:{port}", "zmq_address": f"z:{port}", "kind": "twolane", "epoch": "e1"}
    return Registration(**(fields | changes))  # type: ignore[arg-type]


def ready(pool: Pool, role: str = "P", port: int = 1, now: float = 0.0) -> Instance:
    pool.register(registration(role, port), now)
    (instance,) = pool.due_probes(now)
    pool.probed(instance, Probe.HEALTHY, now=now)
    return instance


def test_registered_instance_is_probed_at_once_and_ready_when_healthy(pool: Pool, clock: Clock) -> None:
    pool.register(registration(), 0.0)
    assert clock.num_wakes == 1
    (instance,) = pool.due_probes(0.0)
    assert instance.state is State.STARTING
    assert not pool.ready("P")
    assert pool.due_probes(0.0) == []  # one probe at a time
    pool.probed(instance, Probe.UNHEALTHY, now=0.1)
    assert pool.next_probe_at() == pytest.approx(1.1)
    assert pool.due_probes(1.0) == []
    assert pool.due_probes(1.1) == [instance]
    pool.probed(instance, Probe.HEALTHY, now=1.2)
    assert list(pool.ready("P")) == [instance]
    assert not pool.ready("D")
    assert pool.next_probe_at() == pytest.approx(6.2)


def test_failed_connection_ejects_at_once_and_a_probe_takes_back(pool: Pool, clock: Clock) -> None:
    instance = ready(pool)
    wakes = clock.num_wakes
    pool.connection_failed(instance, "refused", 5.0)
    assert (instance.state, instance.since, instance.reason) == (State.EJECTED, 5.0, "refused")
    assert clock.num_wakes == wakes + 1
    assert not pool.ready("P")
    assert pool.due_probes(5.0) == [instance]
    pool.probed(instance, Probe.HEALTHY, now=5.1)
    assert list(pool.ready("P")) == [instance]
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
    assert not pool.ready("P")
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


def test_probe_answered_after_expiry_changes_nothing(pool: Pool) -> None:
    pool.register(registration(), 0.0)
    (instance,) = pool.due_probes(0.0)
    pool.expire(16.0)
    pool.probed(instance, Probe.HEALTHY, now=16.0)
    assert instance.state is State.LEAVING
    assert not pool.ready("P")


def test_ticket_counts_once(pool: Pool) -> None:
    instance = ready(pool)
    ticket = Ticket(instance, 100)
    assert (instance.in_flight, instance.in_flight_tokens, instance.num_requests) == (1, 100, 1)
    ticket.give_back()
    ticket.give_back()
    assert (instance.in_flight, instance.in_flight_tokens, instance.num_requests) == (0, 0, 1)


def test_hung_ready_instance_is_ejected_after_four_probes_and_taken_back(pool: Pool) -> None:
    instance = ready(pool)
    for now in (5.0, 10.0, 15.0, 20.0):
        pool.register(registration(), now)
        assert list(pool.ready("P")) == [instance]
        assert pool.due_probes(now) == [instance]
        pool.probed(instance, Probe.HUNG, now=now)
    assert instance.reason == "did not answer 4 health probes in a row"
    assert pool.next_probe_at() == pytest.approx(20.0 + EVERY_S)
    pool.probed(instance, Probe.HEALTHY, now=21.0)
    assert list(pool.ready("P")) == [instance]


def test_one_answer_makes_up_for_two_silent_probes(pool: Pool) -> None:
    instance = ready(pool)
    for probe in (Probe.HUNG, Probe.HUNG, Probe.HEALTHY, Probe.HUNG, Probe.HUNG):
        pool.probed(instance, probe, now=5.0)
    assert instance.state is State.READY


def test_ready_instance_that_answers_its_probe_with_an_error_is_ejected_at_once(pool: Pool) -> None:
    instance = ready(pool)
    pool.probed(instance, Probe.UNHEALTHY, now=5.0)
    assert instance.state is State.EJECTED


def test_instance_given_by_a_flag_never_expires(pool: Pool) -> None:
    pool.add_static(registration(), 0.0)
    pool.expire(1000.0)
    (instance,) = pool.due_probes(1000.0)
    pool.probed(instance, Probe.HEALTHY, now=1000.0)
    assert list(pool.ready("P")) == [instance]


def test_what_an_instance_says_is_wrong_with_it_is_shown_until_it_says_otherwise(pool: Pool) -> None:
    instance = ready(pool, "D")
    assert instance_dict(instance, 0.0)["problem"] is None
    pool.register(registration("D", problem="the KV caches don't match"), 3.0)
    assert instance_dict(instance, 3.0)["problem"] == "the KV caches don't match"
    assert instance.state is State.READY, "it answers all the same"
    pool.register(registration("D"), 6.0)
    assert instance_dict(instance, 6.0)["problem"] is None
