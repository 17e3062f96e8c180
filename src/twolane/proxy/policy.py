"""Which instances serve a request. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twolane.proxy.pool import Instance

MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Route:
    """Where one attempt goes. Without P, D computes the prompt itself."""

    decode: Instance
    prefill: Instance | None


@dataclass(slots=True)
class Tried:
    """What one request has been through. An instance that failed it doesn't get it again."""

    attempts: int = 0
    failed: set[Instance] = field(default_factory=set)


def choose_route(prefills: Iterable[Instance], decodes: Iterable[Instance], tried: Tried, split: bool) -> Route | None:
    """None if no D is left. `split` is false if the request can't be shared between P and D."""
    decode = least_loaded(i for i in decodes if i not in tried.failed)
    if decode is None:
        return None
    # The last attempt goes the way on which the least can fail.
    may_split = split and tried.attempts < MAX_ATTEMPTS - 1
    prefill = least_loaded(i for i in prefills if i not in tried.failed) if may_split else None
    return Route(decode, prefill)


def least_loaded(instances: Iterable[Instance]) -> Instance | None:
    """P by prompt bytes in flight, D by requests in flight; among equals the one that has served least."""
    return min(instances, key=_load, default=None)


def _load(instance: Instance) -> tuple[int, int, str]:
    in_flight = instance.in_flight_bytes if instance.role == "P" else instance.in_flight
    return in_flight, instance.num_requests, instance.address
