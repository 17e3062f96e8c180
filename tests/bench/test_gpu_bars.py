"""The table of all setups beside the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.bars import columns, markdown, rows
from benchmarks.gpu.figures import figures
from benchmarks.gpu.memory import kv_bytes_a_token, memory_of
from benchmarks.gpu.options import parse
from benchmarks.gpu.record import Record, Results
from benchmarks.gpu.setups import parse_setup, plan_of, settings_of, starting_at_once

from twolane.bench.client import Sample
from twolane.errors import ConfigError
from twolane.launch.plan import Machine, ServedModel

GPU = Machine(engine="cuda", python="python", num_cpus=32, gpus=(0, 1))
ALL = ("plain", "cuda_ipc", "nccl", "shm", "nixl", "aggregated")
QWEN3_4B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 2560,
}


def asked(results: Results, part: str, setup: str, ttft_ms: float, gap_ms: float, error: str = "") -> None:
    first_s = 10.0 + ttft_ms / 1e3
    sample = Sample(10.0, [first_s, first_s + gap_ms / 1e3], 2, error=error)
    turn = sum(record.setup == setup and record.part == part for record in results.records)
    results.records.append(Record(part, setup, setup, 8192, turn, f"{part}-{turn}-{setup}", sample))  # type: ignore[arg-type]


def measured() -> Results:
    results = Results(beside={"cuda_ipc": 0, "nccl": 0, "plain": 0})
    for setup, ttft_ms in (("cuda_ipc", 147.0), ("nccl", 153.0), ("plain", 140.0)):
        asked(results, "unloaded", setup, ttft_ms, 4.0)
    for setup, ttft_ms, gap_ms in (("cuda_ipc", 161.0, 5.0), ("nccl", 180.0, 6.0), ("plain", 160.0, 120.0)):
        asked(results, "loaded", setup, ttft_ms, gap_ms)
    return results


def test_each_bar_is_held_against_the_setup_it_is_for() -> None:
    made = {row.what: row for row in rows(figures(measured()), [])}
    assert made["- above one instance's (ms)"].met() == {"cuda_ipc": True, "nccl": False}
    assert made["- p50, times one instance's"].met() == {"cuda_ipc": True}
    assert made["- times an idle decoder's median"].met() == {"cuda_ipc": True}
    assert made["- times an idle decoder's median"].values["plain"] == pytest.approx(30.0)


def test_the_link_is_told_of_the_largest_push_and_what_failed_is_not_hidden() -> None:
    results = measured()
    asked(results, "loaded", "nccl", 1.0, 1.0, error="503: busy")
    link: list[dict[str, Any]] = [
        {"transport": "cuda_ipc", "pushes": [{"GB/s": 100.0}, {"GB/s": 310.0, "running GB/s": 349.0}]},
        {"transport": "nccl@NCCL_P2P_DISABLE=1", "error": "no result within 120 s"},
    ]
    made = {row.what: row for row in rows(figures(results), link)}
    assert made["GB/s of a transfer, whole calls"].values == {"cuda_ipc": 310.0}
    assert made["GB/s of a transfer, while one runs"].met() == {"cuda_ipc": False}
    assert made["requests that failed"].values == {"plain": 0, "cuda_ipc": 0, "nccl": 1}


def test_the_table_has_one_instance_first_and_says_what_was_missed() -> None:
    results = measured()
    table = rows(figures(results), [])
    names = columns(table, results)
    assert names == ["plain", "cuda_ipc", "nccl"]
    lines = markdown(table, names).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    (above,) = [line for line in lines if "above one instance" in line]
    assert "| **+7.0** | +13.0 (missed) | cuda_ipc at most 8; nccl at most 12 |" in above


def test_nothing_measured_makes_an_empty_table() -> None:
    assert rows(figures(Results()), []) == []


def test_a_tokens_kv_follows_from_the_models_shape() -> None:
    assert kv_bytes_a_token(QWEN3_4B, ranks=1) == 144 << 10
    assert kv_bytes_a_token(QWEN3_4B, ranks=2) == 72 << 10


def test_all_instances_get_a_given_kv_memory_and_take_no_turns(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    model = ServedModel(str(tmp_path), ("m",))
    options = parse(["--out", "/tmp/x", "--prefill-gpu", "0", "--decode-gpu", "1", "--together"])  # noqa: S108
    setups = [parse_setup(name) for name in ALL]
    memory = memory_of(setups, options, GPU, model)
    assert memory.kv_bytes == 6 * (8192 + 64 + 64) * (144 << 10)
    assert memory.at_once == 11
    settings = settings_of(setups[1], options, GPU, 1, memory.args())
    plan = plan_of(setups[1], options, settings, GPU, model)
    plan = starting_at_once(plan, options, setups[1], GPU, memory.at_once)
    p, d = plan.instances()
    assert p.argv[p.argv.index("--kv-cache-memory-bytes") + 1] == str(memory.kv_bytes)
    assert float(p.argv[p.argv.index("--gpu-memory-utilization") + 1]) < 0.05
    assert (p.gpus, p.env["CUDA_VISIBLE_DEVICES"]) == ((), "0")
    assert p.env["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
    assert p.env["VLLM_CACHE_ROOT"] != d.env["VLLM_CACHE_ROOT"]


def test_a_model_whose_kv_is_not_told_asks_for_it(tmp_path: Path) -> None:
    options = parse(["--prefill-gpu", "0", "--decode-gpu", "1", "--together"])
    with pytest.raises(ConfigError, match="--kv-gib"):
        memory_of([parse_setup("shm")], options, GPU, ServedModel(str(tmp_path), ("m",)))


def test_what_does_not_fit_on_a_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.memory.gpu_bytes", lambda: {0: 80 << 30, 1: 80 << 30})
    options = parse(["--prefill-gpu", "0", "--decode-gpu", "1", "--together", "--kv-gib", "10"])
    with pytest.raises(ConfigError, match="GPU 1 has 80 GiB; 6 instances"):
        memory_of([parse_setup(name) for name in ALL], options, GPU, ServedModel(str(tmp_path), ("m",)))
