"""The failover table, row by row."""

from __future__ import annotations

import pytest

from twolane.errors import UpstreamError
from twolane.proxy.legs import LegState, Verdict, judge
from twolane.proxy.relay import EventCutter

OPEN = LegState()
HEAD = LegState(status=200)
DONE = LegState(status=200, ended=True)
REJECTED = LegState(status=400, ended=True)
REJECTING = LegState(status=400)
BROKEN = LegState(error=UpstreamError("gone"))
BEGUN = LegState(status=200, begun=True)
CUT = LegState(status=200, begun=True, error=UpstreamError("gone"))


@pytest.mark.parametrize(
    ("prefill", "decode", "verdict"),
    [
        (OPEN, OPEN, Verdict.WAIT),
        (OPEN, HEAD, Verdict.WAIT),
        (DONE, OPEN, Verdict.WAIT),
        (DONE, HEAD, Verdict.WAIT),
        (None, OPEN, Verdict.WAIT),
        (REJECTING, OPEN, Verdict.WAIT),
        (REJECTED, OPEN, Verdict.ANSWER_PREFILL),
        (REJECTED, HEAD, Verdict.ANSWER_PREFILL),
        (BROKEN, OPEN, Verdict.RETRY_PREFILL),
        (BROKEN, HEAD, Verdict.RETRY_PREFILL),
        (OPEN, BROKEN, Verdict.RETRY_DECODE),
        (DONE, BROKEN, Verdict.RETRY_DECODE),
        (BROKEN, BROKEN, Verdict.RETRY_DECODE),
        (None, BROKEN, Verdict.RETRY_DECODE),
        (None, BEGUN, Verdict.RELAY),
        (OPEN, BEGUN, Verdict.RELAY),
        (REJECTED, BEGUN, Verdict.RELAY),
        (BROKEN, BEGUN, Verdict.RELAY),
        (DONE, CUT, Verdict.RELAY),
    ],
)
def test_verdict(prefill: LegState | None, decode: LegState, verdict: Verdict) -> None:
    assert judge(prefill, decode) is verdict


@pytest.mark.parametrize(
    ("pieces", "passed", "rest"),
    [
        ([b"data: 1\n\n"], [b"data: 1\n\n"], b""),
        ([b"data: 1\n\nda", b"ta: 2\n\n"], [b"data: 1\n\n", b"data: 2\n\n"], b""),
        ([b"data: 1\n", b"\n"], [b"", b"data: 1\n\n"], b""),
        ([b"data: 1\r\n\r\nx"], [b"data: 1\r\n\r\n"], b"x"),
        ([b"x"], [b""], b"x"),
    ],
)
def test_only_whole_events_pass(pieces: list[bytes], passed: list[bytes], rest: bytes) -> None:
    cutter = EventCutter()
    assert [cutter.whole(piece) for piece in pieces] == passed
    assert cutter.rest() == rest


def test_event_without_end_is_not_held_for_ever() -> None:
    cutter = EventCutter()
    total = sum(len(cutter.whole(b"x" * 100_000)) for _ in range(20))
    assert total > 0
