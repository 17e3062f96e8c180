"""What an instance's own /metrics page tells of its engine. Pure.

A page of vLLM has some 80 kB and takes 9 ms to parse: too long for a loop that carries tokens. The few lines that count
are found first, by name, which takes less than a tenth of a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any

import msgspec

_MAX_LINES = 256  # of a name: engines of one instance times values of a label
_MAX_LABEL_VALUES = 32


class EngineNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the engine's start, but for the gauges. None: the instance doesn't tell."""

    at: float  # monotonic, s: when it was asked
    epoch: str  # of the instance that told
    running: float | None = None  # gauges: requests
    waiting: float | None = None
    kv_usage: float | None = None  # gauge, 0 to 1
    prompt_tokens: float | None = None  # of all prompts, wherever their KV came from
    prompt_tokens_by_source: dict[str, float] | None = None  # computed here: local_compute
    generated_tokens: float | None = None
    preemptions: float | None = None
    kv_sent_transfers: float | None = None
    kv_sent_tokens: float | None = None
    kv_sent_bytes: float | None = None
    kv_send_failures: dict[str, float] | None = None  # by cause
    kv_leases_expired: float | None = None
    kv_received_transfers: float | None = None
    kv_received_tokens: float | None = None
    kv_received_bytes: float | None = None
    kv_receive_failures: dict[str, float] | None = None  # by cause
    kv_recomputed_tokens: float | None = None
    kv_refused_peers: float | None = None
    kv_bytes_per_s: float | None = None  # sent and received, between the last two answers

    def as_dict(self, now: float) -> dict[str, Any]:
        told: dict[str, Any] = msgspec.to_builtins(self)
        del told["at"], told["epoch"]
        return {"age_s": round(now - self.at, 3), **told}


# vLLM's own (vllm/v1/metrics/loggers.py), and the connector's (connector/stats.py).
_NAMES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    **{
        name: f"twolane_{name}_total"
        for name in (
            "kv_sent_transfers",
            "kv_sent_tokens",
            "kv_sent_bytes",
            "kv_leases_expired",
            "kv_received_transfers",
            "kv_received_tokens",
            "kv_received_bytes",
            "kv_recomputed_tokens",
            "kv_refused_peers",
        )
    },
}
_BY_LABEL = {
    "prompt_tokens_by_source": ("vllm:prompt_tokens_by_source_total", b"source"),
    "kv_send_failures": ("twolane_kv_send_failures_total", b"cause"),
    "kv_receive_failures": ("twolane_kv_receive_failures_total", b"cause"),
}
_LABEL = re.compile(rb'[{,](\w+)="(\w{1,64})"')


def read_page(page: bytes) -> Iterator[dict[str, Any]]:
    """One field of EngineNumbers after another, empty where the page doesn't tell it: who must not block for long may
    pause between two of them. Several engines of one instance are added up; of `kv_usage` it is the mean."""
    page = b"\n" + page
    for field, name in _NAMES.items():
        values = [value for _, value in _samples(page, name.encode())]
        num_parts = len(values) if field == "kv_usage" else 1
        yield {field: sum(values) / num_parts} if values else {}
    for field, (name, label) in _BY_LABEL.items():
        by_value: dict[str, float] = {}
        for line, value in _samples(page, name.encode()):
            key = dict(_LABEL.findall(line)).get(label, b"").decode()
            if key and (key in by_value or len(by_value) < _MAX_LABEL_VALUES):
                by_value[key] = by_value.get(key, 0.0) + value
        yield {field: by_value} if by_value else {}


def _samples(page: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """Lines of that very name, each with its value. What makes no sense is left out."""
    start = b"\n" + name
    at = page.find(start)
    for _ in range(_MAX_LINES):
        if at < 0:
            return
        end = page.find(b"\n", at + 1)
        line = page[at + 1 : end if end >= 0 else len(page)]
        if line[len(name) : len(name) + 1] in (b"{", b" "):
            value = _value(line)
            if value is not None:
                yield line, value
        at = page.find(start, at + 1)


def _value(line: bytes) -> float | None:
    try:
        value = float(line[line.rfind(b"}") + 1 :].split()[0 if b"}" in line else 1])
    except (ValueError, IndexError):
        return None
    return value if isfinite(value) and value >= 0 else None
