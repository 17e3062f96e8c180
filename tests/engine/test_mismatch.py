"""P and D whose KV caches don't match: right answers, one error on each side, and /stats says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import Instance, Stack, all_free, complete, completion_body, make_test_plan, wait_for
from twolane.launch.process import last_lines

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

LENGTHS = [100, 200, 300]


def errors(instance: Instance) -> list[str]:
    """What the connector complained about in the instance's log."""
    lines = last_lines(Path(instance.spec.log), 1000)
    ours = ("_agent.py", "_side.py", "_peers.py", "arrivals.py")
    return [line for line in lines if any(name in line for name in ours) and ("ERROR" in line or "WARNING" in line)]


def test_another_dtype_or_block_size_on_d_is_one_error_and_d_computes(tmp_path: Path) -> None:
    stack = Stack(make_test_plan(tmp_path, decode_args=("--dtype", "bfloat16", "--block-size", "64")))
    try:
        stack.start(stack.spec("prefill"), stack.spec("decode"))
        prefill, decode = stack.instances["prefill"], stack.instances["decode"]
        bodies = [completion_body(stack, prompt, 8) for prompt in make_prompts(seed=41, lengths=LENGTHS)]
        computed = decode.tokens_by_source()["local_compute"]
        answers = [complete(stack.url, body) for body in bodies]
        assert decode.tokens_by_source()["local_compute"] - computed == sum(LENGTHS)
        assert answers == [complete(f"http://{decode.spec.address}", body) for body in bodies]
        for instance in (prefill, decode):
            (error,) = errors(instance)
            assert "dtype (KV/model): prefill auto/torch.float32, decode auto/torch.bfloat16" in error
            assert "block size: prefill 128, decode 64" in error
            assert "Start both with the same model and settings." in error
            assert instance.metrics()["twolane_kv_refused_peers_total"] == 1
        wait_for("P's blocks, long before their lease ends", lambda: all_free([prefill, decode]), 2.0)
        problems = {entry["role"]: entry["problem"] for entry in stack.stats()["instances"]}
        assert problems["P"] is None
        assert "block size: prefill 128, decode 64" in problems["D"]
    finally:
        stack.stop()
