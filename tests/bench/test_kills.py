"""What is counted when instances are killed under a load (benchmarks/kills.py)."""

from __future__ import annotations

from benchmarks.kills import failures, figures
from benchmarks.soak.judge import End, Outcome, Reference
from benchmarks.soak.workload import Request

REFERENCE = Reference((1, 2, 3))


def outcome(tokens: list[int], event_s: list[float], end: End = "answered", message: str = "") -> Outcome:
    return Outcome(Request(0, 0, 3, stream=True), end, tokens, message, event_s=event_s)


def test_who_was_cut_who_lost_and_how_the_others_fared() -> None:
    outcomes = [
        outcome([1, 2, 3], [0.1, 0.12, 0.16]),
        outcome([1, 2, 3], [0.3, 0.32, 0.36]),
        outcome([1, 2], [0.2, 9.0], "error", "the decode instance died"),
        outcome([], [], "error", "503: nobody is there"),
        outcome([], [], "lost", "no end after 120 s"),
        outcome([1, 7, 3], [0.1, 0.2, 0.3]),
    ]
    row = figures(outcomes, [REFERENCE] * len(outcomes))
    assert row["ended"] == {
        "right": 2,
        "cut off after the first token": 1,
        "lost before the first token": 2,
        "wrong": 1,
    }
    assert (row["ttft_p50_ms"], row["ttft_p99_ms"]) == (100.0, 300.0)
    assert (row["itl_p50_ms"], row["itl_p99_ms"]) == (20.0, 40.0)
    assert row["messages"] == ["503: nobody is there", "no end after 120 s", "the decode instance died"]
    assert failures({"one P killed": row}) == [
        "one P killed: 2 lost before the first token",
        "one P killed: 1 wrong",
    ]


def test_without_an_answer_there_are_no_times() -> None:
    row = figures([outcome([], [], "lost")], [REFERENCE])
    assert "ttft_p50_ms" not in row
    assert failures({"calm": figures([outcome([1, 2, 3], [0.1])], [REFERENCE])}) == []
