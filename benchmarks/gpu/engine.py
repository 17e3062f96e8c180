"""What the proxy and an engine count themselves: blocking questions over HTTP. And what the kernel counts of them."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterable
from typing import Any

import psutil

from twolane.launch.probes import get_json, request

_SOURCE = re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', re.MULTILINE)


def recent_requests(proxy_address: str) -> list[dict[str, Any]]:
    stats = get_json(proxy_address, "/stats")
    return list(stats.get("recent", [])) if isinstance(stats, dict) else []


def prompt_tokens_by_source(address: str) -> dict[str, float]:
    """Prompt tokens that an engine computed, found in its cache, or got by a KV transfer. Empty if it doesn't say."""
    try:
        status, body = request(address, "GET", "/metrics")
    except (OSError, http.client.HTTPException):
        return {}
    return parse_sources(body.decode()) if status == 200 else {}


def parse_sources(metrics: str) -> dict[str, float]:
    return {source: float(value) for source, value in _SOURCE.findall(metrics)}


def served_model(address: str) -> str:
    """Empty if nobody answers there."""
    listed = get_json(address, "/v1/models")
    return str(listed["data"][0]["id"]) if listed and listed.get("data") else ""


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that these processes and all below them have taken."""
    total_s = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    total_s += times.user + times.system
    return total_s
