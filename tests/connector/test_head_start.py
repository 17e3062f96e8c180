"""D's head start: what vLLM hears and when, and the agents over real sockets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.connector.agents import SETTINGS, Decode, Prefill, wait_for
from twolane.connector import decode_agent
from twolane.connector.head_start import HeadStarts
from twolane.connector.plan import Advance, StepPlan
from twolane.connector.transport.pace import Pace


def forecast_s(pace: Pace) -> float | None:
    return None if pace.forecast is None else pace.forecast.at_s


def test_a_pace_is_a_straight_line_through_its_pass() -> None:
    pace = Pace()
    pace.mark(0, 0.25, 10.0)
    assert forecast_s(pace) is None
    pace.mark(0, 0.5, 10.1)
    assert forecast_s(pace) == pytest.approx(10.3)
    pace.mark(0, 0.75, 10.4)
    assert forecast_s(pace) == pytest.approx(10.6)
    pace.mark(1, 0.25, 10.5)
    assert forecast_s(pace) is None, "the next pass has only begun"


@dataclass
class Heard:
    """A scheduler's half, as vLLM drives it."""

    starts: HeadStarts
    waiting: set[str] = field(default_factory=set)

    def step(self, *received: str, due: str = "") -> set[str]:
        heard = self.starts.commit(Counter([due] if due else []), set(received), self.waiting)
        self.waiting -= set(received)
        return heard


def test_without_a_head_start_what_is_received_is_heard() -> None:
    scheduler = Heard(HeadStarts(1), {"a"})
    assert scheduler.step("a") == {"a"}


def test_a_request_is_heard_once_though_it_is_received_later() -> None:
    scheduler = Heard(HeadStarts(1), {"a"})
    assert scheduler.step(due="a") == {"a"}
    assert scheduler.starts.started(["a", "b"]) == ["a"]
    assert scheduler.step("a") == set()
    assert scheduler.starts.started(["a"]) == []


def test_all_ranks_must_expect_it() -> None:
    scheduler = Heard(HeadStarts(2), {"a"})
    assert scheduler.step(due="a") == set()
    assert scheduler.step(due="a") == {"a"}


def test_ranks_that_disagree_leave_it_to_the_last_byte() -> None:
    scheduler = Heard(HeadStarts(2), {"a"})
    assert scheduler.step(due="a") == set()
    assert scheduler.step("a") == {"a"}
    assert scheduler.step(due="a") == set(), "its other rank was late; the request runs already"


def test_one_that_has_ended_before_is_no_ones_to_start() -> None:
    scheduler = Heard(HeadStarts(1))
    assert not scheduler.starts.ended("a")
    assert scheduler.step(due="a") == set()
    assert scheduler.step("a") == {"a"}, "vLLM frees its blocks now"


def test_the_blocks_of_one_that_ends_early_are_kept_until_the_workers_say_so() -> None:
    scheduler = Heard(HeadStarts(1), {"a"})
    scheduler.step(due="a")
    assert scheduler.starts.ended("a"), "P may still write to them"
    assert scheduler.step("a") == {"a"}
    assert not scheduler.starts.ended("a")


def wait_due(decode: Decode) -> list[str]:
    due: list[str] = []

    def has_come() -> bool:
        due.extend(decode.agent.take_due())
        return bool(due)

    wait_for(has_come)
    return due


def prefill_slowly(prefill: Prefill, num_tokens: int, until: threading.Event) -> None:
    """A pass whose last layer waits for `until`."""
    advance = [Advance("p", [3, 4, 5], True, num_tokens)]
    prefill.agent.begin_step(StepPlan(advance=advance))
    for layer in ("layer.0", "layer.1"):
        prefill.agent.layer_done(layer)
        time.sleep(0.05)
    until.wait(10)
    prefill.agent.end_step(advance)


def begin_early(prefill: Prefill, decode: Decode, computed: threading.Event) -> tuple[threading.Thread, list[str]]:
    """P computes, its last layer when `computed` is set, and D has heard that it is due."""
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    engine = threading.Thread(target=prefill_slowly, args=(prefill, 11, computed))
    engine.start()
    return engine, wait_due(decode)


def test_a_step_waits_for_the_last_byte_and_no_longer(prefill: Prefill, decode: Decode) -> None:
    computed = threading.Event()
    engine, due = begin_early(prefill, decode, computed)
    assert due == ["d"]
    assert decode.agent.take_due() == [], "each once"
    step = threading.Thread(target=decode.agent.hold_started, args=(due,))
    step.start()
    step.join(0.1)
    assert step.is_alive(), "the step began before the last byte was there"
    computed.set()
    step.join(10)
    assert not step.is_alive()
    engine.join(10)
    assert decode.wait_finished() == set()
    assert decode.agent.take_counts()["kv_head_starts"] == 1
    for name, tensor in decode.kv.items():
        assert (tensor[22] == prefill.kv[name][5]).all()


def test_a_last_byte_that_never_comes_ends_the_wait(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P hangs: D takes P's permission, and the blocks are told as invalid in the same step."""
    monkeypatch.setattr(decode_agent, "LIMIT_S", 0.2)
    never = threading.Event()
    engine, due = begin_early(prefill, decode, never)
    decode.agent.hold_started(due)
    finished = decode.agent.take_finished(patient=False)
    assert finished.req_ids == {"d"}
    assert finished.invalid_block_ids == {20, 21, 22}
    never.set()
    engine.join(10)


def test_a_p_that_is_far_too_late_gives_no_head_start_for_a_while(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_agent, "LIMIT_S", 30.0)
    computed = threading.Event()
    engine, due = begin_early(prefill, decode, computed)
    threading.Timer(0.3, computed.set).start()
    decode.agent.hold_started(due)
    engine.join(10)
    decode.wait_finished()
    prefill.finish()
    prefill.wait_freed()
    assert decode.agent._side.arrivals._late_until_s[prefill.address] > time.monotonic()


def test_no_forecast_no_head_start(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    prefill.compute([3, 4, 5], 11)
    assert decode.wait_finished() == set()
    assert decode.agent.take_due() == []
    assert SETTINGS.head_start_ms > 0
