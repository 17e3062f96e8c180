"""`twolane bench --compare` on real engines: one rate, a handful of requests; what it finds is no figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.place import Place
from twolane.bench.sweep import SIDES
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SMALL = ("--input-len", "64", "--output-len", "6", "--num-prompts", "6", "--rates", "2", "--rounds", "1")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    for side in SIDES:
        stop_all(Files(Settings(state_dir=tmp_path / "out/state" / side)))


def test_both_sides_answer_and_the_report_tells_what_moved(place: Place) -> None:
    run = place.twolane("bench", "--compare", *SMALL, "--ttft-ms", "60000", "--itl-ms", "60000", "--out", "out")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((place.folder / "out/report.json").read_text())
    for side in SIDES:
        (point,) = report["points"][side]
        assert (point["requests"], point["good"], point["failed"]) == (6, 6, 0), point
        assert point["spread"]["itl_p99_ms"]["median"] > 0
    assert report["counted"]["lanes"]["moved_tokens"] == 6 * 63  # D computes the last one
    assert report["counted"]["lanes"]["computed_tokens"] == 6
    assert report["counted"]["aggregated"]["failed_legs"] == 0
    assert report["idle"]["lanes"]["ttft_ms"] > 0
    assert "that may be chance" in run.stdout or "no difference" in run.stdout
    assert (place.folder / "out/report.html").read_text().count('class="chart"') == 4
