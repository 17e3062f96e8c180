from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.engine import without_lane
from twolane.launch.kv import CONNECTORS, check_kv
from twolane.launch.options import option
from twolane.launch.plan import Machine, Plan, ServedModel, ServiceSpec, load_plan, make_plan, save_plan

CPU = Machine(engine="cpu", python="/venv/bin/python", num_cpus=2)
FOUR_GPUS = Machine(engine="cuda", python="/venv/bin/python", num_cpus=64, gpus=(0, 1, 2, 3))
MODEL = ServedModel(source="/models/m", names=("m", "/models/m"), max_len=2048)


def value_after(spec: ServiceSpec, flag: str) -> str:
    return spec.argv[spec.argv.index(flag) + 1]


def kv_config(spec: ServiceSpec) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(value_after(spec, "--kv-transfer-config"))
    return config


def by_name(plan: Plan) -> dict[str, ServiceSpec]:
    return {spec.name: spec for spec in plan.services}


def test_one_prefill_one_decode_without_gpus() -> None:
    plan = make_plan(Settings(), CPU, MODEL)
    assert [spec.name for spec in plan.services] == ["proxy", "prefill", "decode"]
    prefill = by_name(plan)["prefill"]
    assert prefill.argv[:10] == (
        *("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/m"),
        *("--served-model-name", "m", "/models/m", "--host", "127.0.0.1"),
    )
    assert value_after(prefill, "--port") == "20003"
    assert value_after(prefill, "--dtype") == "float32"
    assert value_after(prefill, "--max-model-len") == "2048"
    assert "--enforce-eager" in prefill.argv
    assert prefill.env["OMP_NUM_THREADS"] == "1"
    assert prefill.env["TORCHDYNAMO_DISABLE"] == "1"
    assert prefill.log == "logs/prefill.log"


def test_kv_transfer_config_of_both_roles() -> None:
    services = by_name(make_plan(Settings(), CPU, MODEL))
    assert kv_config(services["prefill"]) == {
        "kv_connector": "TwoLaneConnector",
        "kv_connector_module_path": "twolane.connector",
        "kv_role": "kv_producer",
        "kv_port": 21001,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "host": "127.0.0.1",
            "http_address": "127.0.0.1:20003",
            "name": "prefill",
            "discovery_address": "127.0.0.1:30001",
        },
    }
    assert kv_config(services["decode"])["kv_role"] == "kv_consumer"
    assert kv_config(services["decode"])["kv_port"] == 22001


def test_more_instances_get_ports_and_logs_of_their_own() -> None:
    services = by_name(make_plan(Settings(prefill=2, decode=3), CPU, MODEL))
    assert list(services) == ["proxy", "prefill-1", "prefill-2", "decode-1", "decode-2", "decode-3"]
    assert [services[name].http_port for name in list(services)[1:]] == [20003, 20013, 20005, 20015, 20025]
    assert [services[name].kv_port for name in list(services)[1:]] == [21001, 21011, 22001, 22011, 22021]
    assert services["decode-2"].log == "logs/decode-2.log"


def test_gpus_are_given_out_in_order_around_those_that_are_named() -> None:
    plan = make_plan(Settings(decode_gpu=((0,), (2,)), decode=2, prefill=2), FOUR_GPUS, MODEL)
    services = by_name(plan)
    assert [services[name].gpus for name in ("prefill-1", "prefill-2", "decode-1", "decode-2")] == [
        (1,),
        (3,),
        (0,),
        (2,),
    ]
    assert services["prefill-2"].env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "--enforce-eager" not in services["prefill-1"].argv


