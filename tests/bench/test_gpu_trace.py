"""Where a request's time went, from recorded lines and made-up requests."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu.trace import CHAIN, by_transfer, moments_of, read_traces, spread, stage_rows

from twolane.bench.client import Sample

HERE = Path(__file__).parent
FILES = [HERE / "gpu_trace_prefill.jsonl", HERE / "gpu_trace_decode.jsonl"]
SAMPLE = Sample(100.0, [100.112, 100.115], 2, first_byte_s=100.111)


def rows_of_a() -> dict[str, float]:
    moments = moments_of(SAMPLE, {"started_s": 100.001}, by_transfer(read_traces(FILES))["a"])
    return {row["stage"]: row["median"] for row in stage_rows([moments])}


def test_a_line_that_was_cut_is_left_out() -> None:
    assert "P pushed" not in by_transfer(read_traces(FILES))["b"]
    assert by_transfer(read_traces(FILES))["b"]["P computed"] == 101.12


def test_of_several_ranks_the_last_counts() -> None:
    moments = by_transfer(read_traces(FILES))["a"]
    assert (moments["P offered"], moments["P computed"]) == (100.0051, 100.1004)


def test_the_critical_stages_add_up_to_ttft() -> None:
    rows = rows_of_a()
    assert [stage.end for stage in CHAIN[:-1]] == [stage.start for stage in CHAIN[1:]]
    assert sum(rows[stage.name] for stage in CHAIN) == pytest.approx(112.0, abs=0.05)
    assert rows["all: TTFT"] == pytest.approx(112.0)


def test_what_runs_beside_has_its_own_rows() -> None:
    rows = rows_of_a()
    assert rows["last layer to DONE seen at D"] == pytest.approx(0.6)
    assert rows["announce at P before the last layer"] == pytest.approx(94.4)
    assert rows["first byte to first token (client)"] == pytest.approx(1.0)


def test_requests_without_a_moment_are_left_out_of_its_stages() -> None:
    traced = by_transfer(read_traces(FILES))
    both = [moments_of(SAMPLE, {}, traced["a"]), moments_of(Sample(101.0, [101.2], 1), {}, traced["b"])]
    counts = {row["stage"]: row["n"] for row in stage_rows(both)}
    assert counts["P: the GPU computes to the last layer"] == 2
    assert counts["last layer to last byte"] == 1
    assert counts["client to proxy: HTTP, the body parsed; proxy to P's first step: HTTP, parsing, schedule"] == 2


def test_stages_are_one_where_nobody_noted_the_moment_between() -> None:
    moments = by_transfer(read_traces(FILES))["a"]
    del moments["P computed"]
    rows = stage_rows([moments_of(SAMPLE, {"started_s": 100.001}, moments)])
    critical = [row for row in rows if row["critical"]]
    assert sum(row["median"] for row in critical) == pytest.approx(112.0, abs=0.05)
    assert [row["from"] for row in critical if row["to"] == "P pushed"] == ["P launched"]


def test_spread_is_of_values_that_occurred() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0]) == {"n": 4, "median": 2.5, "q1": 1.0, "q3": 3.0, "p99": 4.0}
