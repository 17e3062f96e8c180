"""Whether a cluster's nodes are fit, and which of them is aimed at. Pure."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.launch.test_plan import CPU, FOUR_GPUS, MODEL, by_name, kv_config
from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.actor import NodeFacts
from twolane.launch.kv import Place
from twolane.launch.nodes import Node, check_nodes, check_room, need_of, target
from twolane.launch.plan import make_instance, make_plan, on_cluster
from twolane.launch.scale import scaled

FACTS = NodeFacts("10.0.0.1", "3.11.7", "0.32.0", "cuda", "0.1.0", has_model=True)
OTHER = msgspec.structs.replace(FACTS, host="10.0.0.2")
GPU = {"CPU": 1.0, "GPU": 1.0}


def nodes(*facts: NodeFacts) -> list[Node]:
    return [Node(f.host, f, {"CPU": 8.0, "GPU": 2.0}) for f in facts]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vllm": "0.31.0"}, r"node 10.0.0.2 has vLLM 0.31.0 \(cuda\), but node 10.0.0.1 has 0.32.0 \(cuda\)"),
        ({"engine": "cpu"}, r"has vLLM 0.32.0 \(cpu\)"),
        ({"engine": "", "vllm": ""}, "node 10.0.0.2 has no vLLM beside TwoLane: install it there"),
        ({"python": "3.12.1"}, "node 10.0.0.2 has Python 3.12, but node 10.0.0.1 has 3.11: install the same on all"),
        ({"twolane": "0.2.0"}, "node 10.0.0.2 has TwoLane 0.2.0"),
        ({"has_model": False}, "node 10.0.0.2 has no /models/m: copy the model there"),
    ],
)
def test_a_node_that_differs_is_named_with_the_remedy(changes: dict[str, object], words: str) -> None:
    check_nodes(nodes(FACTS, OTHER), MODEL)
    with pytest.raises(ConfigError, match=words):
        check_nodes(nodes(FACTS, msgspec.structs.replace(OTHER, **changes)), MODEL)


def test_the_same_python_but_for_the_patch_will_do() -> None:
    check_nodes(nodes(FACTS, msgspec.structs.replace(OTHER, python="3.11.9")), MODEL)


def test_room_is_counted_by_node_and_the_error_says_who_has_how_much() -> None:
    check_room(nodes(FACTS, OTHER), [GPU] * 4)
    with pytest.raises(ConfigError, match=r"5 instances need 5 GPUs .* free are 10.0.0.1: 2, 10.0.0.2: 2: add a node"):
        check_room(nodes(FACTS, OTHER), [GPU] * 5)
    wide = {"CPU": 1.0, "GPU": 3.0}
    with pytest.raises(ConfigError, match="1 instances need 3 GPUs"):
        check_room(nodes(FACTS, OTHER), [wide])


def test_the_node_that_takes_the_most_is_aimed_at() -> None:
    free = {"a": {"CPU": 1.0, "GPU": 4.0}, "b": {"CPU": 9.0, "GPU": 2.0}, "c": {"CPU": 9.0}}
    assert target(free, [GPU] * 2) == "b"
    assert target({}, [GPU]) is None


def test_what_ray_is_asked_for() -> None:
    wide = Settings(ray="auto", vllm_args=("--tensor-parallel-size", "2"))
    assert need_of(make_plan(wide, FOUR_GPUS, MODEL).instances()[0]) == {"CPU": 1.0, "GPU": 2.0}
    assert need_of(make_plan(Settings(ray="auto"), CPU, MODEL).instances()[0]) == {"CPU": 1.0}


def test_a_plan_for_a_cluster_leaves_places_to_ray_and_demands_signatures() -> None:
    plan = make_plan(Settings(ray="auto", prefill=9), FOUR_GPUS, MODEL)
    assert {(spec.host, spec.gpus) for spec in plan.instances()} == {("", ())}
    placed = on_cluster(plan, "10.0.0.1", ("10.0.0.1/32", "10.0.0.2/32"), Path("/run/secret"))
    proxy = placed.services[0].argv
    assert proxy[-8:] == (
        *("--discovery-host", "10.0.0.1", "--registration-secret-file", "/run/secret"),
        *("--allow-network", "10.0.0.1/32", "--allow-network", "10.0.0.2/32"),
    )
    assert placed.discovery_address == "10.0.0.1:30001"
    assert by_name(scaled(placed, FOUR_GPUS, None, 2))["decode-2"].host == ""


def test_an_instance_binds_and_announces_its_nodes_address() -> None:
    place = Place("10.0.0.2", "10.0.0.1", "/run/secret", "/run/logs")
    given = (Settings(ray="auto"), FOUR_GPUS, MODEL)
    spec = make_instance(*given, role="decode", index=1, name="decode-2", gpus=(3,), place=place)
    extra = kv_config(spec)["kv_connector_extra_config"]
    assert (extra["host"], extra["http_address"]) == ("10.0.0.2", "10.0.0.2:20015")
    assert (extra["discovery_address"], extra["registration_secret_file"]) == ("10.0.0.1:30001", "/run/secret")
    assert (spec.address, spec.log, spec.env["CUDA_VISIBLE_DEVICES"]) == (
        "10.0.0.2:20015",
        "/run/logs/decode-2.log",
        "3",
    )


@pytest.mark.parametrize("settings", [Settings(ray="auto", kv="nixl"), Settings(ray="auto", prefill_gpu=((0,),))])
def test_what_ray_can_not_do_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="--ray"):
        make_plan(settings, FOUR_GPUS, MODEL)
