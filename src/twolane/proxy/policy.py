"""Which instances serve a request. Nothing here waits or sends; only `RoundRobin` remembers anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from twolane.config import Policy, ProxySettings
from twolane.protocol import Role
from twolane.proxy.kinds import HANDOVERS
from twolane.proxy.pool import Instance

MAX_ATTEMPTS = 4
# Affinity gives way when an instance has this much more to do than the one with the least.
_OVERLOAD_FACTOR = 2
_OVERLOAD_SLACK: dict[Role, int] = {"P": 8192, "D": 8}  # prompt tokens; requests


class Ask(msgspec.Struct, frozen=True):
    """What the choice depends on."""

    computes: bool = True  # False: any D can answer, without its engine (/v1/models, /tokenize)
    splits: bool = True  # P and D can share it, as far as the path goes
    alone_because: str = ""  # why they shouldn't, if they can
    num_tokens: int = 0
    beginning: bytes = b""  # of the prompt; read by prefix_affinity alone


class Route(msgspec.Struct, frozen=True):
    """Where one attempt goes. Without P, D computes the prompt itself, and `alone_because` says why."""

    decode: Instance
    prefill: Instance | None
    alone_because: str = ""


@dataclass(slots=True)
class Tried:
    """What one request has been through. An instance that failed it doesn't get it again."""

    attempts: int = 0
    failed: set[Instance] = field(default_factory=set)


# Picks one of several instances (never none) of one role, for a prompt's beginning.
Picker = Callable[[Sequence[Instance], bytes], Instance]


class Router:
    """Chooses P and D by the settings' policy and limits."""

    def __init__(self, settings: ProxySettings) -> None:
        self._pick = make_picker(settings.policy)
        self._min_prefill_tokens = settings.min_prefill_tokens
        self._max_prefill_queue = settings.max_prefill_queue
        self.wants_beginning = settings.policy == "prefix_affinity"

    def route(self, prefills: Sequence[Instance], decodes: Sequence[Instance], tried: Tried, ask: Ask) -> Route | None:
        """None if nobody is left who could serve it."""
        if tried.failed:
            prefills = [i for i in prefills if i not in tried.failed]
            decodes = [i for i in decodes if i not in tried.failed]
        if not decodes:
            return None
        if not ask.computes:
            return Route(self._pick(decodes, b""), None)  # takes no blocks
        why_alone = self._why_alone(prefills, tried, ask)
        if ask.splits:
            kinds = {p.kind for p in prefills}
            pairs = [d for d in decodes if d.kind in kinds and not (why_alone and HANDOVERS[d.kind].decodes_alone)]
            if pairs:
                decode = self._choose(pairs, ask)
                partners = [p for p in prefills if p.kind == decode.kind]
                return Route(decode, self._choose(partners, ask))
        alone = [d for d in decodes if HANDOVERS[d.kind].decodes_alone]
        if not alone:
            return None
        no_prefill = "prefill_failed" if tried.attempts else "no_prefill"
        return Route(self._choose(alone, ask), None, why_alone or no_prefill)

    def _choose(self, instances: Sequence[Instance], ask: Ask) -> Instance:
        """By the policy, among those that have room for the prompt, if any has."""
        chosen = self._pick(instances, ask.beginning)
        if len(instances) == 1 or chosen.has_room(ask.num_tokens):
            return chosen
        roomy = [i for i in instances if i.has_room(ask.num_tokens)]
        return self._pick(roomy, ask.beginning) if roomy else chosen

    def _why_alone(self, prefills: Sequence[Instance], tried: Tried, ask: Ask) -> str:
        if ask.alone_because:
            return ask.alone_because
        if tried.attempts >= MAX_ATTEMPTS - 1:  # the last attempt goes the way on which the least can fail
            return "prefill_failed"
        if ask.num_tokens < self._min_prefill_tokens:
            return "short_prompt"
        limit = self._max_prefill_queue
        if limit and prefills and all(p.in_flight + p.num_foreign >= limit for p in prefills):
            return "prefill_busy"
        return ""


def make_picker(policy: Policy) -> Picker:
    pickers: dict[Policy, Picker] = {
        "least_loaded": least_loaded,
        "round_robin": RoundRobin(),
        "prefix_affinity": prefix_affinity,
    }
    return pickers[policy]


def least_loaded(instances: Sequence[Instance], _beginning: bytes = b"") -> Instance:
    """P by prompt tokens in flight, D by requests, ours and others'; among equals the one that has served least."""
    return instances[0] if len(instances) == 1 else min(instances, key=_load_and_rank)


def prefix_affinity(instances: Sequence[Instance], beginning: bytes) -> Instance:
    """The same prompt beginning, the same instance, also after others have come or gone (rendezvous hashing)."""
    if not beginning:
        return least_loaded(instances)
    limit = _OVERLOAD_FACTOR * min(map(_load, instances)) + _OVERLOAD_SLACK[instances[0].role]
    willing = [i for i in instances if _load(i) <= limit]
    return max(willing, key=lambda i: _affinity(i, beginning))


class RoundRobin:
    """In turn. Owns whose turn it was, by role."""

    def __init__(self) -> None:
        self._last: dict[Role, str] = {}

    def __call__(self, instances: Sequence[Instance], _beginning: bytes = b"") -> Instance:
        """The first address after the last one's, so that one that comes or goes shifts nobody's turn."""
        role = instances[0].role
        last = self._last.get(role, "")
        chosen = min(instances, key=lambda i: (i.address <= last, i.address))
        self._last[role] = chosen.address
        return chosen


def _load(instance: Instance) -> float:
    """Others' requests count on D, whose requests last, as they usually are there: all proxies hear the same word, and
    would all run to whoever had the least in it. On P they are through before the next word."""
    return instance.in_flight_tokens if instance.role == "P" else instance.in_flight + instance.usual_foreign


def _load_and_rank(instance: Instance) -> tuple[float, int, str]:
    return _load(instance), instance.num_requests, instance.address


def _affinity(instance: Instance, beginning: bytes) -> bytes:
    return hashlib.blake2b(beginning, digest_size=8, key=instance.address.encode()[:64]).digest()
