"""Proof that the KV cache moved and that it is the right one: tokens compared with a single instance's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.conftest import LENGTHS, make_prompts
from tests.engine.stack import (
    BLOCK_SIZE,
    Instance,
    Stack,
    complete,
    completion_body,
    difference,
    make_test_plan,
    with_extra,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(seed=1)


@pytest.fixture(scope="module")
def expected(stack: Stack, single_url: str, prompts: list[list[int]]) -> list[list[int]]:
    """What a single instance answers."""
    return [complete(single_url, completion_body(stack, prompt, NUM_TOKENS)) for prompt in prompts]


def sent_tokens(instance: Instance) -> int:
    return int(instance.metrics()["twolane_kv_sent_tokens_total"])


def timed_transfers(prefill: Instance, decode: Instance) -> dict[str, int]:
    """How many observations each histogram holds."""
    names = {"computed_to_sent": prefill, "computed_to_landed": decode, "first_block": decode, "wait": decode}
    return {name: int(instance.metrics()[f"twolane_kv_{name}_seconds_count"]) for name, instance in names.items()}


@pytest.mark.matrix
def test_tokens_equal_a_single_instances_and_d_computed_one_token_of_each_prompt(
    stack: Stack, prefill: Instance, decode: Instance, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    computed, sent, timed = decode.tokens_by_source(), sent_tokens(prefill), timed_transfers(prefill, decode)
    answers = [complete(stack.url, completion_body(stack, prompt, NUM_TOKENS)) for prompt in prompts]
    assert answers == expected
    assert difference(decode.tokens_by_source(), computed) == {
        "local_compute": len(prompts),
        "local_cache_hit": 0,
        "external_kv_transfer": sum(LENGTHS) - len(prompts),
    }
    assert sent_tokens(prefill) - sent == sum(LENGTHS) - len(prompts)
    num_transfers = sum(length > 1 for length in LENGTHS)
    assert set(difference(timed_transfers(prefill, decode), timed).values()) == {num_transfers}


@pytest.mark.matrix
def test_the_same_prompts_again_are_not_sent_again(
    stack: Stack, prefill: Instance, decode: Instance, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """D has the full blocks in its prefix cache; what it lacks is the rest of the last block."""
    computed, sent = decode.tokens_by_source(), sent_tokens(prefill)
    for _ in range(2):
        answers = [complete(stack.url, completion_body(stack, prompt, NUM_TOKENS)) for prompt in prompts]
        assert answers == expected
    cached = sum((length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in LENGTHS)
    rest = sum(LENGTHS) - len(LENGTHS) - cached
    assert difference(decode.tokens_by_source(), computed) == {
        "local_compute": 2 * len(LENGTHS),
        "local_cache_hit": 2 * cached,
        "external_kv_transfer": 2 * rest,
    }
    assert sent_tokens(prefill) - sent == 2 * rest


@pytest.mark.matrix
def test_sixteen_at_once(stack: Stack, decode: Instance, single_url: str) -> None:
    prompts = make_prompts(seed=2, lengths=LENGTHS[:16])
    bodies = [completion_body(stack, prompt, NUM_TOKENS) for prompt in prompts]
    expected = [complete(single_url, body) for body in bodies]
    computed = decode.tokens_by_source()["local_compute"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: complete(stack.url, body), bodies))
    assert answers == expected
    assert decode.tokens_by_source()["local_compute"] - computed == 16


@pytest.fixture
def zeroing_stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A second pair whose P sends zeros in place of KV. Only P and the proxy are new; D is another instance."""
    made = Stack(make_test_plan(tmp_path_factory.mktemp("zero-logs")))
    try:
        made.start(with_extra(made.spec("prefill"), fault="zero_kv"), made.spec("decode"))
        yield made
    finally:
        made.stop()


def test_the_comparison_fails_when_the_transferred_bytes_are_zero(
    zeroing_stack: Stack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Of every prompt that is long enough to need KV. So the equality above is the KV's doing."""
    answers = [complete(zeroing_stack.url, completion_body(zeroing_stack, prompt, NUM_TOKENS)) for prompt in prompts]
    differing = [length for length, got, want in zip(LENGTHS, answers, expected, strict=True) if got != want]
    assert differing == [length for length in LENGTHS if length > 1]
