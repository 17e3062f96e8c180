"""`twolane up --ray` on two hosts made of network namespaces, with real Ray and the stand-in for vLLM."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Cluster, why_not
from tests.launch.test_process import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.skipif(bool(why_not()), reason=why_not())]
WAIT_S = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny").mkdir()
    (folder / "tiny/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def two_hosts(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder, [2, 2])
    cluster.env["MODEL"] = str(folder / "tiny")
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(two_hosts: Cluster) -> Iterator[Cluster]:
    yield two_hosts
    two_hosts.twolane("down")


def rows(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(cluster.twolane("status", "--json").stdout)["services"]}


def nodes(cluster: Cluster) -> list[str]:
    return [row["node"] for name, row in rows(cluster).items() if name != "proxy"]


def all_ready(cluster: Cluster) -> bool:
    return {row["state"] for row in rows(cluster).values()} == {"ready"}


def up(cluster: Cluster, *words: str) -> None:
    done = cluster.twolane("up", "--ray", cluster.address, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first light" in done.stdout


def test_packed_on_one_node_while_they_fit_else_on_the_other(cluster: Cluster) -> None:
    up(cluster)
    here, there = (host.address for host in cluster.hosts)
    assert len(set(nodes(cluster))) == 1
    assert "prefill | INFO" in cluster.twolane("logs", "prefill").stdout
    done = cluster.twolane("scale", "--prefill", "2", "--decode", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(nodes(cluster)) == [here, here, there, there]
    status = cluster.twolane("status").stdout
    assert "node" in status
    assert there in status
    assert "pass  KV moved" in cluster.twolane("test").stdout
    assert "decode-2: started again" in cluster.twolane("restart", "decode-2").stdout
    back = cluster.twolane("scale", "--prefill", "1", "--decode", "1")
    assert "decode-2: drained, stopped" in back.stdout, back.stdout + back.stderr
    assert "decode: stopped" in cluster.twolane("down").stdout
    assert cluster.instances() == []


def test_what_dies_is_started_again_by_ray_and_given_up_in_the_end(cluster: Cluster) -> None:
    up(cluster, "--restart-tries", "1")
    os.kill(rows(cluster)["decode"]["pid"], signal.SIGKILL)
    wait_for(lambda: rows(cluster)["decode"]["restarts"] == 1 and all_ready(cluster), WAIT_S)
    os.kill(rows(cluster)["decode"]["pid"], signal.SIGKILL)
    wait_for(lambda: rows(cluster)["decode"]["state"] == "given up", WAIT_S)
    assert rows(cluster)["decode"]["reason"] == "ended killed by signal 9"
    assert len([p for p in cluster.instances() if "kv_consumer" in " ".join(p.cmdline())]) == 0
    again = cluster.twolane("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert all_ready(cluster)


def test_instances_of_a_node_that_dies_are_placed_anew(cluster: Cluster) -> None:
    up(cluster, "--prefill", "2", "--decode", "2")
    cluster.hosts[1].kill_all()
    wait_for(lambda: len({*nodes(cluster)}) == 2 and not all_ready(cluster), WAIT_S)
    cluster.start_node(2, num_cpus=2)
    wait_for(lambda: all_ready(cluster) and len(rows(cluster)) == 5, WAIT_S)
    assert "pass  KV moved" in cluster.twolane("test").stdout


def test_a_driver_that_is_killed_leaves_nothing_on_any_node(cluster: Cluster) -> None:
    up(cluster, "--prefill", "2", "--decode", "2")
    assert len(cluster.instances()) == 8  # each with its reaper
    os.kill(json.loads(cluster.twolane("status", "--json").stdout)["supervisor_pid"], signal.SIGKILL)
    wait_for(lambda: cluster.instances() == [], WAIT_S)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--ray", "10.78.0.2:6398"), "no Ray answers there"),
        (("--ray", "here"), "neither `auto` nor host:port"),
        (("--ray", "10.78.0.1:6399", "--prefill", "4"), "5 instances need 5 CPUs of the cluster"),
        (("--ray", "10.78.0.1:6399", "--decode-gpu", "1"), "it is Ray that gives GPUs out"),
    ],
)
def test_what_can_not_be_is_told_beforehand(cluster: Cluster, words: tuple[str, ...], why: str) -> None:
    done = cluster.twolane("up", *words)
    assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    assert cluster.instances() == []
    assert cluster.twolane("status").returncode == 1
