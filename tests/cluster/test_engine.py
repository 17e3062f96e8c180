"""The real CPU engine over Ray: P on one host, D on the other, the same tokens as from one instance."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Cluster, why_not
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
    assert "decode: stopped" in cluster.twolane("down").stdout
    assert cluster.instances() == []
