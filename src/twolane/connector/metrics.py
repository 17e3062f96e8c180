"""The workers' counters in vLLM's own /metrics and log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from twolane.connector.stats import HELP


@dataclass
class TwoLaneStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped here
    """`data`: counter name (a field of stats.Counters) -> what was added since the last report."""

    data: dict[str, int] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class TwoLanePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is untyped here
    """One Prometheus counter a name, labelled as vLLM labels its own."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"twolane_{name}", documentation=text, labelnames=labelnames)
            for name, text in HELP.items()
        }
        for counter in self._counters.values():
            for values in per_engine_labelvalues.values():
                counter.labels(*values)  # a counter that never counted reads 0, not nothing

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(count)
