"""The soak's judge can say no: each thing that it counts, once as it should be and once as it shouldn't."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks.soak.client import note_body, note_event
from benchmarks.soak.judge import (
    FD_GROWTH,
    RSS_GROWTH_BYTES,
    THREAD_GROWTH,
    End,
    Footprint,
    Outcome,
    Reference,
    Totals,
    certain_tokens,
    growth,
    judge,
)
from benchmarks.soak.workload import Leave, Request

REFERENCE = Reference((11, 12, 13, 14))
REQUEST = Request(number=0, prompt=0, max_tokens=3, stream=True)


@pytest.mark.parametrize(
    ("end", "tokens", "message", "verdict"),
    [
        ("answered", [11, 12, 13], "", "right"),
        ("answered", [11, 12, 99], "", "wrong"),
        ("answered", [11, 12], "", "wrong"),  # too few
        ("answered", [11, 12, 13, 14], "", "wrong"),  # too many
        ("answered", [], "", "wrong"),
        ("left", [], "", "left"),
        ("left", [11], "", "left"),
        ("left", [12], "", "left, wrong"),
        ("error", [], "503: no decode instance", "error"),
        ("error", [11], "in the stream: the decode instance died", "error"),
        ("error", [99], "in the stream: the decode instance died", "wrong"),
        ("error", [], " ", "lost"),  # an error that says nothing isn't a clear one
        ("lost", [11], "the connection was closed", "lost"),
        ("lost", [99], "the connection was closed", "wrong"),
    ],
)
def test_verdicts(end: End, tokens: list[int], message: str, verdict: str) -> None:
    assert judge(Outcome(REQUEST, end, tokens, message), REFERENCE) == verdict


def test_an_outcome_that_nobody_ended_is_lost() -> None:
    assert judge(Outcome(REQUEST), REFERENCE) == "lost"


def test_tokens_are_compared_up_to_the_first_that_rounding_could_change() -> None:
    assert certain_tokens([1, 2, 3], [0.5, 0.5, 0.5]) == (1, 2, 3)
    assert certain_tokens([1, 2, 3], [0.5, 0.0001, 0.5]) == (1,)
    assert certain_tokens([1, 2, 3], [0.0, 0.5, 0.5]) == ()


def footprints(rss_bytes: int = 2 << 30, fds: int = 50, threads: int = 20, segments: int = 1) -> dict[int, Footprint]:
    return {7: Footprint("decode", rss_bytes, fds, threads, segments)}


def test_growth_within_bounds() -> None:
    (grown,) = growth(footprints(), footprints(rss_bytes=(2 << 30) + RSS_GROWTH_BYTES, fds=50 + FD_GROWTH), 1)
    assert grown.within_bounds


@pytest.mark.parametrize(
    "change",
    [{"rss_bytes": 3 << 30}, {"fds": 51 + FD_GROWTH}, {"threads": 21 + THREAD_GROWTH}, {"segments": 3}],
    ids=lambda change: next(iter(change)),
)
def test_growth_out_of_bounds(change: dict[str, int]) -> None:
    (grown,) = growth(footprints(), footprints(**change), 1)
    assert not grown.within_bounds


def test_a_process_that_was_killed_has_no_growth() -> None:
    assert growth(footprints(), {8: Footprint("decode", 1 << 40, 999, 999, 9)}, 1) == []


def test_counters_are_summed_over_restarts() -> None:
    totals = Totals()
    for pid, value in ((1, 5.0), (1, 8.0), (2, 1.0), (2, 4.0)):
        totals.add(pid, {"x": value})
    assert totals.sums == {"x": 12.0}


def ended(*events: str, request: Request = REQUEST) -> Outcome:
    outcome = Outcome(request)
    for event in events:
        if note_event(outcome, event):
            break
    return outcome


CHUNK = '{"choices": [{"token_ids": [11]}]}'


def test_a_stream_is_answered_only_by_its_last_word() -> None:
    assert ended(CHUNK, "[DONE]").end == "answered"
    assert ended(CHUNK).end == "lost"


def test_an_error_in_a_stream_ends_it_with_its_message() -> None:
    outcome = ended(CHUNK, '{"error": {"message": "D died"}}')
    assert (outcome.end, outcome.message, outcome.tokens) == ("error", "in the stream: D died", [11])


def test_what_is_no_event_is_lost() -> None:
    assert ended("{}").end == ended("no JSON").end == "lost"


def test_a_client_leaves_a_stream_after_its_tokens() -> None:
    leaving = replace(REQUEST, leave=Leave("stream", after_tokens=2))
    outcome = ended(CHUNK, CHUNK, CHUNK, request=leaving)
    assert (outcome.end, outcome.tokens) == ("left", [11, 11])


@pytest.mark.parametrize(
    ("status", "text", "end"),
    [
        (200, '{"choices": [{"token_ids": [11, 12]}]}', "answered"),
        (200, "", "lost"),
        (200, '{"choices": []}', "lost"),
        (503, '{"error": {"message": "no instance"}}', "error"),
        (502, "", "lost"),
        (502, '{"error": null}', "lost"),
    ],
)
def test_whole_answers(status: int, text: str, end: str) -> None:
    outcome = Outcome(REQUEST)
    note_body(outcome, status, text)
    assert outcome.end == end
