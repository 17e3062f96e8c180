"""The workers' counters in vLLM's own /metrics and log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from twolane.connector.stats import BUCKETS, BY_CAUSE, HELP, Cause, Counts, add_up, summary


@dataclass
class TwoLaneStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped here
    """`data`: what was counted since the last report, all of an instance's workers together; see stats.Counters."""

    data: Counts = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        add_up(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return summary(self.data)

    def is_empty(self) -> bool:
        return not self.data


class TwoLanePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is untyped here
    """One Prometheus metric a name, labelled as vLLM labels its own; failures by `cause` besides."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {name: self._make(name, labelnames) for name in HELP}
        for name in HELP:
            for values in per_engine_labelvalues.values():  # what never counted reads 0, not nothing
                for cause in Cause if name in BY_CAUSE else ("",):
                    self._labelled(name, values, cause)

    def _make(self, name: str, labelnames: list[str]) -> Any:
        full = {"name": f"twolane_{name}", "documentation": HELP[name], "labelnames": labelnames}
        if name in BUCKETS:
            return self._histogram_cls(**full, buckets=BUCKETS[name])
        return self._counter_cls(**full | {"labelnames": [*labelnames, "cause"] if name in BY_CAUSE else labelnames})

    def _labelled(self, name: str, values: list[object], cause: str) -> Any:
        return self._metrics[name].labels(*values, *([str(cause)] if name in BY_CAUSE else []))

    def observe(self, transfer_stats_data: Counts, engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for name, counted in transfer_stats_data.items():
            if isinstance(counted, int):
                self._labelled(name, values, "").inc(counted)
            elif isinstance(counted, list):
                histogram = self._labelled(name, values, "")
                for seconds in counted:
                    histogram.observe(seconds)
            else:
                for cause, count in counted.items():
                    self._labelled(name, values, cause).inc(count)
