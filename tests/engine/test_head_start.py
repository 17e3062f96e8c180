"""A head start for KV that never comes: P says that a prompt's end is due long before it is, so D's engine computes
with nothing. None of it may get out."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import (
    Stack,
    all_free,
    complete,
    completion_body,
    make_test_plan,
    wait_for,
    with_extra,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_TOKENS = 8
LENGTHS = [4000, 300, 129, 3000]  # the first takes P seconds


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(make_test_plan(tmp_path_factory.mktemp("hasty-logs")))
    try:
        made.start(with_extra(made.spec("prefill"), fault="false_soon"), made.spec("decode"))
        yield made
    finally:
        made.stop()


@pytest.mark.matrix
def test_what_was_computed_with_nothing_is_taken_back(hasty: Stack) -> None:
    """Prompts that D starts on and gives up; then again, when D must not have kept any of it."""
    prefill, decode = hasty.instances["prefill"], hasty.instances["decode"]
    bodies = [completion_body(hasty, prompt, NUM_TOKENS) for prompt in make_prompts(seed=11, lengths=LENGTHS)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: complete(hasty.url, body), bodies))
        metrics = decode.metrics()
        again = list(pool.map(lambda body: complete(hasty.url, body), bodies))
    expected = [complete(f"http://{prefill.spec.address}", body) for body in bodies]
    assert metrics["twolane_kv_head_starts_total"] >= 1
    assert metrics["twolane_kv_recomputed_tokens_total"] > 0
    assert metrics["vllm:num_preemptions_total"] >= 1, "taken back"
    assert answers == expected
    assert again == expected
    wait_for("all blocks back", lambda: all_free(hasty.instances.values()), 60)
