"""A Ray node that is cut off, for a short time and for a long one, with the stand-in for vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Cluster, why_not
from tests.cluster.test_cluster import WAIT_S, all_ready, rows, up
from tests.launch.test_process import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny").mkdir()
    (folder / "tiny/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    made = Cluster(folder, [1, 1, 1], env={"MODEL": str(folder / "tiny")})
    try:
        yield made
        made.twolane("down")
    finally:
        made.close()


def away(cluster: Cluster) -> tuple[str, int]:
    """An instance that isn't on the first host, and the number of its host."""
    first = cluster.hosts[0].address
    name, node = next((n, r["node"]) for n, r in rows(cluster).items() if n != "proxy" and r["node"] != first)
    return name, cluster.number_of(node)


def test_a_node_that_is_cut_off_is_silent_and_comes_back_as_it_was(cluster: Cluster) -> None:
    up(cluster, "--prefill", "2")
    name, number = away(cluster)
    pid = rows(cluster)[name]["pid"]
    cluster.cut(number)
    wait_for(lambda: rows(cluster)[name]["state"] == "silent", WAIT_S)
    assert f"{name}: no word from node {cluster.hosts[number - 1].address} for " in cluster.twolane("status").stdout
    assert f"{name} " in cluster.twolane("logs").stdout
    cluster.heal(number)
    wait_for(lambda: all_ready(cluster), WAIT_S)
    assert [(row["restarts"], row["pid"]) for row in [rows(cluster)[name]]] == [(0, pid)]
    assert "pass  KV moved" in cluster.twolane("test").stdout
    cluster.cut(number)
    wait_for(lambda: rows(cluster)[name]["state"] == "silent", WAIT_S)
    assert f"{name}: was out of reach: Ray ends it" in cluster.twolane("down", timeout_s=100.0).stdout
    assert len(cluster.instances()) == 2, "it and its reaper know of nothing yet"
    cluster.heal(number)
    wait_for(lambda: cluster.instances() == [], WAIT_S)
    wait_for(lambda: cluster.held() == "", WAIT_S)


def test_a_node_that_is_cut_off_for_long_loses_its_instances_to_another(cluster: Cluster) -> None:
    up(cluster)
    name, number = away(cluster)
    cluster.cut(number)
    wait_for(lambda: rows(cluster)[name]["restarts"] == 1 and all_ready(cluster), WAIT_S)
    assert rows(cluster)[name]["reason"] == "ended lost, with its actor or its node"
    assert cluster.number_of(rows(cluster)[name]["node"]) != number
    assert "pass  KV moved" in cluster.twolane("test").stdout
    assert len(cluster.instances()) == 6, "the old one doesn't know yet"
    cluster.heal(number)
    wait_for(lambda: len(cluster.instances()) == 4, WAIT_S)
    wait_for(lambda: "pass  KV moved" in cluster.twolane("test").stdout, WAIT_S)
    assert rows(cluster)[name]["restarts"] == 1
