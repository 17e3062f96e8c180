"""One stack for all engine tests: 1P1D behind the proxy, and a single instance to compare with."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.engine.stack import BLOCK_SIZE, Instance, Stack, make_test_plan, on_port, without_connector
from tests.ports import free_ports

# Below one block, at block edges, at chunk edges, over several chunks.
LENGTHS = [1, 2, 3, 17, 64, 100, 127, 128, 129, 130, 200, 255, 256, 257, 384, 511, 513, 1024, 2000, 4000]
assert len(LENGTHS) == 20
assert BLOCK_SIZE in LENGTHS


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(make_test_plan(tmp_path_factory.mktemp("logs")))
    try:
        single_http, single_kv = free_ports(2)
        single = on_port(made.spec("prefill"), "single", http_port=single_http, kv_port=single_kv)
        made.start(made.spec("prefill"), made.spec("decode"), without_connector(single))
        yield made
    finally:
        made.stop()


@pytest.fixture
def prefill(stack: Stack) -> Instance:
    return stack.instances["prefill"]


@pytest.fixture
def decode(stack: Stack) -> Instance:
    return stack.instances["decode"]


@pytest.fixture(scope="session")
def single_url(stack: Stack) -> str:
    return f"http://{stack.instances['single'].spec.address}"


def make_prompts(seed: int, lengths: list[int] = LENGTHS) -> list[list[int]]:
    """Random token ids: no two prompts share a block, and none is in anybody's prefix cache."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 49000) for _ in range(length)] for length in lengths]
