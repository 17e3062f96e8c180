"""Samples -> figures. Pure."""

from __future__ import annotations

import math
import statistics
from typing import Any

from twolane.bench.client import Sample


def percentile(values: list[float], share: float) -> float:
    """The value that `share` (0 to 1) of them don't exceed, by nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """Milliseconds, of the requests that got all their tokens; the others are counted, with the first error."""
    good = [sample for sample in samples if not sample.error]
    failed = [sample.error for sample in samples if sample.error]
    summary: dict[str, Any] = {"requests": len(samples), "failed": len(failed)}
    if failed:
        summary["first_error"] = failed[0]
    if not good:
        return summary
    ttft_ms = [1000 * sample.ttft_s for sample in good]
    summary |= {
        "ttft_p50_ms": round(statistics.median(ttft_ms), 1),
        "ttft_p99_ms": round(percentile(ttft_ms, 0.99), 1),
        "ttft_min_ms": round(min(ttft_ms), 1),
        "ttft_max_ms": round(max(ttft_ms), 1),
    }
    gaps_ms = [1000 * gap_s for sample in good for gap_s in sample.gaps_s]
    if gaps_ms:
        summary |= {
            "itl_p50_ms": round(statistics.median(gaps_ms), 1),
            "itl_p99_ms": round(percentile(gaps_ms, 0.99), 1),
        }
    return summary
