"""What a comparison would start, and when it says no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twolane.bench.lanes import both_plans, check_length, check_room, merged, short_of, side_plan, side_settings
from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.facts import Facts, Gpu
from twolane.launch.plan import Machine, Plan, ServedModel

GPU = Machine(engine="cuda", python="python", num_cpus=8, gpus=(0, 1, 2, 3))
CPU = Machine(engine="cpu", python="python", num_cpus=8)
MODEL = ServedModel("/m", ("m",), max_len=4096)


def plans(machine: Machine, **changes: Any) -> dict[str, Plan]:
    settings = Settings(**changes)
    return {side: plan for side, (_, plan) in both_plans(settings, (), Path("/x"), machine, MODEL).items()}


def test_plain_instances_take_the_places_of_the_lanes_on_the_same_gpus() -> None:
    made = plans(GPU, prefill=1, decode=2, policy="round_robin")
    gpus = {side: [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.instances()] for side, plan in made.items()}
    assert gpus["aggregated"] == gpus["lanes"] == ["0", "1", "2"]
    assert [spec.name for spec in made["aggregated"].instances()] == ["instance-1", "instance-2", "instance-3"]
    assert {spec.role for spec in made["aggregated"].instances()} == {"decode"}
    assert not any("--kv-transfer-config" in spec.argv for spec in made["aggregated"].services)
    assert all("--kv-transfer-config" in spec.argv for spec in made["lanes"].instances())
    assert all("--policy=round_robin" in plan.services[0].argv for plan in made.values())
    assert all(plan.restart_tries == 0 for plan in made.values())


def test_without_gpus_they_have_as_many_threads() -> None:
    made = plans(CPU, prefill=2, decode=2)
    assert {spec.env["OMP_NUM_THREADS"] for plan in made.values() for spec in plan.instances()} == {"2"}


def test_both_sides_have_ports_of_their_own() -> None:
    made = plans(CPU, prefill=3, decode=2)
    ports = [port for plan in made.values() for spec in plan.services for port in (spec.http_port, spec.kv_port)]
    ports += [plan.discovery_port for plan in made.values()]
    found = [port for port in ports if port is not None]
    assert len(found) == len(set(found)) == 2 * (6 + 5 + 1)


def test_plain_instances_get_options_of_their_own() -> None:
    settings = Settings(prefill_args=("--for-p",), vllm_args=("--for-all",))
    mine = side_settings(settings, Path("/x"), "aggregated", 13000)
    argvs = [spec.argv for spec in side_plan("aggregated", mine, ("--mine", "1"), GPU, MODEL).instances()]
    assert all("--mine" in argv and "--for-all" in argv and "--for-p" not in argv for argv in argvs)


def facts(plan: Plan, free: float) -> Facts:
    gpus = tuple(Gpu(index, "H", 80 << 30, int(free * (80 << 30)), ("77 (python)",)) for index in range(4))
    return Facts(plan, {"vllm": "0.30.0"}, gpus=gpus, memory_free_bytes=16_000_000_000)


def test_sides_live_together_only_where_memory_allows() -> None:
    alone, shared = plans(GPU), plans(GPU, vllm_args=("--gpu-memory-utilization", "0.4"))
    assert short_of(facts(alone["lanes"], 0.99)) == []
    assert [finding.name for finding in short_of(facts(merged(list(alone.values())), 0.99))] == ["GPU memory"] * 2
    assert short_of(facts(merged(list(shared.values())), 0.99)) == []
    on_cpu = plans(CPU)
    assert short_of(facts(on_cpu["lanes"], 0.0)) == []
    assert short_of(facts(merged(list(on_cpu.values())), 0.0)) == []
    many = plans(CPU, prefill=2, decode=2)
    assert [finding.name for finding in short_of(facts(merged(list(many.values())), 0.0))] == ["memory"]


def test_taken_gpus_are_a_reason_to_refuse_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"in use by process 77 \(python\): end what uses it, .*`twolane down` stops"):
        check_room(short_of(facts(plans(GPU)["lanes"], 0.3)))
    check_room([])


def test_prompts_that_do_not_fit_are_refused() -> None:
    plan = plans(CPU)["aggregated"]
    check_length(plan, CPU, MODEL, 4096)
    with pytest.raises(ConfigError, match="4097 tokens, an instance takes 4096"):
        check_length(plan, CPU, MODEL, 4097)
    longer = plans(GPU, max_model_len=100)["aggregated"]
    with pytest.raises(ConfigError, match="an instance takes 100"):
        check_length(longer, GPU, MODEL, 101)
