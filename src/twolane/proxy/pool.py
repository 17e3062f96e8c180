"""The instances and what state each is in. Synchronous and without a clock: every change takes `now` (monotonic, s).

registered -> STARTING --probe ok--> READY --connection or probe failed--> EJECTED --probe ok--> READY
                                       \\-- says that it leaves --> LEAVING
Silence for `expiry_s` removes an instance from any state, unless it was given by a flag.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from twolane.protocol import LOAD_VALID_S, Kind, Load, Registration, Role

logger = logging.getLogger(__name__)

MAX_HUNG_PROBES = 4
_WORDS = 10  # others' requests count as in about so many words of the instance


class State(enum.StrEnum):
    STARTING = "starting"  # registered, not yet healthy
    READY = "ready"
    EJECTED = "ejected"  # a connection or a probe failed; probed until it answers
    LEAVING = "leaving"  # finishes what it has, gets nothing new


_UNREADY = frozenset((State.STARTING, State.EJECTED))


class Probe(enum.Enum):
    """How a health probe went."""

    HEALTHY = enum.auto()
    UNHEALTHY = enum.auto()  # refused, broken, or answered with anything but 200
    HUNG = enum.auto()  # no answer in time: may be a busy moment, so one alone ejects nobody


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
    probe_at: float  # when the next probe is due, unless it leaves
    name: str = ""  # what people call it; the address where it has none
    gpus: Sequence[str] = ()  # UUIDs, as far as it said
    is_static: bool = False  # given by a flag: never expires
    probing: bool = False
    num_hung_probes: int = 0  # in a row
    in_flight: int = 0
    in_flight_tokens: int = 0  # of the prompts in flight, estimated
    num_requests: int = 0
    num_failures: int = 0
    reason: str = ""  # why it isn't ready
    problem: str = ""  # what it says of itself: why no KV moves
    load: Load | None = None  # its own word; None: it said nothing, or too long ago
    load_at: float = 0.0
    num_foreign: int = 0  # requests that it had then and that can't have been ours
    usual_foreign: float = 0.0  # the same, as a mean of its last words
    claimed_tokens: int = 0  # of the prompts that it got since then
    peak_in_flight: int = 0  # since then

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt finds free KV blocks, as far as we know; True if it never told.

        On D a queue means no: it is there for want of blocks, and first come is first served. On P it is there for the
        sake of order. What we sent since it told claims of what was free then; all that we have there, of the whole.
        """
        load = self.load
        if load is None:
            return True
        if load.num_waiting and self.role == "D":
            return False
        free_tokens = load.free_blocks * load.block_size - self.claimed_tokens
        return num_tokens <= free_tokens and num_tokens <= load.num_blocks * load.block_size - self.in_flight_tokens

    def told(self, load: Load | None, now: float) -> None:
        """Its requests beyond the most that we had there since its last word are others'. That errs on the low side, so
        that requests of ours that end in between are never taken for others'."""
        num_theirs = 0 if load is None else load.num_running + load.num_waiting
        self.load, self.load_at = load, now
        self.num_foreign = max(0, num_theirs - self.peak_in_flight)
        self.usual_foreign = (
            0.0 if load is None else self.usual_foreign + (self.num_foreign - self.usual_foreign) / _WORDS
        )
        self.claimed_tokens, self.peak_in_flight = 0, self.in_flight


class Ticket:
    """One request in flight at an instance, counted until given back. Idempotent."""

    __slots__ = ("_num_tokens", "instance")

    def __init__(self, instance: Instance, num_tokens: int) -> None:
        self.instance = instance
        self._num_tokens: int | None = num_tokens
        instance.in_flight += 1
        instance.in_flight_tokens += num_tokens
        instance.num_requests += 1
        instance.claimed_tokens += num_tokens
        if instance.in_flight > instance.peak_in_flight:  # noqa: PLR1730 - once a leg: cheaper than max()
            instance.peak_in_flight = instance.in_flight

    def give_back(self) -> None:
        if self._num_tokens is not None:
            self.instance.in_flight -= 1
            self.instance.in_flight_tokens -= self._num_tokens
            self._num_tokens = None


