"""The arithmetic between raw times and the GPU benchmark's tables."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.gpu.engine import parse_sources
from benchmarks.gpu.figures import figures, steady_rate
from benchmarks.gpu.record import Part, Record, Results
from benchmarks.gpu.tables import show
from rich.console import Console

from twolane.bench.client import Sample


def add(results: Results, part: Part, route: str, turn: int, ttft_ms: float, **more: Any) -> None:
    length = more.pop("length", 1024)
    sample = Sample(10.0, [10.0 + ttft_ms / 1e3, 10.01 + ttft_ms / 1e3], 2, **more)
    setup = route.partition(":")[0]
    results.records.append(Record(part, setup, route, length, turn, f"{part}-{turn}-{route}", sample))


def made(*ttfts_ms: tuple[float, float]) -> Results:
    """Pairs of TTFTs: through both lanes, and D alone."""
    results = Results(baselines={"shm": "shm: D alone"}, beside={"shm": 0, "plain": 0})
    for turn, (handoff_ms, alone_ms) in enumerate(ttfts_ms):
        add(results, "unloaded", "shm", turn, handoff_ms)
        add(results, "unloaded", "shm: D alone", turn, alone_ms)
    return results


def test_above_is_both_of_medians_and_of_pairs() -> None:
    rows = figures(made((10, 5), (20, 16), (40, 30)))["unloaded"]
    (above,) = rows[0]["above"]
    assert (above["of_medians_ms"], above["median"], above["q1"], above["q3"]) == (4.0, 5.0, 4.0, 10.0)
    assert rows[1]["above"] == []


def test_a_failed_request_is_counted_and_paired_with_nobody() -> None:
    results = made((10, 5))
    add(results, "unloaded", "shm", 1, 1.0, error="503: busy")
    add(results, "unloaded", "shm: D alone", 1, 7.0)
    row = figures(results)["unloaded"][0]
    assert (row["requests"], row["failed"], row["first_error"]) == (2, 1, "503: busy")
    assert row["above"][0]["n"] == 1


@pytest.mark.parametrize(("group", "expected"), [(0, ["shm: D alone", "plain"]), (1, ["shm: D alone"])])
def test_one_instance_is_held_against_if_it_lived_at_the_same_time(group: int, expected: list[str]) -> None:
    results = made((10, 5))
    add(results, "unloaded", "plain", 0, 6)
    results.beside["plain"] = group
    row = figures(results)["unloaded"][0]
    assert [entry["baseline"] for entry in row["above"]] == expected


def test_a_rate_is_of_all_ends_and_one_late_end_counts_little() -> None:
    ends = [10.0 + index / 4 for index in range(32)]
    assert steady_rate(ends) == pytest.approx(4.0)
    assert steady_rate([*ends[:-1], ends[-1] + 0.05]) == pytest.approx(4.0, rel=0.002)
    assert steady_rate(ends[:2]) is None


def test_what_p_loses_is_the_ratio_of_each_pair_of_blocks() -> None:
    results = Results()
    for turn in range(2):
        for index in range(12):
            add(results, "push", "shm", turn, 1.0, ended_s=10.0 + index * 1.25, length=8192)
            add(results, "push", "shm: P alone", turn, 1.0, ended_s=10.0 + index, length=8192)
    (row,) = figures(results)["push"]
    assert row["with_handoff_per_s"] == {0: 0.8, 1: 0.8}
    assert row["lost_percent"]["median"] == pytest.approx(20.0)


def test_gaps_under_load_are_held_against_the_idle_decoders() -> None:
    results = made((10, 5))
    add(results, "loaded", "shm", 0, 30.0)
    results.records[-1].sample.event_s.append(results.records[-1].sample.event_s[-1] + 0.025)
    (row,) = figures(results)["loaded"]
    assert (row["idle_itl_median_ms"], row["itl_p99_of_idle"]) == (10.0, 2.5)


def test_answers_are_compared_by_ids_and_texts() -> None:
    results = made((10, 5))
    for route, ids in (("shm", [1, 2, 4]), ("shm: D alone", [1, 2, 3])):
        add(results, "warm-up", route, 0, 1.0, token_ids=ids)
        add(results, "warm-up", route, 1, 1.0, token_ids=[7])
    (row,) = figures(results)["tokens"]
    assert (row["ids_equal"], row["ids_compared"], row["ids_equal_from_the_start"]) == (1, 2, [2, 1])
    assert (row["texts_equal"], row["texts_compared"]) == (1, 1)


def test_stages_join_client_proxy_and_workers() -> None:
    results = made((10, 5))
    results.proxied = {"unloaded-0-shm": {"transfer_id": "t", "started_s": 10.001}}
    results.moments = {"t": {"P offered": 10.002, "D landed": 10.007}}
    (table,) = figures(results)["stages"]
    assert (table["route"], table["length"]) == ("shm", 1024)
    assert [row["median"] for row in table["rows"]][:2] == [1.0, 1.0]


def test_tables_of_nothing_are_left_out_and_reasons_are_told() -> None:
    console = Console(width=200, record=True)
    results = Results(skipped={"nccl": "NCCL takes no two ranks on one GPU"}, notes=["interrupted"])
    show(figures(results), results, console)
    assert console.export_text().splitlines() == [
        "nccl: not measured: NCCL takes no two ranks on one GPU",
        "note: interrupted",
    ]


def test_prompt_tokens_by_source_are_read_from_metrics() -> None:
    text = '# HELP x\nvllm:prompt_tokens_by_source_total{engine="0",source="local_compute",model="m"} 12.0\n'
    assert parse_sources(text) == {"local_compute": 12.0}
