"""The instances and what state each is in. Synchronous and without a clock: every change takes `now` (monotonic, s).

registered -> STARTING --probe ok--> READY --connection failed--> EJECTED --probe ok--> READY
                                       \\-- says that it leaves --> LEAVING
Silence for `expiry_s` removes an instance from any state.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from twolane.protocol import Kind, Registration, Role

logger = logging.getLogger(__name__)

SERVED_KINDS: frozenset[Kind] = frozenset(("twolane",))


class State(enum.StrEnum):
    STARTING = "starting"  # registered, not yet healthy
    READY = "ready"
    EJECTED = "ejected"  # a connection failed; probed until it answers
    LEAVING = "leaving"  # finishes what it has, gets nothing new
    UNSUPPORTED = "unsupported"  # listed, never chosen


_PROBED = frozenset((State.STARTING, State.EJECTED))


@dataclass(slots=True, eq=False)
class Instance:
    """One registered instance. Only its pool changes it."""

    role: Role
    address: str  # of its OpenAI server
    control_address: str
    kind: Kind
    epoch: str
    state: State
    since: float  # when it came into `state`
    registered_at: float  # the last word from it
    probe_at: float  # when the next probe is due, if `state` is probed
    probing: bool = False
    in_flight: int = 0
    in_flight_bytes: int = 0  # of the bodies in flight: stands for prompt tokens
    num_requests: int = 0
    num_failures: int = 0
    reason: str = ""  # why it isn't ready


class Ticket:
    """One request in flight at an instance, counted until given back. Idempotent."""

    __slots__ = ("_num_bytes", "instance")

    def __init__(self, instance: Instance, num_bytes: int) -> None:
        self.instance = instance
        self._num_bytes: int | None = num_bytes
        instance.in_flight += 1
        instance.in_flight_bytes += num_bytes
        instance.num_requests += 1

    def give_back(self) -> None:
        if self._num_bytes is not None:
            self.instance.in_flight -= 1
            self.instance.in_flight_bytes -= self._num_bytes
            self._num_bytes = None


class Pool:
    """Owns all instances. `on_probe_due` is called when an instance should be probed sooner than planned."""

    def __init__(self, expiry_s: float, probe_every_s: float, on_probe_due: Callable[[], None]) -> None:
        self._expiry_s = expiry_s
        self._probe_every_s = probe_every_s
        self._on_probe_due = on_probe_due
        self._instances: dict[tuple[Role, str], Instance] = {}

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._instances.values())

    def __len__(self) -> int:
        return len(self._instances)

    def ready(self, role: Role) -> list[Instance]:
        return [i for i in self._instances.values() if i.role == role and i.state is State.READY]

    def register(self, registration: Registration, now: float) -> None:
        key = (registration.type, registration.http_address)
        instance = self._instances.get(key)
        if instance is None:
            if not registration.leaving:
                self._add(registration, now)
            return
        instance.registered_at = now
        instance.control_address = registration.zmq_address
        if registration.epoch != instance.epoch or registration.kind != instance.kind:
            self._restarted(instance, registration, now)
        elif registration.leaving and instance.state is not State.LEAVING:
            self._change(instance, State.LEAVING, now, "it said so")

    def _add(self, registration: Registration, now: float) -> None:
        instance = Instance(
            role=registration.type,
            address=registration.http_address,
            control_address=registration.zmq_address,
            kind=registration.kind,
            epoch=registration.epoch,
            state=State.STARTING,
            since=now,
            registered_at=now,
            probe_at=now,
        )
        self._instances[instance.role, instance.address] = instance
        self._change(instance, _first_state(registration), now, "registered")

    def _restarted(self, instance: Instance, registration: Registration, now: float) -> None:
        """Another process at the same address: what we knew of the old one is void."""
        instance.epoch = registration.epoch
        instance.kind = registration.kind
        state = State.LEAVING if registration.leaving else _first_state(registration)
        self._change(instance, state, now, "restarted")

    def connection_failed(self, instance: Instance, reason: str, now: float) -> None:
        """Takes it out at once. An answer to a probe brings it back."""
        instance.num_failures += 1
        if instance.state is State.READY:
            self._change(instance, State.EJECTED, now, reason)

    def due_probes(self, now: float) -> list[Instance]:
        """Those to probe now; each is marked, until `probed` is told how it went."""
        due = [i for i in self._instances.values() if i.state in _PROBED and not i.probing and i.probe_at <= now]
        for instance in due:
            instance.probing = True
        return due

    def next_probe_at(self) -> float | None:
        waiting = [i.probe_at for i in self._instances.values() if i.state in _PROBED and not i.probing]
        return min(waiting, default=None)

    def probed(self, instance: Instance, healthy: bool, now: float) -> None:
        instance.probing = False
        instance.probe_at = now + self._probe_every_s
        if healthy and instance.state in _PROBED:
            self._change(instance, State.READY, now, "")

    def expire(self, now: float) -> None:
        """Forgets those that have been silent too long. Their requests in flight go on."""
        for key, instance in list(self._instances.items()):
            if now - instance.registered_at > self._expiry_s:
                del self._instances[key]
                self._change(instance, State.LEAVING, now, f"silent for {self._expiry_s:g} s")

    def _change(self, instance: Instance, state: State, now: float, reason: str) -> None:
        instance.state = state
        instance.since = now
        instance.reason = reason
        logger.info(
            'instance role=%s address=%s kind=%s epoch=%s state=%s reason="%s"',
            instance.role,
            instance.address,
            instance.kind,
            instance.epoch or "-",
            state,
            reason,
        )
        if state in _PROBED:
            instance.probe_at = now
            self._on_probe_due()


def _first_state(registration: Registration) -> State:
    return State.STARTING if registration.kind in SERVED_KINDS else State.UNSUPPORTED
