"""Which requests met the objective, and the figures of one step: one rate asked of one side for a while. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from twolane.bench.client import Sample
from twolane.bench.report import percentile

ROUND_DIGITS = 2


class Objective(msgspec.Struct, frozen=True):
    """What a request must keep to: its TTFT, and the p99 of its own gaps between tokens. `origin`: in words."""

    ttft_ms: float
    itl_ms: float
    origin: str


class Figures(msgspec.Struct, frozen=True):
    """Times in ms, of the requests that got all their tokens; None where there were none (or no two tokens).

    `goodput_per_s`: the offered rate times the share of all requests, failed ones too, that met the objective.
    `holds`: TTFT p99 and ITL p99 are within it, and nothing failed.
    """

    requests: int
    failed: int
    timed_out: int
    first_error: str
    good: int
    goodput_per_s: float
    holds: bool
    tokens: int  # generated, of failed requests too
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p99_ms: float | None = None


TIMES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def is_good(sample: Sample, objective: Objective) -> bool:
    if sample.error or 1000 * sample.ttft_s > objective.ttft_ms:
        return False
    return not sample.gaps_s or 1000 * percentile(sample.gaps_s, 0.99) <= objective.itl_ms


def figures_of(samples: Sequence[Sample], rate: float, objective: Objective) -> Figures:
    """`samples`: of one step, which offered `rate` requests a second."""
    whole = [sample for sample in samples if not sample.error]
    errors = [sample.error for sample in samples if sample.error]
    good = sum(is_good(sample, objective) for sample in whole)
    ttft = _percentiles("ttft", [sample.ttft_s for sample in whole])
    itl = _percentiles("itl", [gap_s for sample in whole for gap_s in sample.gaps_s])
    tpot = _percentiles("tpot", [seconds for sample in whole if (seconds := tpot_s(sample)) is not None])
    return Figures(
        requests=len(samples),
        failed=len(errors),
        timed_out=sum(error.startswith("TimeoutError") for error in errors),
        first_error=errors[0] if errors else "",
        good=good,
        goodput_per_s=round(rate * good / max(1, len(samples)), 4),
        holds=not errors
        and ttft.get("ttft_p99_ms", 0.0) <= objective.ttft_ms
        and itl.get("itl_p99_ms", 0.0) <= objective.itl_ms,
        tokens=sum(sample.num_tokens or len(sample.event_s) for sample in samples),
        **ttft,
        **itl,
        **tpot,
    )


def tpot_s(sample: Sample) -> float | None:
    """None for an answer of one token."""
    return (sample.event_s[-1] - sample.event_s[0]) / (sample.num_tokens - 1) if sample.num_tokens > 1 else None


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        f"{name}_p50_ms": round(1000 * statistics.median(seconds), ROUND_DIGITS),
        f"{name}_p99_ms": round(1000 * percentile(seconds, 0.99), ROUND_DIGITS),
    }


class Spread(msgspec.Struct, frozen=True):
    """One figure over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def over_rounds(values: Sequence[float | None]) -> Spread | None:
    """None if no round has a value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(round(statistics.median(known), 6), min(known), max(known), len(known))
