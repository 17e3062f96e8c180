"""Power over time, as a run has recorded it or a file holds it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from twolane.power.lanes import Lane, Member, Sample
from twolane.power.sampler import EVERY_S, Sampler

_FIRST_SAMPLE_TIMEOUT_S = 30.0  # drivers without persistence mode take seconds to open


@dataclass(frozen=True, slots=True)
class Point:
    """One GPU at one moment. `watts` is NaN where it isn't told."""

    time_s: float
    at_s: float
    uuid: str
    index: int
    lane: str
    watts: float
    joules: float
    prefill_in_flight: int
    decode_in_flight: int


@dataclass(slots=True)
class GpuSeries:
    """Arrays of one length. Times in s: `time_s` since 1970, `at_s` monotonic. `joules` since the series began, never
    less than before."""

    uuid: str
    index: int
    time_s: array[float] = field(default_factory=lambda: array("d"))
    at_s: array[float] = field(default_factory=lambda: array("d"))
    watts: array[float] = field(default_factory=lambda: array("d"))
    joules: array[float] = field(default_factory=lambda: array("d"))
    lanes: list[str] = field(default_factory=list)

    def joules_between(self, from_s: float, to_s: float) -> float:
        """Monotonic times. What lies between two samples is taken for even."""
        return self._joules_at(to_s) - self._joules_at(from_s)

    def _joules_at(self, moment_s: float) -> float:
        after = bisect_left(self.at_s, moment_s)
        if after == 0:
            return self.joules[0]
        if after == len(self.at_s):
            return self.joules[-1]
        share = (moment_s - self.at_s[after - 1]) / (self.at_s[after] - self.at_s[after - 1])
        return self.joules[after - 1] + share * (self.joules[after] - self.joules[after - 1])


@dataclass(slots=True)
class LaneSeries:
    """Sums over the GPUs that were in a lane at each moment; NaN watts where none of them told. `joules` since the
    series began."""

    at_s: array[float] = field(default_factory=lambda: array("d"))
    watts: array[float] = field(default_factory=lambda: array("d"))
    joules: array[float] = field(default_factory=lambda: array("d"))
    in_flight: array[int] = field(default_factory=lambda: array("q"))


@dataclass(frozen=True, slots=True)
class PowerSeries:
    """`update_s`: how often the GPUs' power really changed, no finer than `every_s`; None: not known."""

    every_s: float
    update_s: float | None
    gpus: dict[str, GpuSeries]  # by UUID
    lanes: dict[str, LaneSeries]


def make_series(points: Iterable[Point], every_s: float, update_s: float | None) -> PowerSeries:
    """`points`: in order of time. Joules that begin anew (another run of the proxy, in the same file) go on here."""
    gpus: dict[str, GpuSeries] = {}
    lanes: dict[str, LaneSeries] = {}
    totals: defaultdict[str, float] = defaultdict(float)
    last_j: dict[str, float] = {}
    for point in points:
        taken_j = max(0.0, point.joules - last_j.get(point.uuid, point.joules))
        last_j[point.uuid] = point.joules
        gpu = gpus.setdefault(point.uuid, GpuSeries(point.uuid, point.index))
        gpu.time_s.append(point.time_s)
        gpu.at_s.append(point.at_s)
        gpu.watts.append(point.watts)
        gpu.joules.append((gpu.joules[-1] if gpu.joules else 0.0) + taken_j)
        gpu.lanes.append(point.lane)
        totals[point.lane] += taken_j
        _add(lanes.setdefault(point.lane, LaneSeries()), point, totals[point.lane])
    return PowerSeries(every_s, update_s, gpus, lanes)


def _add(lane: LaneSeries, point: Point, joules: float) -> None:
    if not lane.at_s or lane.at_s[-1] != point.at_s:
        in_flight = {"prefill": point.prefill_in_flight, "decode": point.decode_in_flight}
        lane.at_s.append(point.at_s)
        lane.watts.append(math.nan)
        lane.joules.append(0.0)
        lane.in_flight.append(in_flight.get(point.lane, point.prefill_in_flight + point.decode_in_flight))
    lane.joules[-1] = joules
    if not math.isnan(point.watts):
        lane.watts[-1] = point.watts if math.isnan(lane.watts[-1]) else lane.watts[-1] + point.watts


def points_of(sample: Sample) -> list[Point]:
    return [
        Point(
            sample.time_s,
            sample.at_s,
            gpu.uuid,
            gpu.index,
            gpu.lane,
            math.nan if gpu.watts is None else gpu.watts,
            gpu.joules,
            sample.prefill_in_flight,
            sample.decode_in_flight,
        )
        for gpu in sample.gpus
    ]


class PowerRecorder:
    """Records a run, in memory: `with PowerRecorder() as recorder: ...`, then `recorder.series()`. Owns a Sampler.

    `lanes`: whose GPUs are whose, by UUID; a GPU that isn't named is `other`. The first sample is taken before the run
    begins, the last when it has ended, so the joules of both ends are in it.
    """

    def __init__(self, every_s: float = EVERY_S, lanes: dict[str, Lane] | None = None) -> None:
        self._samples: list[Sample] = []
        self._every_s = every_s
        members = _members(lanes or {})
        self._sampler = Sampler(lambda: members, every_s)
        self._watched = self._sampler.watched(self._samples.append)

    def __enter__(self) -> Self:
        self._watched.__enter__()
        self._sampler.start()
        self._sampler.wait_decided(_FIRST_SAMPLE_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.stop()
        self._watched.__exit__(kind, error, trace)

    def series(self) -> PowerSeries | None:
        """What there is so far, also during the run. None without NVML."""
        samples = list(self._samples)
        if not samples:
            return None
        points = [point for sample in samples for point in points_of(sample)]
        return make_series(points, self._every_s, samples[-1].update_s)


def _members(lanes: dict[str, Lane]) -> Sequence[Member]:
    """As if each lane were one instance."""
    prefill = [uuid for uuid, lane in lanes.items() if lane in {"prefill", "both"}]
    decode = [uuid for uuid, lane in lanes.items() if lane in {"decode", "both"}]
    return [Member("P", "prefill", prefill), Member("D", "decode", decode)]
