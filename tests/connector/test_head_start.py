"""D's head start: what vLLM hears and when, and the agents over real sockets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from tests.connector.agents import SETTINGS, Decode, Prefill, wait_for
from twolane.connector import decode_agent
from twolane.connector.head_start import HeadStarts
from twolane.connector.plan import Advance, StepPlan
from twolane.connector.transport import pace
from twolane.connector.transport.cuda.pace_maker import PaceMaker
from twolane.connector.transport.pace import SHORT_S, Forecast, History, Pace


def forecast_s(of: Pace) -> float | None:
    return None if of.forecast is None else of.forecast.at_s


def test_a_pace_is_a_straight_line_through_its_pass() -> None:
    line = Pace()
    line.mark(0, 0.25, 10.0)
    assert forecast_s(line) is None
    line.mark(0, 0.5, 10.1)
    assert forecast_s(line) == pytest.approx(10.3)
    line.mark(0, 0.75, 10.4)
    assert forecast_s(line) == pytest.approx(10.6)
    line.mark(1, 0.25, 10.5)
    assert forecast_s(line) is None, "the next pass has only begun"


def test_a_short_pass_takes_as_long_as_the_latest_of_its_size() -> None:
    history, size = History(), (1000, 1000)
    assert history.expect(size) is None
    for seconds in (0.9, 0.014, 0.015, 0.016, 0.8):  # the first compiled something, the last one had to wait
        history.add(size, seconds)
    assert history.expect(size) == 0.016
    assert history.expect((1020, 1020)) == 0.016, "nearly as many"
    assert history.expect((1000, 4000)) is None, "that attend to a longer prompt"
    assert history.expect((500, 500)) is None
    for _ in range(5):
        history.add(size, SHORT_S)
    assert history.expect(size) is None, "the layers tell that better"


class GpuEvent:
    """A torch.cuda.Event, over when a test says so."""

    def __init__(self) -> None:
        self.is_awaited, self._is_over = threading.Event(), threading.Event()

    def query(self) -> bool:
        return self._is_over.is_set()

    def synchronize(self) -> None:
        self.is_awaited.set()
        self._is_over.wait()

    def happen(self) -> None:
        """Once somebody waits for it."""
        assert self.is_awaited.wait(5.0)
        self._is_over.set()


SIZE = (512, 512)


@pytest.fixture
def pace_maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaceMaker]:
    """To which every pass is a short one."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(pace, "SHORT_S", 60.0)
    made = PaceMaker(torch.device("cuda"), lambda: None)
    yield made
    made.close(1.0)


def launch(pace_maker: PaceMaker, number: int) -> GpuEvent:
    event = GpuEvent()
    pace_maker.began(number, SIZE)
    pace_maker.fenced(event)
    return event


def test_a_pass_of_a_known_size_is_foretold_before_it_is_launched(pace_maker: PaceMaker) -> None:
    first = launch(pace_maker, 0)
    assert not pace_maker.forecasts
    first.happen()
    wait_for(lambda: pace_maker._history.expect(SIZE) is not None)
    pace_maker.began(1, SIZE)
    expected_s = pace_maker._history.expect(SIZE)
    assert expected_s is not None
    assert pace_maker.forecasts == [Forecast(1, pace_maker._begun.at_s + expected_s)]


def test_a_pass_begins_when_the_one_before_is_through(pace_maker: PaceMaker) -> None:
    pace_maker._history.add(SIZE, 30.0)
    event = launch(pace_maker, 0)
    (running,) = pace_maker.forecasts
    pace_maker.began(1, SIZE)
    assert pace_maker.forecasts == [running, Forecast(1, running.at_s + 30.0)]
    pace_maker.began(2, (7, 7))
    assert [forecast.number for forecast in pace_maker.forecasts] == [1], "of the two latest, what is known"
    event.happen()


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


def test_an_idle_step_ends_when_a_forecast_makes_something_due(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_agent, "PATIENCE_S", 60.0)
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    wait_for(lambda: not decode.agent._side.arrivals.is_empty)
    began_s = time.monotonic()
    step = threading.Thread(target=decode.agent.take_finished, kwargs={"patient": True, "may_start_early": True})
    step.start()
    computed = threading.Event()
    engine = threading.Thread(target=prefill_slowly, args=(prefill, 11, computed))
    engine.start()
    step.join(30)
    assert time.monotonic() - began_s < 30, "it waited out its patience"
    assert decode.agent.take_due() == ["d"]
    computed.set()
    engine.join(10)
    assert decode.wait_finished() == set()


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
