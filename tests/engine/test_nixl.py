"""vLLM's own NixlConnector behind our proxy, on the CPU: UCX moves the KV through shared memory or TCP."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import Stack, complete, completion_body, make_test_plan
from twolane.config import Settings
from twolane.launch.kv import Place, kv_config, kv_env
from twolane.launch.plan import ServiceSpec
from twolane.launch.process import Child

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(280),
    pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None,
        reason="nixl is not installed: pip install --no-deps nixl nixl-cu12 (it needs no GPU)",
    ),
]

LENGTHS = [100, 128, 300, 513, 1000]


def with_nixl(spec: ServiceSpec) -> ServiceSpec:
    """The same instance with vLLM's connector."""
    assert spec.role != "proxy"
    assert spec.kv_port is not None
    config = kv_config(Settings(kv="nixl"), spec.role, spec.name, spec.http_port, spec.kv_port, Place())
    at = spec.argv.index("--kv-transfer-config") + 1
    argv = (*spec.argv[:at], json.dumps(config | {"kv_buffer_device": "cpu"}), *spec.argv[at + 1 :])
    return msgspec.structs.replace(spec, argv=argv, env=spec.env | kv_env("nixl", spec.kv_port))


@pytest.fixture
def nixl_stack(tmp_path: Path) -> Iterator[Stack]:
    """D caches no prefixes, so that it can be asked without P afterwards and computes all itself."""
    stack = Stack(make_test_plan(tmp_path, "--no-enable-prefix-caching"))
    instances = [with_nixl(stack.spec("prefill")), with_nixl(stack.spec("decode"))]
    lists = [word for spec in instances for word in (f"--{spec.role}", f"http://{spec.address}")]
    proxy = stack.spec("proxy")
    try:
        stack.proxy = Child(msgspec.structs.replace(proxy, argv=(*proxy.argv, "--kv", "nixl", *lists)), {})
        stack.start(*instances)
        yield stack
    finally:
        stack.stop()


def test_kv_moves_by_nixl_and_the_tokens_are_the_same(nixl_stack: Stack) -> None:
    decode = nixl_stack.instances["decode"]
    bodies = [completion_body(nixl_stack, prompt, 8) for prompt in make_prompts(seed=51, lengths=LENGTHS)]
    before = decode.tokens_by_source()
    answers = [complete(nixl_stack.url, body) for body in bodies]
    after = decode.tokens_by_source()
    assert after["external_kv_transfer"] - before["external_kv_transfer"] >= sum(LENGTHS) - 2 * len(LENGTHS)
    assert after["local_compute"] - before["local_compute"] <= 2 * len(LENGTHS)
    assert answers == [complete(f"http://{decode.spec.address}", body) for body in bodies]