def test_p_on_a_gpu_captures_graphs_for_prompts_and_d_does_not() -> None:
    services = by_name(make_plan(Settings(), FOUR_GPUS, MODEL))
    at = services["prefill"].argv.index("--cudagraph-capture-sizes")
    sizes = list(itertools.takewhile(str.isdecimal, services["prefill"].argv[at + 1 :]))
    assert sizes[:3] == ["1", "2", "4"]
    assert sizes[-1] == "2048"
    assert sorted(set(map(int, sizes))) == list(map(int, sizes))
    assert "--cudagraph-capture-sizes" not in services["decode"].argv
    assert "--cudagraph-capture-sizes" not in by_name(make_plan(Settings(), CPU, MODEL))["prefill"].argv
    as_it_is = without_lane(services["prefill"].argv)
    assert not {"--cudagraph-capture-sizes", "--kv-transfer-config", *sizes} & set(as_it_is)
    assert set(as_it_is) < set(services["prefill"].argv)


@pytest.mark.parametrize(
    "word", ["--enforce-eager", "-O3", "-cc.mode=0", "--max-cudagraph-capture-size=64", "--config=x", "--enforce_eager"]
)
def test_whoever_says_how_to_compile_says_what_to_capture(word: str) -> None:
    services = by_name(make_plan(Settings(prefill_args=(word,)), FOUR_GPUS, MODEL))
    assert "--cudagraph-capture-sizes" not in services["prefill"].argv


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        (Settings(prefill_gpu=((0,),)), CPU, "CPU engine"),
        (Settings(prefill_gpu=((7,),)), FOUR_GPUS, "GPU 7 is not there"),
        (Settings(prefill=3, decode=2), FOUR_GPUS, "5 instances need a GPU each"),
        (Settings(decode_http_port=20003), CPU, "too close"),
        (Settings(decode_http_port=20013, prefill=2), CPU, "too close"),
        (Settings(decode_kv_port=21008), CPU, "too close"),
        (Settings(http_proxy_port=30001), CPU, "too close"),
        (Settings(decode_kv_port=65530), CPU, "above 65535"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: Settings, machine: Machine, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(settings, machine, MODEL)


def test_own_arguments_come_last_so_that_they_win() -> None:
    settings = Settings(vllm_args=("--dtype", "bfloat16"), decode_args=("--max-num-seqs", "4"))
    services = by_name(make_plan(settings, CPU, MODEL))
    assert services["prefill"].argv[-2:] == ("--dtype", "bfloat16")
    assert services["decode"].argv[-4:] == ("--dtype", "bfloat16", "--max-num-seqs", "4")


def test_the_proxy_gets_its_options_and_instances_know_their_gpus_names() -> None:
    machine = msgspec.structs.replace(FOUR_GPUS, gpu_uuids={0: "GPU-a", 1: "GPU-b", 2: "GPU-c", 3: "GPU-d"})
    settings = Settings(power_csv=Path("power.csv"), power_every=0.5, prefill_gpu=((0, 1),), decode_gpu=((3, 2),))
    services = by_name(make_plan(settings, machine, MODEL))
    assert services["proxy"].argv[-2:] == ("--power-csv=power.csv", "--power-every=0.5")
    assert services["prefill"].gpu_uuids == ("GPU-a", "GPU-b")
    assert services["decode"].gpu_uuids == ("GPU-d", "GPU-c")


def test_instances_reach_a_proxy_that_listens_everywhere() -> None:
    plan = make_plan(Settings(host="0.0.0.0"), CPU, MODEL)  # noqa: S104 - nothing is bound
    assert value_after(plan.services[0], "--host") == "0.0.0.0"  # noqa: S104
    assert plan.proxy_url == "http://127.0.0.1:10001"
    extra = kv_config(plan.services[1])["kv_connector_extra_config"]
    assert extra["discovery_address"] == "127.0.0.1:30001"


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan(Settings(prefill=2), FOUR_GPUS, MODEL)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_two_gpus_an_instance_are_one_instance_with_tensor_parallelism() -> None:
    plan = make_plan(Settings(prefill_gpu=((2, 3),)), FOUR_GPUS, MODEL)
    services = by_name(plan)
    assert services["decode"].gpus == (0, 1), "as many as the other role's"
    assert services["prefill"].env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert value_after(services["decode"], "--tensor-parallel-size") == "2"
    with pytest.raises(ConfigError, match="equal tensor parallelism"):
        make_plan(Settings(prefill_gpu=((2, 3),), decode_gpu=((1,),)), FOUR_GPUS, MODEL)


def test_vllms_own_connectors_are_configured_and_refused_where_there_are_none(tmp_path: Path) -> None:
    nixl = by_name(make_plan(Settings(kv="nixl"), FOUR_GPUS, MODEL))["decode"]
    assert kv_config(nixl) == {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    assert nixl.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "22001"
    p2p = kv_config(by_name(make_plan(Settings(kv="p2pnccl"), FOUR_GPUS, MODEL))["prefill"])
    assert (p2p["kv_connector"], p2p["kv_port"]) == ("P2pNcclConnector", "21001")
    assert p2p["kv_connector_extra_config"]["proxy_port"] == "30001"
    (tmp_path / CONNECTORS / "nixl").mkdir(parents=True)
    check_kv("nixl", "cuda", tmp_path)
    check_kv("twolane", "cpu", None)
    with pytest.raises(ConfigError, match=r"removed it after 0\.23"):
        check_kv("p2pnccl", "cuda", tmp_path)
    with pytest.raises(ConfigError, match="CPU engine"):
        check_kv("nixl", "cpu", tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prefill_args": ("--tensor-parallel-size", "2")}, "equal tensor parallelism, but it is prefill 2, decode 1"),
        ({"decode_args": ("-tp=2",)}, "equal tensor parallelism, but it is prefill 1, decode 2"),
        ({"vllm_args": ("--pipeline-parallel-size=2",)}, "prefill: the lanes do no pipeline parallelism"),
        ({"decode_args": ("--speculative-config", "{}")}, "decode: the lanes do no speculative decoding"),
    ],
)
def test_options_with_which_no_kv_could_move_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(Settings(**changes), CPU, MODEL)
    make_plan(Settings(**changes, kv="nixl"), CPU, MODEL)


def test_two_ranks_on_the_cpu_are_two_processes() -> None:
    plan = make_plan(Settings(vllm_args=("--tensor-parallel-size", "2")), CPU, MODEL)
    assert [value_after(spec, "--distributed-executor-backend") for spec in plan.instances()] == ["mp", "mp"]


def test_a_transport_that_is_asked_for_reaches_both_connectors() -> None:
    plan = make_plan(Settings(transport="shm"), FOUR_GPUS, MODEL)
    extras = [kv_config(spec)["kv_connector_extra_config"] for spec in plan.services if spec.role != "proxy"]
    assert [extra["transport"] for extra in extras] == ["shm", "shm"]


def test_instances_that_share_gpus_share_their_memory_unless_told_otherwise() -> None:
    four = Settings(prefill_gpu=((0,), (1,)), decode_gpu=((0,), (1,)), prefill=2, decode=2)
    shares = [value_after(spec, "--gpu-memory-utilization") for spec in make_plan(four, FOUR_GPUS, MODEL).instances()]
    assert shares == ["0.45"] * 4
    wide = make_plan(Settings(prefill_gpu=((0, 1),), decode_gpu=((1, 2),)), FOUR_GPUS, MODEL)
    assert [value_after(spec, "--gpu-memory-utilization") for spec in wide.instances()] == ["0.45", "0.45"]
    alone = make_plan(Settings(prefill_gpu=((0,),)), FOUR_GPUS, MODEL)
    assert not any("--gpu-memory-utilization" in spec.argv for spec in alone.instances())
    told = Settings(prefill_gpu=((0,),), decode_gpu=((0,),), vllm_args=("--gpu-memory-utilization", "0.3"))
    instances = make_plan(told, FOUR_GPUS, MODEL).instances()
    assert [option(spec.argv, "--gpu-memory-utilization") for spec in instances] == ["0.3", "0.3"]
