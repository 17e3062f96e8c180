"""Results -> figures, in ms and requests a second. Pure."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.record import Record, Results
from benchmarks.gpu.trace import moments_of, spread, stage_rows

from twolane.bench.report import percentile


def figures(results: Results) -> dict[str, Any]:
    return {
        "unloaded": unloaded(results),
        "loaded": loaded(results),
        "push": push(results),
        "stages": stages(results),
        "tokens": tokens(results),
        "received": received(results),
        "idle_cores": results.idle_cores,
    }


def lengths(records: list[Record]) -> list[int]:
    return sorted({record.length for record in records})


def unloaded(results: Results) -> list[dict[str, Any]]:
    rows = []
    for length in lengths([record for record in results.records if record.part == "unloaded"]):
        for route in results.routes("unloaded"):
            records = results.all("unloaded", route, length)
            good = [record for record in records if not record.sample.error]
            row: dict[str, Any] = {"length": length, "route": route, **_counts(records)}
            if good:
                row["ttft_ms"] = spread([1e3 * record.sample.ttft_s for record in good])
                row["itl_ms"] = _spread_or_none([1e3 * gap for record in good for gap in record.sample.gaps_s])
            row["above"] = [
                difference
                for base in _held_against(results, route)
                if (difference := above(good, results.good("unloaded", base, length), base))
            ]
            rows.append(row)
    return rows


def _counts(records: list[Record]) -> dict[str, Any]:
    errors = [record.sample.error for record in records if record.sample.error]
    return {"requests": len(records), "failed": len(errors), **({"first_error": errors[0]} if errors else {})}


def _spread_or_none(values: list[float]) -> dict[str, Any] | None:
    return spread(values) if values else None


def _held_against(results: Results, route: str) -> list[str]:
    """Its own D asked alone, and the one instance without a connector if it lived at the same time."""
    setup_of = {record.route: record.setup for record in results.records}
    group = results.beside.get(setup_of[route])
    plain = [
        other
        for other in results.routes("unloaded")
        if setup_of[other].startswith("plain") and other != route and results.beside.get(setup_of[other]) == group
    ]
    own = results.baselines.get(route)
    return [*([own] if own else []), *plain]


def above(records: list[Record], baseline: list[Record], name: str) -> dict[str, Any] | None:
    """TTFT above the baseline's: of the medians, and the spread over requests with the same prompt."""
    base = {record.turn: 1e3 * record.sample.ttft_s for record in baseline}
    pairs = [(1e3 * record.sample.ttft_s, base[record.turn]) for record in records if record.turn in base]
    if not pairs:
        return None
    of_medians = statistics.median(mine for mine, _ in pairs) - statistics.median(theirs for _, theirs in pairs)
    return {"baseline": name, "of_medians_ms": round(of_medians, 2)} | spread([mine - theirs for mine, theirs in pairs])


def loaded(results: Results) -> list[dict[str, Any]]:
    """ITL p99 beside the median of the same route's decoder while nobody else asked."""
    rows = []
    for route in results.routes("loaded"):
        records = results.all("loaded", route)
        good = results.good("loaded", route)
        row: dict[str, Any] = {"length": records[0].length, "route": route, **_counts(records)}
        gaps_ms = [1e3 * gap for record in good for gap in record.sample.gaps_s]
        idle_ms = [1e3 * gap for r in results.good("unloaded", route, records[0].length) for gap in r.sample.gaps_s]
        if good:
            row["ttft_ms"] = spread([1e3 * record.sample.ttft_s for record in good])
            row["itl_ms"] = _spread_or_none(gaps_ms)
        if gaps_ms and idle_ms:
            idle_median_ms = statistics.median(idle_ms)
            row["idle_itl_median_ms"] = round(idle_median_ms, 2)
            row["itl_p99_of_idle"] = round(percentile(gaps_ms, 0.99) / idle_median_ms, 2)
        rows.append(row)
    return rows


