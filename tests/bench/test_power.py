"""`python -m benchmarks.power`, with GPUs scripted and without any."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
from benchmarks.power import look, main

from tests.power.fake_nvml import UNSUPPORTED, UUIDS, FakeGpu, FakeNvml, no_driver


def test_how_often_a_counter_changes_is_told_apart_from_how_often_it_is_asked() -> None:
    asked = itertools.count()
    found = look(lambda: next(asked) // 5, 1.0, 0.001)
    assert found["update_ms"]["p50"] >= 4.9, "five looks of a millisecond each, or more"
    constant = look(lambda: 100.0, 0.05, 0.001)
    assert (constant["update_ms"], constant["mean"]) == (None, 100.0)


def test_the_command_tells_what_it_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeNvml(FakeGpu(UUIDS[0], instant_mw=UNSUPPORTED)).install(monkeypatch)
    fake.nvmlSystemGetDriverVersion = lambda: "570.1"  # type: ignore[attr-defined]
    assert main(["--seconds", "0.2", "--no-load"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["driver"] == "570.1"
    idle = found["gpus"][0]["idle"]
    assert idle["instant_watts"] == {"unsupported": "Not Supported"}
    assert idle["mean_watts"]["mean"] == 90.0
    assert idle["sampled"]["joules"] == 0.0, "its counter stands still"
    assert idle["sampled"]["joules_by_integrating_watts"] > 0
    assert fake.num_open == 0


def test_the_command_says_where_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", no_driver())
    assert main([]) == 1
    assert "no NVIDIA GPU here" in capsys.readouterr().err
