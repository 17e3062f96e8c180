"""From readings to joules, update intervals, tokens and lanes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.power.fake_nvml import UUIDS
from twolane.power.lanes import Member, Meters, Sample, lane_of
from twolane.power.meter import Joules, UpdateInterval
from twolane.power.nvml import GpuReading

A, B = UUIDS


def reading(at_s: float, watts: float | None = None, counter_j: float | None = None, uuid: str = A) -> GpuReading:
    return GpuReading(uuid, UUIDS.index(uuid), "Fake GPU", at_s, watts, counter_j)


def total(*readings: GpuReading) -> float:
    joules = Joules()
    for each in readings:
        joules.add(each)
    return joules.total_j


def test_joules_are_the_counters_difference() -> None:
    assert total(reading(0, 100, 5_000), reading(1, 300, 5_120), reading(2, 300, 5_130)) == 130


def test_without_a_counter_watts_are_integrated() -> None:
    assert total(reading(0, 100), reading(2, 300), reading(3, 300)) == 2 * 200 + 300


def test_a_counter_that_begins_anew_never_takes_joules_back() -> None:
    assert total(reading(0, 100, 5_000), reading(1, 100, 5_100), reading(2, 100, 7), reading(3, 100, 57)) == 250
    assert total(reading(0, None, 5_000), reading(1, None, 10), reading(2, None, 30)) == 20


def test_a_counter_that_answers_only_sometimes_is_bridged_by_watts() -> None:
    assert total(reading(0, 100, 5_000), reading(1, 100, None), reading(2, 100, 5_300), reading(3, 100, 5_310)) == 210


def test_what_was_taken_in_a_long_silence_is_not_guessed() -> None:
    assert total(reading(0, 100), reading(60, 100), reading(61, 100)) == 100
    assert total(reading(0, 100, 0), reading(60, 100, 6_000)) == 6_000, "but a counter has gone on"


def test_the_update_interval_is_the_median_between_distinct_values() -> None:
    updates = UpdateInterval()
    assert updates.median_s is None
    for step in range(100):  # looked at every 20 ms; the sensor changes every 100 ms
        updates.add(reading(step * 0.02, 100 + step // 5))
    assert updates.median_s == pytest.approx(0.1)


def test_the_update_interval_of_a_constant_is_unknown() -> None:
    updates = UpdateInterval()
    for step in range(100):
        updates.add(reading(step * 0.02, 100))
    assert updates.median_s is None
    updates.add(reading(3, None))
    assert updates.median_s is None


P, D = Member("P", "prefill", [A]), Member("D", "decode", [B])


def test_a_gpu_belongs_to_the_lane_of_its_instances() -> None:
    assert (lane_of(A, [P, D]), lane_of(B, [P, D])) == ("prefill", "decode")
    assert lane_of(A, [P, Member("D", "decode", [A])]) == "both"
    assert lane_of(A, [Member("D", "decode-1", [A]), Member("D", "decode-2", [A])]) == "decode"
    assert lane_of(A, [D, Member("P", "elsewhere", [])]) == "other"


class Run:
    """A sample a second: GPU A at 100 W, B at 300 W."""

    def __init__(self) -> None:
        self.meters = Meters()
        self.at_s = 0.0

    def take(self, *members: Member, uuids: tuple[str, ...] = UUIDS, every_s: float = 1.0) -> Sample:
        watts = {A: 100, B: 300}
        readings = [reading(self.at_s, watts[uuid], watts[uuid] * self.at_s, uuid) for uuid in uuids]
        sample = self.meters.take(readings, members, self.at_s, 1e9 + self.at_s, every_s)
        self.at_s += 1
        return sample


def totals(sample: Sample) -> dict[Any, float]:
    return {lane: each.joules for lane, each in sample.lanes.items()}


def test_joules_go_to_the_lane_that_the_gpu_is_in_at_the_time() -> None:
    run = Run()
    run.take()
    assert totals(run.take()) == {"other": 400}
    assert totals(run.take(P, D)) == {"other": 400, "prefill": 100, "decode": 300}
    sample = run.take(P)
    assert totals(sample) == {"other": 700, "prefill": 200, "decode": 300}
    assert sample.lanes["prefill"].watts == 100
    assert sample.lanes["decode"].watts is None, "no GPU is in it now"
    assert [(gpu.lane, gpu.instances, gpu.joules) for gpu in sample.gpus] == [
        ("prefill", ("prefill",), 300),
        ("other", (), 900),
    ]


def test_a_lost_gpus_joules_stay_with_its_lane() -> None:
    run = Run()
    run.take(P, D)
    run.take(P, D)
    sample = run.take(P, D, uuids=(B,))
    assert totals(sample) == {"prefill": 100, "decode": 600}
    assert [gpu.uuid for gpu in sample.gpus] == [B]
    assert sample.lanes["prefill"].watts is None


def test_the_phases_are_the_requests_in_flight_by_role() -> None:
    sample = Run().take(Member("P", "p", [], 2), Member("D", "d-1", [], 3), Member("D", "d-2", [], 4))
    assert (sample.prefill_in_flight, sample.decode_in_flight) == (2, 7)


def counted(tokens: float | None, name: str = "prefill", gpus: tuple[str, ...] = (A,)) -> Member:
    return Member("P", name, gpus, 0, tokens)


def test_joules_a_token_begin_when_the_tokens_are_known_and_survive_a_restart_of_the_engine() -> None:
    run = Run()
    run.take(counted(None))
    assert run.take(counted(None)).lanes["prefill"].joules_per_token is None
    run.take(counted(1_000))  # what it had done before doesn't count
    sample = run.take(counted(1_050))
    assert sample.lanes["prefill"].tokens == 50
    assert sample.lanes["prefill"].joules_per_token == 200 / 50, "the second of the first count is in it"
    sample = run.take(counted(20))
    assert (sample.lanes["prefill"].tokens, sample.lanes["prefill"].counted_j) == (70, 300)
    assert sample.lanes["prefill"].joules == 400


def test_engines_whose_gpus_are_not_seen_or_shared_have_no_share_in_joules_a_token() -> None:
    run = Run()
    for count in (0, 100):
        run.take(counted(count), counted(count * 7, "far", ("GPU-elsewhere",)), D)
    assert run.take(counted(100), D).lanes["prefill"].tokens == 100
    shared = Run()
    for count in (0, 100):
        sample = shared.take(counted(count), Member("D", "decode", [A], 0, count))
    assert set(sample.lanes) == {"both", "other"}
    assert sample.lanes["both"].joules_per_token is None


def test_one_engine_that_does_not_tell_makes_the_whole_lane_wait() -> None:
    run = Run()
    run.take(counted(0, "p-1", (A,)), counted(0, "p-2", (B,)))
    sample = run.take(counted(100, "p-1", (A,)), counted(None, "p-2", (B,)))
    assert (sample.lanes["prefill"].tokens, sample.lanes["prefill"].counted_j) == (0, 0)
    assert sample.lanes["prefill"].joules == 400


def test_another_pace_is_another_measurement_of_the_update_interval() -> None:
    meters = Meters()

    def take(step: int, every_s: float) -> float | None:
        return meters.take([reading(step * every_s, step, None)], [], step * every_s, 0, every_s).update_s

    assert [take(step, 1.0) for step in range(10)][-1] == 1.0
    assert take(100, 0.1) is None
    assert [take(step, 0.1) for step in range(101, 110)][-1] == pytest.approx(0.1)