def push(results: Results) -> list[dict[str, Any]]:
    """Prompts a second of P with handoff and without; the ratio of each pair of blocks."""
    rows = []
    for setup in dict.fromkeys(record.setup for record in results.records if record.part == "push"):
        mine = [record for record in results.records if record.part == "push" and record.setup == setup]
        errors = [record.sample.error for record in mine if record.sample.error]
        row: dict[str, Any] = {"setup": setup, "length": mine[0].length, "failed": len(errors)}
        if errors:
            row["first_error"] = errors[0]
        handoff, alone = ([r for r in mine if r.route.endswith(": P alone") == is_alone] for is_alone in (False, True))
        with_s, without_s = _rates(handoff), _rates(alone)
        row["with_handoff_per_s"] = {turn: round(rate, 3) for turn, rate in with_s.items()}
        row["without_per_s"] = {turn: round(rate, 3) for turn, rate in without_s.items()}
        ratios = [with_s[turn] / without_s[turn] for turn in with_s if turn in without_s]
        if ratios:
            row["lost_percent"] = spread([100 * (1 - ratio) for ratio in ratios])
        rows.append(row)
    return rows


def _rates(records: list[Record]) -> dict[int, float]:
    rates = {}
    for turn in sorted({record.turn for record in records}):
        ended_s = [r.sample.ended_s for r in records if r.turn == turn and not r.sample.error]
        rate = steady_rate([at_s for at_s in ended_s if at_s is not None])
        if rate is not None:
            rates[turn] = rate
    return rates


def steady_rate(ended_s: list[float]) -> float | None:
    """Ends a second: the slope of a line through all of them, so that one that was late or early counts little.

    What lies between P's last layer and an answer delays every end alike and cancels out.
    """
    ordered = sorted(ended_s)
    if len(ordered) < 3 or ordered[0] == ordered[-1]:
        return None
    return 1 / statistics.linear_regression(range(len(ordered)), ordered).slope


def received(results: Results) -> dict[str, dict[str, float]]:
    """Prompt tokens on D by source while requests came one at a time, and how many a handoff of each should bring.

    Without this a D that computes everything by itself would pass for a fast handoff.
    """
    rows = {}
    for setup, sources in results.received.items():
        handed_over = [r for r in results.records if r.part == "unloaded" and r.route == setup and not r.sample.error]
        expected = sum(record.length - 1 for record in handed_over)  # D computes the last one in any case
        rows[setup] = sources | {"expected_by_handoff": float(expected)}
    return rows


def stages(results: Results) -> list[dict[str, Any]]:
    """A stage table for each setup and length whose workers wrote traces."""
    tables = []
    for route in results.routes("unloaded"):
        for length in lengths(results.all("unloaded", route)):
            requests = []
            for record in results.good("unloaded", route, length):
                proxied = results.proxied.get(record.request_id, {})
                traced = results.moments.get(str(proxied.get("transfer_id")))
                if traced:
                    requests.append(moments_of(record.sample, proxied, traced))
            if requests:
                tables.append({"route": route, "length": length, "rows": stage_rows(requests)})
    return tables


def tokens(results: Results) -> list[dict[str, Any]]:
    """How many of the same prompts were answered alike as on the baseline: ids of the warm-up, texts of all others.

    bf16 through other kernels may differ without anything being wrong.
    """
    rows = []
    for route, base in results.baselines.items():
        for length in lengths(results.all("warm-up", route)):
            ids = [(a.sample.token_ids, b.sample.token_ids) for a, b in _pairs(results, "warm-up", route, base, length)]
            texts = [(a.sample.text, b.sample.text) for a, b in _pairs(results, "unloaded", route, base, length)]
            first = [_common_prefix(a, b) for a, b in ids]
            rows.append(
                {
                    "route": route,
                    "baseline": base,
                    "length": length,
                    "ids_compared": len(ids),
                    "ids_equal": sum(a == b for a, b in ids),
                    "ids_equal_from_the_start": first,
                    "texts_compared": len(texts),
                    "texts_equal": sum(a == b for a, b in texts),
                }
            )
    return rows


def _pairs(results: Results, part: Any, route: str, base: str, length: int) -> list[tuple[Record, Record]]:
    theirs = {record.turn: record for record in results.good(part, base, length)}
    return [(mine, theirs[mine.turn]) for mine in results.good(part, route, length) if mine.turn in theirs]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
