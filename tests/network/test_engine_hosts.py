"""Real engines on two hosts (network namespaces): the tokens are those that D computes alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import Stack, complete, completion_body, difference, make_test_plan
from tests.network.hosts import SUBNET, Host, Network, why_not
from twolane.launch.plan import ServiceSpec

NO_HOSTS = why_not()
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)),
    pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS),
]
LENGTHS = [1, 17, 129, 511, 1024]
NUM_TOKENS = 8


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(2, mtu=65000)
    yield made
    made.close()


def on_host(spec: ServiceSpec, host: Host, proxy_host: Host, secret: Path) -> ServiceSpec:
    """The same service, listening at the host's address, and run there."""
    mine = [arg.replace("127.0.0.1", host.address) for arg in spec.argv]
    if spec.role == "proxy":
        mine += ["--discovery-host", host.address, "--allow-network", SUBNET]
        mine += ["--registration-secret-file", str(secret)]
    else:
        discovery = f'"discovery_address": "{host.address}'
        mine = [arg.replace(discovery, f'"discovery_address": "{proxy_host.address}') for arg in mine]
        key = f'"registration_secret_file": "{secret}", "http_address"'
        mine = [arg.replace('"http_address"', key) for arg in mine]
    env = {**spec.env, "VLLM_HOST_IP": host.address}
    return msgspec.structs.replace(spec, argv=tuple(host.argv(*mine)), host=host.address, env=env)


def spread(stack: Stack, network: Network, secret: Path) -> None:
    """Proxy and P on the first host, D on the second."""
    first, second = network.hosts
    services = tuple(
        on_host(spec, second if spec.role == "decode" else first, first, secret) for spec in stack.plan.services
    )
    port = stack.plan.proxy_address.rpartition(":")[2]
    stack.plan = msgspec.structs.replace(stack.plan, services=services, proxy_address=f"{first.address}:{port}")


def test_tokens_over_two_hosts_equal_those_of_d_alone(network: Network, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("what both hosts know\n")
    secret.chmod(0o600)
    stack = Stack(make_test_plan(tmp_path, "--no-enable-prefix-caching", host=network.hosts[0].address))
    spread(stack, network, secret)
    network.hosts[0].call(lambda: compare(stack))


def compare(stack: Stack) -> None:
    """Asks from the first host."""
    prompts = make_prompts(5, LENGTHS)
    try:
        stack.start(stack.spec("prefill"), stack.spec("decode"))
        decode = stack.instances["decode"]
        before = decode.tokens_by_source()
        answers = [complete(stack.url, completion_body(stack, prompt, NUM_TOKENS)) for prompt in prompts]
        assert difference(decode.tokens_by_source(), before) == {
            "local_compute": len(prompts),
            "local_cache_hit": 0,
            "external_kv_transfer": sum(LENGTHS) - len(prompts),
        }
        alone = [
            complete(f"http://{decode.spec.address}", completion_body(stack, prompt, NUM_TOKENS)) for prompt in prompts
        ]
        assert answers == alone
        assert "transport not used shm" in Path(decode.spec.log).with_name("prefill.log").read_text()
    finally:
        stack.stop()
