"""The sampler's thread, and the recorder that a benchmark uses."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable

import pynvml
import pytest

from tests.power.fake_nvml import UUIDS, FakeGpu, FakeNvml, no_driver
from twolane.power import PowerRecorder
from twolane.power.lanes import Member, Sample
from twolane.power.sampler import Sampler


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


def burning(watts: int, uuid: str = UUIDS[0]) -> FakeGpu:
    """Its counter goes with the real clock."""
    began_s = time.monotonic()
    return FakeGpu(
        uuid, instant_mw=lambda: watts * 1000, energy_mj=lambda: int((time.monotonic() - began_s) * watts * 1000)
    )


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("twolane-power")}


def test_it_samples_until_it_is_stopped_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(burning(100)).install(monkeypatch)
    members = [Member("P", "prefill", [UUIDS[0]], 3)]
    sampler = Sampler(lambda: members, 0.01)
    seen: list[Sample] = []
    with sampler.watched(seen.append):
        sampler.start()
        assert sampler.wait_decided(30)
        wait_for(lambda: len(seen) >= 5)
        latest = sampler.latest()
        assert latest is not None
        assert (latest.gpus[0].lane, latest.prefill_in_flight) == ("prefill", 3)
        sampler.stop()
    assert [a.at_s for a in seen] == sorted({a.at_s for a in seen})
    assert seen[-1].gpus[0].joules > 0
    assert (sampler.latest(), fake.num_open, threads()) == (None, 0, set())


def test_the_pace_is_slow_until_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(FakeGpu(UUIDS[0])).install(monkeypatch)
    sampler = Sampler(every_s=0.01)
    sampler.start()
    try:
        assert sampler.wait_decided(30)
        first = sampler.latest()
        assert first is not None
        assert first.every_s == 1.0
        with sampler.watched():
            with sampler.watched():
                assert sampler.every_s == 0.01
            wait_for(lambda: (latest := sampler.latest()) is not None and latest.every_s == 0.01)
        assert sampler.every_s == 1.0
    finally:
        sampler.stop()


def test_a_gpu_that_is_lost_in_the_middle_goes_and_the_other_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(burning(100), burning(200, UUIDS[1])).install(monkeypatch)
    sampler = Sampler(every_s=0.01)
    with sampler.watched():
        sampler.start()
        wait_for(lambda: (latest := sampler.latest()) is not None and len(latest.gpus) == 2)
        fake.gpus[0].lost = pynvml.NVML_ERROR_GPU_IS_LOST
        wait_for(lambda: (latest := sampler.latest()) is not None and [g.index for g in latest.gpus] == [1])
        fake.gpus[1].lost = pynvml.NVML_ERROR_UNKNOWN
        wait_for(lambda: sampler.latest() is None)
        sampler.stop()


def test_whatever_goes_wrong_ends_the_thread_in_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeNvml(FakeGpu(UUIDS[0])).install(monkeypatch)

    def broken() -> list[Member]:
        raise RuntimeError("no pool")

    sampler = Sampler(broken)
    sampler.start()
    assert not sampler.wait_decided(30)
    sampler.stop()
    assert [record.message for record in caplog.records] == ["power is not measured any more"]


def test_a_stop_before_the_start_is_none() -> None:
    Sampler().stop()
    assert threads() == set()


def test_without_nvml_there_is_one_line_and_no_series(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", no_driver())
    caplog.set_level(logging.INFO)
    with PowerRecorder(every_s=0.01) as recorder:
        pass
    assert recorder.series() is None
    assert [record.message for record in caplog.records] == [
        'power is not measured reason="NVML Shared Library Not Found"'
    ]
    assert threads() == set()


def test_a_recorded_run_has_power_over_time_by_gpu_and_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(burning(100), burning(300, UUIDS[1])).install(monkeypatch)
    with PowerRecorder(every_s=0.01, lanes={UUIDS[0]: "prefill", UUIDS[1]: "decode"}) as recorder:
        began_s = time.monotonic()
        wait_for(lambda: (so_far := recorder.series()) is not None and len(so_far.gpus[UUIDS[1]].at_s) >= 5)
        ended_s = time.monotonic()
    series = recorder.series()
    assert series is not None
    gpu, lane = series.gpus[UUIDS[1]], series.lanes["decode"]
    assert len(gpu.at_s) == len(gpu.watts) == len(gpu.joules) == len(gpu.lanes) == len(lane.at_s)
    assert set(gpu.lanes) == {"decode"}
    assert set(lane.watts) == {300.0}
    assert gpu.at_s[0] <= began_s <= ended_s <= gpu.at_s[-1], "both ends are in it"
    assert 0 < gpu.joules_between(began_s, ended_s) <= gpu.joules[-1] == lane.joules[-1]
    assert set(series.lanes) == {"prefill", "decode"}
    assert not any(math.isnan(watts) for watts in series.gpus[UUIDS[0]].watts)
