"""Tensor parallelism 2 on both sides: each rank of P sends its own heads to the same rank of D."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine import tiny
from tests.engine.conftest import make_prompts
from tests.engine.stack import (
    BLOCK_SIZE,
    Stack,
    complete,
    completion_body,
    difference,
    make_test_plan,
    on_port,
    with_extra,
    without_connector,
)
from tests.ports import free_ports
from twolane.launch.plan import ServiceSpec

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

RANKS = 2
ARGS = ("--tensor-parallel-size", str(RANKS))
LENGTHS = [1, 2, 100, 128, 129, 511, 513, 1000]
NUM_TOKENS = 12
# A block of all ranks together: keys and values, every layer, every KV head, in float32.
BLOCK_BYTES = 2 * 4 * tiny.SHAPE["num_hidden_layers"] * tiny.SHAPE["num_key_value_heads"] * 64 * BLOCK_SIZE


@dataclass
class Compared:
    """A stack of instances with two ranks each, and what a single such instance answers to two sets of prompts."""

    stack: Stack
    prompts: list[list[list[int]]]
    expected: list[list[list[int]]]

    def answers(self, index: int) -> list[list[int]]:
        return answers(self.stack, self.stack.url, self.prompts[index])


def answers(stack: Stack, url: str, prompts: list[list[int]]) -> list[list[int]]:
    """All at once: between two requests vLLM's mp executor parks its workers, and may wake them 5 s late."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda p: complete(url, completion_body(stack, p, NUM_TOKENS)), prompts))


def patient(spec: ServiceSpec) -> ServiceSpec:
    """A rank that waits for the other one spins, four on two cores: the agents beside them starve."""
    return with_extra(spec, peer_timeout_s=60.0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    """The single instance has gone before the pair comes: four workers at once are enough for two cores."""
    source = Path(make_test_plan(tmp_path_factory.mktemp("none")).model.source)
    model = tiny.make("plain", source, tmp_path_factory.mktemp("tiny"))
    made = Stack(make_test_plan(tmp_path_factory.mktemp("tp-logs"), *ARGS, model=str(model)))
    prompts = [make_prompts(seed, LENGTHS) for seed in (21, 22)]
    try:
        http_port, kv_port = free_ports(2)
        single = without_connector(on_port(made.spec("prefill"), "single", http_port=http_port, kv_port=kv_port))
        made.start(single)
        expected = [answers(made, f"http://{single.address}", chosen) for chosen in prompts]
        made.instances.pop("single").child.stop(10.0)
        made.start(patient(made.spec("prefill")), patient(made.spec("decode")))
        yield Compared(made, prompts, expected)
    finally:
        made.stop()


def test_tokens_equal_a_single_instances_and_each_rank_sent_its_part(compared: Compared) -> None:
    prefill, decode = compared.stack.instances["prefill"], compared.stack.instances["decode"]
    computed = decode.tokens_by_source()
    assert compared.answers(0) == compared.expected[0]
    asked, needed = len(LENGTHS), sum(LENGTHS) - len(LENGTHS)
    assert difference(decode.tokens_by_source(), computed) == {
        "local_compute": asked,
        "local_cache_hit": 0,
        "external_kv_transfer": needed,
    }
    sent, received = prefill.metrics(), decode.metrics()
    moved = sum(1 for length in LENGTHS if length > 1)
    blocks = sum(-(-(length - 1) // BLOCK_SIZE) for length in LENGTHS)
    # Every rank counts each transfer once; together they moved each block once. So each moved its own half.
    assert sent["twolane_kv_sent_transfers_total"] == received["twolane_kv_received_transfers_total"] == RANKS * moved
    assert sent["twolane_kv_sent_tokens_total"] == RANKS * needed
    assert sent["twolane_kv_sent_bytes_total"] == received["twolane_kv_received_bytes_total"] == blocks * BLOCK_BYTES


def test_the_comparison_fails_when_the_transferred_bytes_are_zero(compared: Compared) -> None:
    """Last: P is another one afterwards."""
    stack = compared.stack
    stack.instances.pop("prefill").child.stop(10.0)
    stack.start(patient(with_extra(stack.spec("prefill"), fault="zero_kv")))
    got = zip(LENGTHS, compared.answers(1), compared.expected[1], strict=True)
    assert [length for length, answer, want in got if answer != want] == [length for length in LENGTHS if length > 1]
