"""What has happened: counters, and the last requests one by one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from twolane.curve import DoorCounts
from twolane.protocol import LANES, Role
from twolane.proxy.engine_numbers import EngineNumbers
from twolane.proxy.histogram import Histogram
from twolane.proxy.pool import Instance
from twolane.proxy.stories import Stories
from twolane.proxy.tracing import RequestTrace

logger = logging.getLogger(__name__)

_NUM_RECENT = 100
# How a request may end. `open` is for those that haven't.
OUTCOMES = (
    "ok",
    "rejected",  # the client's fault, by our word or an instance's
    "too_busy",
    "no_instance",
    "upstream_failed",
    "decode_died",  # in the middle of its answer
    "client_left",
    "client_stalled",
    "cancelled",
)


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request's story. Times are monotonic, in s; None if it never came to that."""

    route: str
    request_id: str
    started_at: float
    transfer_id: str = ""
    prefill: str = ""  # addresses; empty: none
    decode: str = ""
    alone_because: str = ""  # why D computed the prompt itself
    stream: bool = False
    status: int = 0
    outcome: str = "open"
    attempts: int = 0
    serial: int = 0  # numbers those that ask for an engine's work
    admitted_at: float | None = None  # its turn came
    prefill_sent_at: float | None = None  # of the last attempt, like all that follows
    decode_sent_at: float | None = None
    prefill_done_at: float | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None
    engine_moments: dict[str, float] | None = None  # what the engines told, by the event's name; see stories
    trace: RequestTrace | None = None  # where spans are wanted

    def forget_times(self) -> None:
        """Another attempt begins: those of the one before are no longer this request's."""
        self.prefill_sent_at = self.decode_sent_at = self.prefill_done_at = self.first_byte_at = None

    def ms(self, moment: float | None) -> float | None:
        """In hundredths. Three of them are in every log line, and `round` takes ten times as long."""
        return None if moment is None else int((moment - self.started_at) * 1e5 + 0.5) / 1e2

    def as_dict(self) -> dict[str, Any]:
        return {
            "transfer_id": self.transfer_id or None,
            "request_id": self.request_id,
            "route": self.route,
            "prefill": self.prefill or None,
            "decode": self.decode or None,
            "alone_because": self.alone_because or None,
            "stream": self.stream,
            "status": self.status,
            "outcome": self.outcome,
            "attempts": self.attempts,
            "started_s": self.started_at,  # monotonic, as clients on this machine see it too
            "admitted_ms": self.ms(self.admitted_at),
            "prefill_sent_ms": self.ms(self.prefill_sent_at),
            "decode_sent_ms": self.ms(self.decode_sent_at),
            "prefill_done_ms": self.ms(self.prefill_done_at),
            "first_byte_ms": self.ms(self.first_byte_at),
            "total_ms": self.ms(self.ended_at),
        }


class Stats:
    """Owns the counters."""

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.requests: Counter[tuple[str, str]] = Counter()  # by route and outcome
        self.alone: Counter[str] = Counter()
        self.retries: Counter[tuple[Role, str]] = Counter()  # attempts after the first, by whose failure and its cause
        self.ttft = Histogram()
        self.end_to_end = Histogram()
        self.handoff = Histogram()
        self.stories = Stories()
        self.gaps = Histogram()  # between arrivals of a stream's bytes; filled by the relay
        self.num_registrations_refused = 0
        self.registrants = DoorCounts()  # connections to the discovery socket

    @property
    def num_ended(self) -> int:
        return self.requests.total()

    def ended(self, record: RequestRecord) -> None:
        """The client's part is over. P's last word may still be written into the record."""
        self.requests[record.route, record.outcome] += 1
        if record.alone_because:
            self.alone[record.alone_because] += 1
        self.stories.ended(record)
        if record.outcome == "ok" and record.ended_at is not None:
            self.end_to_end.add(record.ended_at - record.started_at)
            if record.stream and record.first_byte_at is not None:
                self.ttft.add(record.first_byte_at - record.started_at)
                if record.prefill_done_at is not None:
                    self.handoff.add(record.first_byte_at - record.prefill_done_at)

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": nested((route, outcome, count) for (route, outcome), count in self.requests.items()),
            "decode_alone": dict(self.alone),
            "retries": nested((LANES[role], cause, count) for (role, cause), count in self.retries.items()),
            "latency_ms": {
                "ttft": self.ttft.as_dict(),  # streams only, as the next two
                "itl": self.gaps.as_dict(),
                "handoff": self.handoff.as_dict(),  # end of P's answer to D's first byte
                "end_to_end": self.end_to_end.as_dict(),
            },
            "registrations_refused": self.num_registrations_refused,
            "registration_connections": self.registrants._asdict(),
            "stories": self.stories.as_dict(),
            "recent": [record.as_dict() for record in self.stories.recent(_NUM_RECENT)],
        }


def nested(counts: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    by_both: dict[str, dict[str, int]] = {}
    for first, second, count in sorted(counts):
        by_both.setdefault(first, {})[second] = count
    return by_both


def log_request(record: RequestRecord) -> None:
    """The one line. Written out by hand: it is a tenth of what a short request costs."""
    r = record
    logger.info(
        "request transfer_id=%s request_id=%s route=%s prefill=%s decode=%s alone_because=%s stream=%s status=%d "
        "outcome=%s attempts=%d prefill_done_ms=%s first_byte_ms=%s total_ms=%s",
        r.transfer_id or "-",
        r.request_id,
        r.route,
        r.prefill or "-",
        r.decode or "-",
        r.alone_because or "-",
        r.stream,
        r.status,
        r.outcome,
        r.attempts,
        r.ms(r.prefill_done_at),
        r.ms(r.first_byte_at),
        r.ms(r.ended_at),
    )


def instance_dict(instance: Instance, now: float, engine: EngineNumbers | None = None) -> dict[str, Any]:
    return {
        "name": instance.name,
        "role": instance.role,
        "address": instance.address,
        "control_address": instance.control_address,
        "kind": instance.kind,
        "gpus": instance.gpus,
        "state": instance.state.value,
        "state_since_s": round(now - instance.since, 3),
        "reason": instance.reason or None,
        "problem": instance.problem or None,
        "registered_ago_s": None if instance.is_static else round(now - instance.registered_at, 3),
        "in_flight": instance.in_flight,
        "in_flight_tokens": instance.in_flight_tokens,
        "requests": instance.num_requests,
        "failures": instance.num_failures,
        "epoch": instance.epoch,
        "load": None if instance.load is None else msgspec.to_builtins(instance.load),
        "foreign": instance.num_foreign,
        "engine": None if engine is None else engine.as_dict(now),
    }
