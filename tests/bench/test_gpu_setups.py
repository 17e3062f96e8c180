"""What the GPU benchmark would start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.gpu.memory import memory_of
from benchmarks.gpu.options import parse
from benchmarks.gpu.run import starting_time_s
from benchmarks.gpu.setups import parse_setup, plan_of, routes_of, settings_of, why_not

from twolane.errors import ConfigError
from twolane.launch.plan import Machine, Plan, ServedModel

GPU = Machine(engine="cuda", python="python", num_cpus=8, gpus=(0, 1))
MODEL = ServedModel("/m", ("m",))
CPU = Machine(engine="cpu", python="python", num_cpus=2)
SHARED = ["--prefill-gpu", "0", "--decode-gpu", "0"]
APART = ["--prefill-gpu", "0", "--decode-gpu", "1"]


def plan_for(name: str, argv: list[str], machine: Machine = GPU) -> Plan:
    options, setup = parse(["--out", "/tmp/x", *argv]), parse_setup(name)  # noqa: S108 - nothing is written
    settings = settings_of(setup, options, machine, 1, memory_of([setup], options, machine, MODEL).args())
    return plan_of(setup, options, settings, machine, MODEL)


def connector_of(plan: Plan, role: str) -> dict[str, object]:
    argv = next(spec.argv for spec in plan.services if spec.role == role)
    config: dict[str, object] = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    return config


def test_a_transport_is_a_pair_with_that_setting_and_a_trace() -> None:
    plan = plan_for("cuda_ipc@slot_bytes=1024", SHARED)
    extra = connector_of(plan, "prefill")["kv_connector_extra_config"]
    assert isinstance(extra, dict)
    assert (extra["transport"], extra["slot_bytes"]) == ("cuda_ipc", 1024)
    assert extra["trace_file"] == "/tmp/x/traces/cuda_ipc@slot_bytes=1024-prefill"  # noqa: S108
    assert {spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.instances()} == {"0"}
    assert all("--no-enable-prefix-caching" in spec.argv for spec in plan.instances())


def test_auto_leaves_the_choice_to_the_connector() -> None:
    extra = connector_of(plan_for("auto", [*SHARED, "--no-trace"]), "decode")["kv_connector_extra_config"]
    assert isinstance(extra, dict)
    assert not {"transport", "trace_file"} & set(extra)


@pytest.mark.parametrize(("name", "num_instances"), [("plain", 1), ("plain_graphs", 1), ("aggregated", 2)])
def test_instances_without_a_connector_all_decode(name: str, num_instances: int) -> None:
    plan = plan_for(name, APART)
    assert [spec.role for spec in plan.instances()] == ["decode"] * num_instances
    assert not any("--kv-transfer-config" in spec.argv for spec in plan.services)
    captures = ["--cudagraph-capture-sizes" in spec.argv for spec in plan.instances()]
    assert captures == [name == "plain_graphs"] * num_instances


def test_a_pair_is_asked_in_two_ways_and_one_is_the_others_baseline() -> None:
    plan = plan_for("shm", SHARED)
    through, alone = routes_of(parse_setup("shm"), plan)
    assert (through.address, alone.address) == (plan.proxy_address, "127.0.0.1:24043")
    assert (through.baseline, alone.baseline) == (alone.name, "")


@pytest.mark.parametrize(
    ("argv", "setups", "share"),
    [
        (SHARED, ["shm"], 0.35),
        (SHARED, ["shm", "plain"], 0.28),
        (APART, ["shm"], None),
        (APART, ["shm", "plain"], 0.35),
        ([*SHARED, "--memory", "0.2"], ["shm"], 0.2),
    ],
)
def test_instances_share_a_gpus_memory(argv: list[str], setups: list[str], share: float | None) -> None:
    assert memory_of([parse_setup(name) for name in setups], parse(argv), GPU, MODEL).share == share


@pytest.mark.parametrize(
    ("name", "argv", "machine", "reason"),
    [
        ("nccl", SHARED, GPU, "two ranks"),
        ("p2pnccl", APART, GPU, "removed it"),
        ("nixl", [], CPU, "GPU engine"),
        ("cuda_ipc", [], CPU, "needs GPUs"),
        ("nccl", APART, GPU, ""),
        ("shm", [], CPU, ""),
    ],
)
def test_what_can_not_be_done_is_told(name: str, argv: list[str], machine: Machine, reason: str) -> None:
    told = why_not(parse_setup(name), parse(argv), machine, Path("/nonexistent"))
    assert reason in told
    assert bool(reason) == bool(told)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--prefill-gpu", "x"], "GPU numbers"),
        (["--lengths", "1k"], "--lengths 1k"),
        (["--proxy", "127.0.0.1:1"], "go together"),
        (["--prefill-gpu", "0,1"], "one instance's"),
    ],
)
def test_wrong_options_are_told(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(argv)


@pytest.mark.parametrize("name", ["cuda", "nixl@transport=shm"])
def test_unknown_setups_are_told(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_setup(name)


@pytest.mark.parametrize(("time_s", "starting_s"), [(60, 30), (185, 125), (240, 150), (500, 250)])
def test_a_start_may_take_longer_than_half_of_a_short_run_if_there_is_time_to_measure(
    time_s: float, starting_s: float
) -> None:
    assert starting_time_s(time_s) == starting_s
