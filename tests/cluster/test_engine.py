"""The real CPU engine over Ray: P on one host, D on the other, the same tokens as from one instance."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.hosts import Cluster, why_not
from tests.cluster.listening import listening
from tests.cluster.test_cluster import rows

WHY_NOT = why_not()
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
PROMPT = "A train leaves the station at nine in the morning and travels north. Another one leaves an hour later. " * 12

KNOCK = """
import sys, zmq
from twolane.protocol import Registration, encode
with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
    stranger.setsockopt(zmq.LINGER, 0)
    refused = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    stranger.connect("tcp://" + sys.argv[1])
    stranger.send(encode(Registration("D", sys.argv[2], sys.argv[2], "twolane", "forged")))
    assert refused.poll(60000), "he was let in"
    stranger.disable_monitor()
    refused.close()
"""
STATS = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())"


def check_listens_at_its_node_only(services: dict[str, dict[str, Any]]) -> None:
    """The instances' HTTP, and P's control and data sockets. What vLLM and torch open for themselves is on loopback."""
    for name, num_ports in (("prefill", 3), ("decode", 1)):
        node = services[name]["node"]
        found = listening(psutil.Process(services[name]["pid"]))
        assert {host for host, _ in found} <= {node, "127.0.0.1"}, found
        assert len({port for host, port in found if host == node}) == num_ports, found


def check_a_stranger_is_refused(cluster: Cluster) -> None:
    """From another host, at the proxy and at nobody else's cost."""
    here, there = (host.address for host in cluster.hosts)
    cluster.hosts[1].run(sys.executable, "-c", KNOCK, f"{here}:26030", f"{there}:9", env=cluster.env)
    stats = json.loads(cluster.hosts[0].run(sys.executable, "-c", STATS, "http://127.0.0.1:26010/stats"))
    assert stats["registration_connections"]["refused"] >= 1
    assert stats["registrations_refused"] == 0
    assert {one["address"].partition(":")[0] for one in stats["instances"]} == {here, there}
    assert len(stats["instances"]) == 2
    assert "pass  KV moved" in cluster.twolane("test").stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, [1, 1], real_engine=True)
    yield cluster
    cluster.twolane("down")
    cluster.close()


def ask(cluster: Cluster, address: str) -> dict[str, Any]:
    body = {"model": "SmolLM2-135M-Instruct", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    url = f"http://{address}/v1/completions"
    said = cluster.hosts[0].run(sys.executable, "-c", ASK, url, json.dumps(body), timeout_s=150)
    answer: dict[str, Any] = json.loads(said)
    return answer


def test_prefill_on_one_host_and_decode_on_the_other_give_the_same_tokens(cluster: Cluster) -> None:
    up = cluster.twolane("up", "--ray", cluster.address, "--max-model-len", "1024", timeout_s=400)
    assert up.returncode == 0, up.stdout + up.stderr
    services = rows(cluster)
    assert {services["prefill"]["node"], services["decode"]["node"]} == {host.address for host in cluster.hosts}
    through_both = ask(cluster, "127.0.0.1:26010")
    alone = ask(cluster, f"{services['prefill']['node']}:{services['prefill']['http_port']}")
    assert through_both["choices"][0]["text"] == alone["choices"][0]["text"]
    assert "pass  KV moved" in cluster.twolane("test").stdout
    check_listens_at_its_node_only(services)
    check_a_stranger_is_refused(cluster)
    assert "decode: stopped" in cluster.twolane("down").stdout
    assert cluster.instances() == []
