"""Traces of the workers, the proxy's records, the client's times -> where a request's time went. Pure but for reading.

All times are seconds of CLOCK_MONOTONIC, which every process of one machine reads alike. A moment is called by the side
and the event (`P computed`); with several ranks it is the last rank's.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from twolane.bench.client import Sample
from twolane.bench.report import percentile


class Event(msgspec.Struct, frozen=True):
    """A line of `trace_file`; see src/twolane/connector/story.py."""

    t: float
    side: Literal["P", "D"]
    transfer_id: str
    event: str
    rank: int = 0


@dataclass(frozen=True)
class Stage:
    """From one moment to another."""

    name: str
    start: str
    end: str


CHAIN = (  # each begins where the one before ends; together they are TTFT
    Stage("client to proxy: HTTP, the body parsed", "sent", "proxy"),
    Stage("proxy to P's first step: HTTP, parsing, schedule", "proxy", "P offered"),
    Stage("P: forward passes launched", "P offered", "P launched"),
    Stage("P: the GPU computes to the last layer", "P launched", "P computed"),
    Stage("last layer to last byte", "P computed", "P pushed"),
    Stage("last byte to DONE seen at D", "P pushed", "D landed"),
    Stage("DONE to D's engine", "D landed", "D reported"),
    Stage("D: schedule, launch of its step", "D reported", "D stepped"),
    Stage("D's step, sampling, HTTP, to the client's first token", "D stepped", "first token"),
)
BESIDE = (
    Stage("all: TTFT", "sent", "first token"),
    Stage("last layer to DONE seen at D", "P computed", "D landed"),
    Stage("last layer to first token", "P computed", "first token"),
    Stage("D's step waits for the last byte", "D held", "P pushed"),
    Stage("proxy to D's blocks allocated", "proxy", "D allocated"),
    Stage("P's first step to D's blocks allocated", "P offered", "D allocated"),
    Stage("D's blocks to announce sent", "D allocated", "D announce_sent"),
    Stage("announce on its way to P", "D announce_sent", "P announced"),
    Stage("announce at P before the last layer", "P announced", "P computed"),
    Stage("first byte to first token (client)", "first byte", "first token"),
)


def read_traces(files: Iterable[Path]) -> list[Event]:
    """A line that was cut, as the last one of a killed worker, is left out."""
    decoder = msgspec.json.Decoder(Event)
    events = []
    for file in files:
        for line in file.read_bytes().splitlines():
            try:
                events.append(decoder.decode(line))
            except msgspec.MsgspecError:
                continue
    return events


def by_transfer(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """transfer_id -> moment -> seconds; of several ranks the last."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        moments = found.setdefault(event.transfer_id, {})
        name = f"{event.side} {event.event}"
        moments[name] = max(event.t, moments.get(name, event.t))
    return found


def moments_of(sample: Sample, record: Mapping[str, Any], traced: Mapping[str, float]) -> dict[str, float]:
    """All moments of one request. `record`: the proxy's, out of /stats; `traced`: of its transfer."""
    moments = dict(traced) | {"sent": sample.sent_s}
    if record.get("started_s") is not None:
        moments["proxy"] = record["started_s"]
    if sample.first_byte_s is not None:
        moments["first byte"] = sample.first_byte_s
    if sample.event_s:
        moments["first token"] = sample.event_s[0]
    return moments


def stage_rows(requests: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row a stage, in ms over the requests that have both its moments; a stage that none has is left out.

    `critical`: a row of the chain.
    """
    chain = joined({moment for moments in requests for moment in moments})
    rows: list[dict[str, Any]] = []
    for stage in (*chain, *BESIDE):
        took_ms = [1e3 * (m[stage.end] - m[stage.start]) for m in requests if stage.start in m and stage.end in m]
        if took_ms:
            row = {"stage": stage.name, "from": stage.start, "to": stage.end, "critical": stage in chain}
            rows.append(row | spread(took_ms))
    return rows


def joined(known: Collection[str]) -> list[Stage]:
    """The chain, with stages made one where nobody noted the moment between them."""
    chain: list[Stage] = []
    names: list[str] = []
    start = CHAIN[0].start
    for stage in CHAIN:
        names.append(stage.name)
        if stage.end in known:
            chain.append(Stage("; ".join(names), start, stage.end))
            names, start = [], stage.end
    return chain


def spread(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Median, quartiles, p99 and how many."""
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "median": round(statistics.median(ordered), digits),
        "q1": round(percentile(ordered, 0.25), digits),
        "q3": round(percentile(ordered, 0.75), digits),
        "p99": round(percentile(ordered, 0.99), digits),
    }
