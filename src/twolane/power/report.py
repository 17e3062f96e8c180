"""A sample as `/stats` and `/metrics` show it. Without one there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from twolane.power.lanes import GpuSample, Lane, LaneSample, Sample

_TOKEN_KEYS: dict[Lane, str] = {"prefill": "joules_per_prompt_token", "decode": "joules_per_generated_token"}


def as_dict(sample: Sample) -> dict[str, Any]:
    """What isn't known isn't in it. `update_s` alone may be None: it is found out by looking."""
    return {
        "every_s": sample.every_s,
        "update_s": None if sample.update_s is None else round(sample.update_s, 4),
        "gpus": [_gpu(gpu) for gpu in sample.gpus],
        "lanes": {lane: _lane(lane, totals) for lane, totals in sample.lanes.items() if lane != "other"},
    }


def _gpu(gpu: GpuSample) -> dict[str, Any]:
    watts = {} if gpu.watts is None else {"watts": round(gpu.watts, 3)}
    found: dict[str, Any] = {"uuid": gpu.uuid, "index": gpu.index, "name": gpu.name}
    return found | watts | {"joules": round(gpu.joules, 3), "lane": gpu.lane, "instances": list(gpu.instances)}


def _lane(lane: Lane, totals: LaneSample) -> dict[str, float]:
    watts = {} if totals.watts is None else {"watts": round(totals.watts, 3)}
    known = lane in _TOKEN_KEYS and totals.joules_per_token is not None
    per_token = {_TOKEN_KEYS[lane]: round(totals.joules_per_token or 0.0, 6)} if known else {}
    return watts | {"joules": round(totals.joules, 3)} | per_token


class PowerCollector(Collector):
    """For a prometheus_client registry: asks for the latest sample when it is scraped. Joules a token are a division:
    `rate(twolane_lane_counted_energy_joules_total[5m]) / rate(twolane_lane_counted_tokens_total[5m])`."""

    def __init__(self, latest: Callable[[], Sample | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[Metric]:
        sample = self._latest()
        if sample is not None:
            yield from _gpu_metrics(sample)
            yield from _lane_metrics(sample)


def _gpu_metrics(sample: Sample) -> Iterator[Metric]:
    labels = ("uuid", "gpu", "lane")
    watts = GaugeMetricFamily("twolane_gpu_power_watts", "Power that a GPU draws.", labels=labels)
    joules = CounterMetricFamily(
        "twolane_gpu_energy_joules", "Energy that a GPU took since the proxy's start.", labels=labels
    )
    for gpu in sample.gpus:
        values = (gpu.uuid, str(gpu.index), gpu.lane)
        if gpu.watts is not None:
            watts.add_metric(values, gpu.watts)
        joules.add_metric(values, gpu.joules)
    yield from (watts, joules)


def _lane_metrics(sample: Sample) -> Iterator[Metric]:
    joules = CounterMetricFamily(
        "twolane_lane_energy_joules", "Energy of a lane's GPUs since the proxy's start, idle or not.", labels=("lane",)
    )
    counted = CounterMetricFamily(
        "twolane_lane_counted_energy_joules",
        "The part of a lane's energy while its engines' tokens were counted.",
        labels=("lane",),
    )
    tokens = CounterMetricFamily(
        "twolane_lane_counted_tokens",
        "Tokens computed meanwhile: of prompts in the prefill lane, generated ones in the decode lane.",
        labels=("lane",),
    )
    for lane, totals in sample.lanes.items():
        joules.add_metric((lane,), totals.joules)
        if totals.tokens:
            counted.add_metric((lane,), totals.counted_j)
            tokens.add_metric((lane,), totals.tokens)
    yield from (joules, counted, tokens)
