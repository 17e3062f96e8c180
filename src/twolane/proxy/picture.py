"""What the dashboard is told, as plain data. Pure: looks at the proxy's state and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from twolane.proxy.admission import Admission
from twolane.proxy.engines import Engines
from twolane.proxy.history import Generated
from twolane.proxy.pool import Pool, State
from twolane.proxy.power import Power
from twolane.proxy.stats import RequestRecord, Stats, instance_dict

MAX_OPEN = 200  # requests in flight that are told one by one; of more only the number

_WHY_ALONE = {
    "no_prefill": "no prefill instance was ready",
    "prefill_failed": "a prefill instance failed",
    "short_prompt": "the prompt was short",
    "prefill_busy": "all prefill instances were busy",
    "path": "their path is one that can't be split",
}


@dataclass(frozen=True)
class Sight:
    """All that the dashboard looks at."""

    pool: Pool
    stats: Stats
    admission: Admission
    engines: Engines
    power: Power
    in_flight: Mapping[int, RequestRecord]  # by serial, the oldest first
    judge: Callable[[], tuple[str, str | None]]  # health, and why it isn't `ok`


def instances(sight: Sight, now: float) -> list[dict[str, Any]]:
    return [instance_dict(instance, now, sight.engines.latest(instance)) for instance in sight.pool]


def generated(sight: Sight) -> Generated:
    """By the decode instances: P computes a token of every prompt, too, that nobody gets."""
    told = {(i.address, i.epoch): sight.engines.latest(i) for i in sight.pool if i.role == "D"}
    return {
        engine: (numbers.at, numbers.generated_tokens)
        for engine, numbers in told.items()
        if numbers is not None and numbers.generated_tokens is not None
    }


def marks_of(pool: Pool) -> list[tuple[object, ...]]:
    """What of the instances is worth telling at once."""
    return [(i.role, i.address, i.state, i.reason, i.in_flight, i.problem) for i in pool]


# Where a request is: serial, phase, P's address, D's address.
Where = tuple[int, str, str, str]


def open_requests(in_flight: Mapping[int, RequestRecord]) -> dict[int, Where]:
    return {serial: _where(record) for serial, record in islice(in_flight.items(), MAX_OPEN)}


def _where(record: RequestRecord) -> Where:
    return record.serial, phase_of(record), record.prefill, record.decode


def phase_of(record: RequestRecord) -> str:
    if not record.attempts:
        return "queue"
    if record.first_byte_at is not None:
        return "decode"
    if not record.prefill:
        return "alone"  # D computes the prompt
    return "prefill" if record.prefill_done_at is None else "handoff"


def ended_requests(stats: Stats, since: int, most: int) -> list[dict[str, Any]]:
    """Those that ended after the first `since`, as far as they are still known, the oldest first; `most` at most."""
    records = stats.stories.recent(min(stats.num_ended - since, most))
    first = stats.num_ended - len(records) + 1
    return [_ended(record, number) for number, record in enumerate(records, first)]


def _ended(record: RequestRecord, number: int) -> dict[str, Any]:
    return record.as_dict() | {"number": number, "serial": record.serial}


def says(sight: Sight, alone: tuple[int, Counter[str]]) -> dict[str, Any]:
    """How it is, in words that anybody understands."""
    status, reason = sight.judge()
    notes = [sentence(reason)] if reason else []
    notes += [f"{i.name}: {i.problem}" for i in sight.pool if i.problem]
    notes += _alone_note(*alone)
    lanes = f"{_count(sight.pool, 'P', 'prefill')} and {_count(sight.pool, 'D', 'decode')}"
    last = sum(i.role == "D" for i in sight.pool)
    text = f"{lanes} instance{'' if last == 1 else 's'} ready, {_requests(sight.admission)}."
    return {"status": status, "text": text, "notes": notes}


def _count(pool: Pool, role: str, lane: str) -> str:
    """`2 prefill`, or `1 of 2 prefill`."""
    mine = [i for i in pool if i.role == role]
    num_ready = sum(i.state is State.READY for i in mine)
    return f"{num_ready} {lane}" if num_ready == len(mine) else f"{num_ready} of {len(mine)} {lane}"


def _requests(admission: Admission) -> str:
    in_flight = f"{admission.in_flight or 'no'} request{'' if admission.in_flight == 1 else 's'} in flight"
    waiting = f", {admission.queued} waiting for a place" if admission.queued else ""
    return in_flight + waiting


def _alone_note(num_requests: int, alone: Counter[str]) -> Iterable[str]:
    total = alone.total()
    if total:
        causes = "; ".join(f"{why_alone(cause)} ({count})" for cause, count in alone.most_common(4))
        who = "a decode instance computed the prompt itself"
        yield f"In the last 15 minutes {who} for {total} of {num_requests} requests: {causes}."


def why_alone(cause: str) -> str:
    kind, _, field = cause.partition(":")
    return f"a body with {field} can't be split" if kind == "body" else _WHY_ALONE.get(cause, cause)


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
