"""What reports tell of power, from a series as `twolane.power` records it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.test_compare_html import Reader
from tests.bench.test_journal import ABOUT, begin, measure
from twolane.bench import power
from twolane.bench.document import document
from twolane.bench.html import page, power_page
from twolane.bench.journal import Journal
from twolane.bench.sweep import SIDES, Step
from twolane.config import Settings
from twolane.launch.benchmark import power_of
from twolane.launch.plan import Machine, ServedModel, make_plan
from twolane.power.series import Point, PowerSeries, make_series

UUIDS = ("GPU-a", "GPU-b")
LANES = {0: "prefill", 1: "decode"}


def series(watts: tuple[float, ...] = (100.0, 300.0)) -> PowerSeries:
    """From 10 s to 20 s, ten samples a second, steady."""
    points = [
        Point(1e9 + tenth / 10, 10 + tenth / 10, UUIDS[index], index, "other", drawn, drawn * tenth / 10, 0, 0)
        for tenth in range(101)
        for index, drawn in enumerate(watts)
    ]
    return make_series(points, 0.1, 0.1)


def test_each_lane_has_its_joules_and_watts_of_the_load_alone() -> None:
    found = power.drawn(series(), LANES, 12.0, 17.0)
    assert found is not None
    assert (found.seconds, found.joules("prefill"), found.joules("decode"), found.joules()) == (
        5.0,
        500.0,
        1500.0,
        2000.0,
    )
    assert (found.gpus[0].at_s[0], found.gpus[0].at_s[-1]) == (0.0, 5.0)
    at_s, lanes = power.over_time(found)
    assert len(at_s) == len(lanes["decode"]) == power.BINS
    assert {watts for watts in lanes["decode"] if watts is not None} == {300.0}


def test_gpus_of_one_lane_add_up_and_strangers_stay_out() -> None:
    both = power.drawn(series(), {0: "aggregated", 1: "aggregated"}, 12.0, 17.0)
    assert both is not None
    assert {watts for watts in power.over_time(both)[1]["aggregated"] if watts is not None} == {400.0}
    one = power.drawn(series(), {1: "decode"}, 12.0, 17.0)
    assert one is not None
    assert [gpu.index for gpu in one.gpus] == [1]
    assert power.drawn(series(), {}, 12.0, 17.0) is None
    assert power.drawn(None, LANES, 12.0, 17.0) is None


def test_joules_a_token_are_of_all_gpus_for_comparison_and_of_each_lane() -> None:
    found = power.drawn(series(), LANES, 12.0, 17.0)
    assert found is not None
    assert power.per_token(found, 1000, 100) == {
        "joules_per_generated_token": 20.0,
        "prefill_joules_per_prompt_token": 0.5,
        "decode_joules_per_generated_token": 15.0,
    }
    assert power.per_token(found, 0, 0) == {}


@pytest.mark.parametrize(
    ("settings", "plain", "lanes"),
    [
        (Settings(prefill_gpu=((0,),), decode_gpu=((1,),)), False, {0: "prefill", 1: "decode"}),
        (Settings(prefill_gpu=((0,),), decode_gpu=((0,),)), False, {0: "both"}),
        (Settings(prefill_gpu=((0,),), decode_gpu=((1,),)), True, {0: "aggregated", 1: "aggregated"}),
    ],
)
def test_a_gpu_works_for_the_lane_of_its_instances(settings: Settings, plain: bool, lanes: dict[int, str]) -> None:
    machine = Machine(engine="cuda", python="python", num_cpus=8, gpus=(0, 1))
    assert power.lanes_by_gpu(make_plan(settings, machine, ServedModel("/m", ("m",))).instances(), plain) == lanes


def compared(folder: Path) -> Journal:
    journal = begin(folder)
    for side in SIDES:
        lanes = LANES if side == "lanes" else dict.fromkeys(LANES, "aggregated")
        measure(journal, Step(side, 0, 1.0), drawn=power.drawn(series(), lanes, 12.0, 17.0))
    journal.close()
    return journal


def test_a_comparison_shows_power_by_lane_and_energy(tmp_path: Path) -> None:
    report = document(compared(tmp_path).measured)
    assert report["power"]["rate"] == 1.0
    assert set(report["power"]["over_time"]) == set(SIDES)
    (point,) = report["power"]["energy"]["lanes"]
    assert point["spread"]["prefill_joules_per_prompt_token"]["median"] == round(500 / (3 * 256), 5)
    text = page(report)
    reader = Reader()
    reader.feed(text)
    assert reader.closed()
    assert reader.tables == 4 + 2 + 1 + 1 + 1  # also a chart of power each, and energy
    assert "prefill lane, J a prompt token" in text


def test_without_nvml_there_is_no_word_of_power(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    measure(journal, Step("lanes", 0, 1.0))
    journal.close()
    report = document(journal.measured)
    assert report["power"] is None
    assert "Energy" not in page(report)


def test_plain_bench_has_a_page_of_power_where_gpus_tell() -> None:
    counts = {"total_input_tokens": 1000, "total_output_tokens": 100}
    found = power_of(series(), {UUIDS[0]: "prefill", UUIDS[1]: "decode"}, counts, (12.0, 17.0))
    assert found is not None
    assert found["joules"] == {"prefill": 500.0, "decode": 1500.0}
    assert found["joules_per_token"]["decode_joules_per_generated_token"] == 15.0
    text = power_page({**ABOUT, "model": "m", "url": "http://x", "power": found})
    reader = Reader()
    reader.feed(text)
    assert reader.closed()
    assert reader.fetched == ["data:,"]
    assert power_of(series(), {}, counts, (12.0, 17.0)) is None
    assert power_of(None, {}, counts, (12.0, 17.0)) is None