class Pool:
    """Owns all instances. `on_probe_due` is called when an instance should be probed sooner than planned."""

    def __init__(
        self, expiry_s: float, probe_every_s: float, probe_ready_every_s: float, on_probe_due: Callable[[], None]
    ) -> None:
        self._expiry_s = expiry_s
        self._probe_every_s = probe_every_s
        self._probe_ready_every_s = probe_ready_every_s
        self._on_probe_due = on_probe_due
        self._instances: dict[tuple[Role, str], Instance] = {}
        self._ready: dict[Role, Sequence[Instance]] = {"P": (), "D": ()}  # derived; asked for at every request
        self._members: Sequence[Instance] = ()  # derived

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._instances.values())

    def __len__(self) -> int:
        return len(self._instances)

    @property
    def members(self) -> Sequence[Instance]:
        """All instances. The only thing here that other threads may ask for; what they read may be a moment old."""
        return self._members

    def ready(self, role: Role) -> Sequence[Instance]:
        return self._ready[role]

    def register(self, registration: Registration, now: float) -> None:
        key = (registration.type, registration.http_address)
        instance = self._instances.get(key)
        if instance is None:
            if not registration.leaving:
                self._add(registration, now)
            return
        instance.problem = registration.problem
        # Where the launcher speaks for an instance beside its own connector, only one of the two knows these.
        instance.name = registration.name or instance.name
        instance.gpus = registration.gpus or instance.gpus
        instance.registered_at = now
        instance.told(registration.load, now)
        instance.control_address = registration.zmq_address
        if registration.epoch != instance.epoch or registration.kind != instance.kind:
            self._restarted(instance, registration, now)
        elif registration.leaving and instance.state is not State.LEAVING:
            self._change(instance, State.LEAVING, now, "it said so")

    def add_static(self, registration: Registration, now: float) -> None:
        """An instance that needn't say that it is there. What it says all the same counts."""
        self._add(registration, now, is_static=True)

    def _add(self, registration: Registration, now: float, is_static: bool = False) -> None:
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
            name=registration.name or registration.http_address,
            gpus=registration.gpus,
            is_static=is_static,
            problem=registration.problem,
        )
        instance.told(registration.load, now)
        self._instances[instance.role, instance.address] = instance
        self._change(instance, State.STARTING, now, "given by a flag" if is_static else "registered")

    def _restarted(self, instance: Instance, registration: Registration, now: float) -> None:
        """Another process at the same address: what we knew of the old one is void."""
        instance.epoch = registration.epoch
        instance.kind = registration.kind
        instance.gpus = registration.gpus
        state = State.LEAVING if registration.leaving else State.STARTING
        self._change(instance, state, now, "restarted")

    def connection_failed(self, instance: Instance, reason: str, now: float) -> None:
        """Takes it out at once. An answer to a probe brings it back."""
        instance.num_failures += 1
        if instance.state is State.READY:
            self._change(instance, State.EJECTED, now, reason)

    def due_probes(self, now: float) -> list[Instance]:
        """Those to probe now; each is marked, until `probed` is told how it went."""
        due = [i for i in self._unprobed() if i.probe_at <= now]
        for instance in due:
            instance.probing = True
        return due

    def next_probe_at(self) -> float | None:
        return min((i.probe_at for i in self._unprobed()), default=None)

    def _unprobed(self) -> list[Instance]:
        return [i for i in self._instances.values() if i.state is not State.LEAVING and not i.probing]

    def probed(self, instance: Instance, probe: Probe, now: float) -> None:
        instance.probing = False
        instance.num_hung_probes = instance.num_hung_probes + 1 if probe is Probe.HUNG else 0
        if probe is Probe.HEALTHY and instance.state in _UNREADY:
            self._change(instance, State.READY, now, "")
        elif instance.state is State.READY and probe is Probe.UNHEALTHY:
            self._change(instance, State.EJECTED, now, "failed a health probe")
        elif instance.state is State.READY and instance.num_hung_probes >= MAX_HUNG_PROBES:
            self._change(instance, State.EJECTED, now, f"did not answer {MAX_HUNG_PROBES} health probes in a row")
        every_s = self._probe_ready_every_s if instance.state is State.READY else self._probe_every_s
        instance.probe_at = now + every_s

    def expire(self, now: float) -> None:
        """Forgets those that have been silent too long, their load sooner. Their requests in flight go on."""
        for key, instance in list(self._instances.items()):
            if instance.load is not None and now - instance.load_at > LOAD_VALID_S:
                instance.told(None, now)
            if now - instance.registered_at > self._expiry_s and not instance.is_static:
                del self._instances[key]
                self._change(instance, State.LEAVING, now, f"silent for {self._expiry_s:g} s")

    def _change(self, instance: Instance, state: State, now: float, reason: str) -> None:
        instance.state = state
        instance.since = now
        instance.reason = reason
        ready = [i for i in self._instances.values() if i.role == instance.role and i.state is State.READY]
        self._ready[instance.role] = tuple(ready)
        self._members = tuple(self._instances.values())
        logger.info(
            'instance role=%s address=%s kind=%s epoch=%s state=%s reason="%s"',
            instance.role,
            instance.address,
            instance.kind,
            instance.epoch or "-",
            state,
            reason,
        )
        if state in _UNREADY:
            instance.probe_at = now
            self._on_probe_due()
