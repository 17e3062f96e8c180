"""What the GPUs say, and what is made of their errors."""

from __future__ import annotations

import logging

import pynvml
import pytest

from tests.power.fake_nvml import UNSUPPORTED, UUIDS, FakeGpu, FakeNvml, fails
from twolane.power.nvml import REOPEN_EVERY_S, Driver, GpuReading


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opened(clock: Clock) -> Driver:
    driver = Driver(clock)
    assert driver.open() == ""
    return driver


def answering(driver: Driver) -> list[int]:
    return [reading.index for reading in driver.read()]


def test_each_gpu_tells_power_and_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(FakeGpu(UUIDS[0], energy_mj=lambda: 5_000)).install(monkeypatch)
    driver = opened(Clock())
    assert driver.read() == [GpuReading(UUIDS[0], 0, "Fake GPU", 100.0, 100.0, 5.0)]
    driver.close()
    assert fake.num_open == 0


@pytest.mark.parametrize(
    ("gpu", "watts", "counter_j"),
    [
        (FakeGpu(UUIDS[0], instant_mw=UNSUPPORTED), 90.0, 0.0),
        (FakeGpu(UUIDS[0], instant_mw=fails(pynvml.NVML_ERROR_INVALID_ARGUMENT)), 90.0, 0.0),
        (FakeGpu(UUIDS[0], instant_mw=UNSUPPORTED, mean_mw=UNSUPPORTED), None, 0.0),
        (FakeGpu(UUIDS[0], energy_mj=UNSUPPORTED), 100.0, None),
        (FakeGpu(UUIDS[0], energy_mj=fails(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)), 100.0, None),
    ],
)
def test_what_a_gpu_does_not_support_is_none(
    monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, watts: float | None, counter_j: float | None
) -> None:
    FakeNvml(gpu).install(monkeypatch)
    driver = opened(Clock())
    for _ in range(2):
        assert [(r.watts, r.counter_j) for r in driver.read()] == [(watts, counter_j)]


def test_a_gpu_that_measures_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mute = FakeGpu(UUIDS[0], instant_mw=UNSUPPORTED, mean_mw=UNSUPPORTED, energy_mj=UNSUPPORTED)
    FakeNvml(mute, FakeGpu(UUIDS[1])).install(monkeypatch)
    assert answering(opened(Clock())) == [1]


def test_a_lost_gpu_leaves_the_others_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, clock = FakeNvml(FakeGpu(UUIDS[0]), FakeGpu(UUIDS[1])).install(monkeypatch), Clock()
    driver = opened(clock)
    fake.gpus[0].lost = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(3):  # the second time its handle can't be had either
        assert answering(driver) == [1]
        clock.now_s += REOPEN_EVERY_S
    fake.gpus[0].lost = 0
    driver.read()
    assert answering(driver) == [0, 1]
    assert [record.message for record in caplog.records] == [
        'power of a GPU is not measured gpu=0 reason="GPU is lost"',
    ]


def test_a_driver_that_was_loaded_anew_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeNvml(FakeGpu(UUIDS[0]), FakeGpu(UUIDS[1])).install(monkeypatch), Clock()
    driver = opened(clock)
    fake.reload()
    assert driver.read() == []
    assert answering(driver) == [0, 1]
    fake.num_opened += 1  # handles of before are void, however that came about
    assert answering(driver) == [], "not opened anew at every sample"
    clock.now_s += REOPEN_EVERY_S
    driver.read()
    assert answering(driver) == [0, 1]


def test_without_a_driver_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    FakeNvml().install(monkeypatch)
    caplog.set_level(logging.INFO)
    assert "no NVIDIA GPU" in Driver().open()
    assert not caplog.records


def test_the_real_library_where_there_is_no_driver() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        driver = Driver()
        assert driver.open() != ""
        assert driver.read() == []
        driver.close()
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has a driver")
