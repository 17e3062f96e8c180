"""What the GPUs drew while a load ran, by lane. Pure; `twolane.power` records it. Without NVML there is nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from twolane.launch.plan import ServiceSpec
from twolane.power import PowerSeries
from twolane.power.series import GpuSeries

BINS = 120  # of a chart


class GpuPower(msgspec.Struct, frozen=True):
    """One GPU in one load. `at_s` counts from the load's start; watts that weren't told aren't in it."""

    index: int
    lane: str
    joules: float
    at_s: list[float]
    watts: list[float]


class Drawn(msgspec.Struct, frozen=True):
    """`update_s`: how often the power that the GPUs tell really changes; None: not known."""

    update_s: float | None
    seconds: float
    gpus: list[GpuPower]

    def joules(self, lane: str | None = None) -> float:
        """Of all GPUs, or of a lane's."""
        return sum(gpu.joules for gpu in self.gpus if lane in (None, gpu.lane))


def lanes_by_gpu(instances: Sequence[ServiceSpec], plain: bool) -> dict[int, str]:
    """GPU number -> lane; `both` where P and D share one. Plain instances make one lane."""
    found: dict[int, str] = {}
    for spec in instances:
        for gpu in spec.gpus:
            lane = "aggregated" if plain else spec.role
            found[gpu] = lane if found.get(gpu, lane) == lane else "both"
    return found


def drawn(series: PowerSeries | None, lanes: Mapping[int, str], began_s: float, ended_s: float) -> Drawn | None:
    """From monotonic time to monotonic time, of the GPUs that are named."""
    if series is None:
        return None
    named = [gpu for gpu in series.gpus.values() if gpu.index in lanes and len(gpu.at_s)]
    gpus = [_gpu(gpu, lanes[gpu.index], began_s, ended_s) for gpu in sorted(named, key=lambda gpu: gpu.index)]
    return Drawn(series.update_s, round(ended_s - began_s, 3), gpus) if gpus else None


def _gpu(gpu: GpuSeries, lane: str, began_s: float, ended_s: float) -> GpuPower:
    told = [
        (round(at_s - began_s, 3), round(watts, 1))
        for at_s, watts in zip(gpu.at_s, gpu.watts, strict=True)
        if began_s <= at_s <= ended_s and not math.isnan(watts)
    ]
    joules = round(gpu.joules_between(began_s, ended_s), 2)
    return GpuPower(gpu.index, lane, joules, [at_s for at_s, _ in told], [watts for _, watts in told])


def over_time(found: Drawn) -> tuple[list[float], dict[str, list[float | None]]]:
    """For a chart: times, and the watts of each lane, its GPUs added up, as means of equal stretches of time."""
    step_s = found.seconds / BINS
    lanes: dict[str, list[float | None]] = {}
    for gpu in found.gpus:
        means = _means(gpu, step_s)
        old = lanes.get(gpu.lane)
        lanes[gpu.lane] = means if old is None else [_sum(a, b) for a, b in zip(old, means, strict=True)]
    return [round((index + 0.5) * step_s, 3) for index in range(BINS)], lanes


def _means(gpu: GpuPower, step_s: float) -> list[float | None]:
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for at_s, watts in zip(gpu.at_s, gpu.watts, strict=True):
        bins[min(BINS - 1, int(at_s / step_s))].append(watts)
    return [round(sum(values) / len(values), 1) if values else None for values in bins]


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a + b, 1)


def per_token(found: Drawn, prompt_tokens: int, generated_tokens: int) -> dict[str, float]:
    """Joules: all of them for each generated token, which is what sides can be compared by; and of each lane alone, for
    what it computes."""
    shares = {
        "joules_per_generated_token": (found.joules(), generated_tokens),
        "prefill_joules_per_prompt_token": (found.joules("prefill"), prompt_tokens),
        "decode_joules_per_generated_token": (found.joules("decode"), generated_tokens),
    }
    return {name: round(joules / tokens, 5) for name, (joules, tokens) in shares.items() if joules and tokens}
