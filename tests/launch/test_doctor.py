"""The doctor's judgement of made-up facts, and the reasons found in logs."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_plan import CPU, FOUR_GPUS, MODEL
from twolane.config import Settings
from twolane.launch.diagnose import diagnose, not_registered
from twolane.launch.doctor import Finding, examine
from twolane.launch.facts import Facts, Gpu, gather
from twolane.launch.plan import make_plan

GIB = 1 << 30
REGISTRY = '"LlamaForCausalLM": ("llama", "LlamaForCausalLM"),'
H200 = tuple(Gpu(index, "NVIDIA H200", 140 * GIB, 139 * GIB) for index in range(4))
NVLINKED = {(a, b): (True, True) for a in range(4) for b in range(a + 1, 4)}


def facts(settings: Settings | None = None, **changes: Any) -> Facts:
    """A machine with four GPUs in order, unless `changes` say otherwise."""
    healthy = Facts(
        plan=make_plan(settings or Settings(), FOUR_GPUS, MODEL),
        versions={"vllm": "0.26.0"},
        driver="570.1",
        gpus=H200,
        links=NVLINKED,
        model_config={"architectures": ["LlamaForCausalLM"]},
        model_bytes=8 * 10**9,
        known_architectures=REGISTRY,
        disk_free_bytes={"/logs": 10**11},
    )
    return replace(healthy, **changes)


def troubles(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.level != "ok"]


def test_a_machine_in_order_has_no_trouble() -> None:
    assert troubles(examine(facts())) == []
    assert troubles(examine(facts(plan=make_plan(Settings(), CPU, MODEL), gpus=(), links={}, driver=""))) == []


BUSY = (replace(H200[0], free_bytes=20 * GIB, holders=("4711 (python)",)), *H200[1:])


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"versions": {}}, "error", "run `make up`"),
        ({"versions": {"vllm": "0.22.1"}}, "error", "0.22.1 is older than the connector knows"),
        ({"versions": {"vllm": "0.33.0"}}, "warning", "0.33.0 is newer"),
        ({"model_config": None}, "error", "set MODEL to a model's folder"),
        ({"model_config": {"architectures": ["NewForCausalLM"]}}, "error", "NewForCausalLM is not in this vLLM"),
        ({"gpus": BUSY}, "error", "GPU 0: 20.0 of 140.0 GiB free; in use by process 4711 (python)"),
        ({"gpus": BUSY}, "error", "--gpu-memory-utilization 0.12"),
        ({"model_bytes": 200 * 10**9}, "error", "PREFILL_GPU=0+1"),
        ({"links": {}}, "warning", "0 and 1 have no peer access"),
        ({"ports": ("port 1 (x) is taken by process 2 (y): end that",)}, "error", "taken by process 2 (y) end that"),
        ({"outgoing_ports": range(20_000, 21_000)}, "warning", "ip_local_reserved_ports=20003,20005"),
        ({"outgoing_ports": range(21_000, 22_000)}, "warning", "prefill's KV port 21001: any program may have it"),
        ({"disk_free_bytes": {"/logs": 5}}, "error", "make room"),
        ({"shm_free_bytes": 64 * 10**6}, "error", "--shm-size"),
        ({"max_open_files": 1024}, "warning", "ulimit -n"),
        ({"clock_behind_s": 3600.0}, "error", "60 minutes behind"),
        ({"clock_synchronised": False}, "warning", "not synchronised"),
    ],
)
def test_each_trouble_is_found_with_its_remedy(changes: dict[str, Any], level: str, words: str) -> None:
    found = troubles(examine(facts(**changes)))
    assert [finding.level for finding in found if words in f"{finding.name} {finding.text} {finding.remedy}"] == [level]
    assert all(finding.remedy for finding in found)


def test_two_instances_on_one_gpu_are_given_shares_that_fit_and_larger_ones_are_found() -> None:
    shared = Settings(prefill_gpu=((0,),), decode_gpu=((0,),))
    assert troubles(examine(facts(shared))) == []
    larger = replace(shared, vllm_args=("--gpu-memory-utilization", "0.6"))
    assert "0.48" in troubles(examine(facts(larger)))[0].remedy


def test_options_that_differ_between_the_roles_are_found_in_both_spellings() -> None:
    differing = Settings(prefill_args=("--block-size=32",), decode_args=("--block-size", "64"))
    found = troubles(examine(facts(differing)))
    assert [finding.name for finding in found] == ["block-size"]
    assert "prefill: 32, decode: 64" in found[0].text


def test_too_little_memory_for_the_cpu_engine() -> None:
    plan = make_plan(Settings(prefill=2, decode=2), CPU, MODEL)
    found = troubles(examine(facts(plan=plan, gpus=(), memory_free_bytes=4 * GIB)))
    assert [finding.name for finding in found] == ["memory"]


def test_facts_are_gathered_on_this_machine(tmp_path: Path) -> None:
    gathered = gather(make_plan(Settings(), CPU, MODEL), [tmp_path / "not" / "there"], running=True)
    assert gathered.disk_free_bytes[str(tmp_path / "not" / "there")] > 0
    assert gathered.model_config is None
    assert gathered.shm_free_bytes > 0
    assert 1 < len(gathered.outgoing_ports) < 65536


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "ValueError: Free memory on device cuda:0 (20.1/79.1 GiB) on startup is less than desired GPU memory "
            "utilization (0.92, 72.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by others.",
            "--gpu-memory-utilization 0.23",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "from 0.92 to 0.82"),
        ("... the estimated maximum model length is 12288. Try increasing", "TWOLANE_MAX_MODEL_LEN=12288"),
        ("ValueError: No available memory for the cache blocks.", "raise --gpu-memory-utilization"),
        ("api_server.py: error: unrecognized arguments: --nope 3", "vLLM doesn't know --nope 3"),
        ("api_server.py: error: argument --dtype: invalid choice: 'x'", "refuses argument --dtype: invalid choice"),
        ("OSError: [Errno 98] Address already in use", "twolane doctor"),
        ("Transformers does not recognize this architecture", "newer vLLM"),
        ("(EngineCore pid=1) ERROR twolane.errors.ConfigError: this model has", "this model has"),
        ("ValueError: Failed to promote local KV cache specs to one unified type.", "serve it without lanes"),
        ("ValueError: ... failed to convert the KV cache specs to one unified type.", "serve it without lanes"),
        ("all is well", ""),
    ],
)
def test_the_reason_is_found_in_the_log(line: str, words: str) -> None:
    sentence = diagnose(["INFO something", line, "INFO the end"])
    assert words in sentence
    assert bool(sentence) == bool(words)


def test_the_share_to_lower_is_the_one_that_was_used() -> None:
    assert "from 0.8 to 0.70" in diagnose(["non-default args: {'gpu_memory_utilization': 0.8}", "CUDA out of memory"])


def test_an_instance_that_is_not_registered_is_told_with_both_addresses() -> None:
    text = not_registered("127.0.0.1:20003", "127.0.0.1:30001", "twolane", ["127.0.0.1:20005 (ready)"])
    assert "serves at 127.0.0.1:20003 and registers at 127.0.0.1:30001" in text
    assert "has 127.0.0.1:20005 (ready)" in text


class FakeNvml(types.ModuleType):
    """Two GPUs with NVLink, the second in use."""

    NVMLError = RuntimeError
    NVML_P2P_CAPS_INDEX_WRITE, NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 1, 2, 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names, here and below
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:  # noqa: N802
        return types.SimpleNamespace(total=80 * GIB, free=(80 - 10 * handle) * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[types.SimpleNamespace]:  # noqa: N802
        return [types.SimpleNamespace(pid=os.getpid())] * handle

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, what: int) -> int:  # noqa: N802
        return 0 if what in {1, 2} else 1


def test_gpu_facts_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    gathered = gather(make_plan(Settings(), CPU, MODEL), [], running=True)
    assert gathered.driver == "570.1"
    assert [gpu.free_bytes // GIB for gpu in gathered.gpus] == [80, 70]
    assert [len(gpu.holders) for gpu in gathered.gpus] == [0, 1]
    assert gathered.gpus[1].holders[0].startswith(f"{os.getpid()} (")
    assert gathered.links == {(0, 1): (True, True)}
