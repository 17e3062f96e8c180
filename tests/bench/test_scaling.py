"""The arithmetic of docs/SCALING.md: links, and how what was measured grew."""

from __future__ import annotations

import math

import pytest
from benchmarks.scaling import growth
from benchmarks.scaling_links import (
    CHUNK,
    MEASURED_S,
    MEASURED_TOKENS,
    MODELS,
    QWEN3_4B,
    Model,
    Need,
    link_gb_per_s,
    rates_table,
    rest_table,
)


def test_bytes_a_token_are_those_of_the_shapes() -> None:
    kib = {model.name: model.kv_bytes_a_token / 1024 for model in MODELS}
    assert kib["Qwen3-4B"] == 144
    assert kib["Llama-3.1-8B"] == 128
    assert kib["Llama-3.1-70B"] == 2 * kib["Llama-3.1-70B, KV in 8 bits"] == 320


def test_the_measured_prefill_is_what_the_formula_gives_there() -> None:
    need = Need(QWEN3_4B, MEASURED_TOKENS)
    assert need.prefill_s == pytest.approx(MEASURED_S)
    assert need.hiding_gb_per_s == pytest.approx(144 * 1024 * 8192 / 0.145 / 1e9)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_link_that_carries_the_rate_leaves_one_layer_of_the_last_chunk(model: Model) -> None:
    for num_tokens in (1024, 8192, 131_072):
        need = Need(model, num_tokens)
        enough = need.hiding_gb_per_s * 1.05
        layer_bytes = model.kv_bytes_a_token * min(num_tokens, CHUNK) / model.layers
        assert need.rest_s(enough) == pytest.approx(layer_bytes / enough / 1e9)
        half = need.hiding_gb_per_s / 2
        assert need.rest_s(half) == pytest.approx(need.prefill_s, rel=0.05), "as long again as the prefill"


def test_a_longer_prompt_makes_kv_more_slowly() -> None:
    rates = [Need(QWEN3_4B, num_tokens).hiding_gb_per_s for num_tokens in (1024, 8192, 32_768, 131_072)]
    assert rates == sorted(rates, reverse=True)


def test_the_tables_have_a_row_for_each() -> None:
    assert link_gb_per_s(100, 0.8) == 10
    assert len(rates_table()) == 2 + len(MODELS)
    assert len(rest_table(0.8)) == 2 + 4 * len(MODELS)


def test_growth_is_a_power_of_the_number_of_streams() -> None:
    idle = {"instances": 2, "cpu_percent": 1.0, "rss_mb": 60.0}
    points = [
        {"instances": 2, "streams": streams, "cpu_percent": 1.0 + streams**2 / 1e6, "rss_mb": 60.0 + streams / 50}
        for streams in (100, 1000)
    ]
    (step,) = growth({"idle": [idle], "points": points})
    assert (step["from"], step["to"]) == (100, 1000)
    assert step["cpu_percent"] == pytest.approx(2.0)
    assert step["rss_mb"] == pytest.approx(1.0)
    less = [points[0], points[1] | {"cpu_percent": 0.9}]
    assert math.isnan(growth({"idle": [idle], "points": less})[0]["cpu_percent"]), "below the idle proxy: no figure"
