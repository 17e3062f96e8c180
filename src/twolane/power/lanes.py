"""Pure: which GPU works for which lane, and what each lane took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from twolane.power.meter import Joules, Tokens, UpdateInterval
from twolane.power.nvml import GpuReading
from twolane.protocol import LANES, Role

Lane = Literal["prefill", "decode", "both", "other"]


@dataclass(frozen=True, slots=True)
class Member:
    """An instance at one moment. `tokens`: its engine's cumulative count, of prompt tokens for P and generated ones for
    D; None: not known."""

    role: Role
    name: str
    gpus: Sequence[str]  # UUIDs
    in_flight: int = 0
    tokens: float | None = None


@dataclass(frozen=True, slots=True)
class GpuSample:
    uuid: str
    index: int
    name: str
    lane: Lane
    watts: float | None
    joules: float  # since the first sample
    instances: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LaneSample:
    """`counted_j`: the part of the joules during which the tokens of all the lane's engines were known; `tokens`: how
    many those were meanwhile."""

    watts: float | None
    joules: float
    counted_j: float
    tokens: float

    @property
    def joules_per_token(self) -> float | None:
        return self.counted_j / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything at one moment. A GPU that doesn't answer isn't in it."""

    at_s: float  # monotonic
    time_s: float  # since 1970
    every_s: float
    update_s: float | None
    gpus: tuple[GpuSample, ...]
    lanes: Mapping[Lane, LaneSample]
    prefill_in_flight: int = 0
    decode_in_flight: int = 0


def lane_of(uuid: str, members: Iterable[Member]) -> Lane:
    lanes: set[Lane] = {LANES[member.role] for member in members if uuid in member.gpus}
    return "other" if not lanes else "both" if len(lanes) > 1 else lanes.pop()


@dataclass(slots=True)
class _LaneTotals:
    joules: float = 0.0
    counted_j: float = 0.0
    tokens: float = 0.0


class Meters:
    """Owns what is added up over the samples. Used by one thread."""

    def __init__(self) -> None:
        self._joules: defaultdict[str, Joules] = defaultdict(Joules)
        self._updates: defaultdict[str, UpdateInterval] = defaultdict(UpdateInterval)
        self._tokens: dict[tuple[Role, str], Tokens] = {}
        self._lanes: defaultdict[Lane, _LaneTotals] = defaultdict(_LaneTotals)
        self._every_s = 0.0

    def take(
        self, readings: Sequence[GpuReading], members: Sequence[Member], at_s: float, time_s: float, every_s: float
    ) -> Sample:
        if every_s != self._every_s:
            self._every_s = every_s
            self._updates.clear()
        lanes = {reading.uuid: lane_of(reading.uuid, members) for reading in readings}
        taken_j: defaultdict[Lane, float] = defaultdict(float)
        for reading in readings:
            self._updates[reading.uuid].add(reading)
            taken_j[lanes[reading.uuid]] += self._joules[reading.uuid].add(reading)
        self._add_up(taken_j, self._new_tokens(members, lanes))
        return Sample(
            at_s=at_s,
            time_s=time_s,
            every_s=every_s,
            update_s=self._update_s(),
            gpus=tuple(self._gpu(reading, lanes[reading.uuid], members) for reading in readings),
            lanes={lane: _lane(totals, lane, readings, lanes) for lane, totals in self._lanes.items()},
            prefill_in_flight=sum(member.in_flight for member in members if member.role == "P"),
            decode_in_flight=sum(member.in_flight for member in members if member.role == "D"),
        )

    def _update_s(self) -> float | None:
        """The quickest GPU's: one that idles at one and the same power says nothing of its sensor."""
        return min((s for updates in self._updates.values() if (s := updates.median_s) is not None), default=None)

    def _gpu(self, reading: GpuReading, lane: Lane, members: Sequence[Member]) -> GpuSample:
        names = tuple(member.name for member in members if reading.uuid in member.gpus)
        joules = self._joules[reading.uuid].total_j
        return GpuSample(reading.uuid, reading.index, reading.name, lane, reading.watts, joules, names)

    def _new_tokens(self, members: Sequence[Member], lanes: Mapping[str, Lane]) -> dict[Lane, float | None]:
        """By lane; None where an engine doesn't tell. Engines on GPUs that aren't seen here don't count, nor do those
        that share one with the other lane."""
        mine = [m for m in members if m.gpus and all(lanes.get(uuid) == LANES[m.role] for uuid in m.gpus)]
        meters = {(member.role, member.name): self._tokens.get((member.role, member.name), Tokens()) for member in mine}
        self._tokens = meters
        new: dict[Lane, float | None] = {}
        for member in mine:
            lane = LANES[member.role]
            more = None if member.tokens is None else meters[member.role, member.name].add(member.tokens)
            so_far = new.get(lane, 0.0)
            new[lane] = None if more is None or so_far is None else so_far + more
        return new

    def _add_up(self, taken_j: Mapping[Lane, float], new_tokens: Mapping[Lane, float | None]) -> None:
        for lane, joules in taken_j.items():
            totals, more = self._lanes[lane], new_tokens.get(lane)
            totals.joules += joules
            if more is not None:
                totals.counted_j += joules
                totals.tokens += more


def _lane(totals: _LaneTotals, lane: Lane, readings: Sequence[GpuReading], lanes: Mapping[str, Lane]) -> LaneSample:
    told = [r.watts for r in readings if lanes[r.uuid] == lane and r.watts is not None]
    return LaneSample(sum(told) if told else None, totals.joules, totals.counted_j, totals.tokens)
