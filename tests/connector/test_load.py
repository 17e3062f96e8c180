"""Who runs, who waits and what is free, from what vLLM tells a connector in each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twolane.connector.load import LoadMeter
from twolane.protocol import Load


class BlockPool:
    num_free = 99

    def get_num_free_blocks(self) -> int:
        return self.num_free


def step(
    finished: set[str] | None = None, preempted: set[str] | None = None, scheduled: dict[str, int] | None = None
) -> Any:
    return SimpleNamespace(
        finished_req_ids=finished or set(), preempted_req_ids=preempted, num_scheduled_tokens=scheduled or {}
    )


def meter(pool: Any) -> LoadMeter:
    made = LoadMeter(num_blocks=100, block_size=16)
    made.bind(pool)
    return made


def counts(load: Load | None) -> tuple[int, int]:
    assert load is not None
    return load.num_running, load.num_waiting


def test_a_request_waits_until_it_gets_blocks_and_runs_until_it_ends() -> None:
    load = meter(BlockPool())
    assert load.measure(step()) == Load(99, 99, 16, 0, 0)
    load.came("a")
    load.came("b")
    load.got_blocks("a")
    assert counts(load.measure(step())) == (1, 1)
    load.got_blocks("a")  # a second time, when its KV has landed
    load.got_blocks("b")
    assert counts(load.measure(step(preempted={"a"}))) == (1, 1)
    load.got_blocks("a")
    assert counts(load.measure(step(preempted={"a"}, scheduled={"a": 1, "b": 1}))) == (2, 0)
    assert counts(load.measure(step(preempted={"a"}))) == (1, 1)
    load.came("c")
    assert counts(load.measure(step(finished={"b", "c"}))) == (0, 1)  # c's client left while it waited
    assert counts(load.measure(step(finished={"a"}))) == (0, 0)
    assert counts(load.measure(step(finished={"never seen"}))) == (0, 0)


def test_blocks_that_come_back_after_the_last_step_are_news() -> None:
    pool = BlockPool()
    load = meter(pool)
    assert not load.has_news()
    pool.num_free = 80
    assert load.has_news()
    assert load.measure(step()) == Load(80, 99, 16, 0, 0)
    assert not load.has_news()


def test_a_vllm_that_shows_no_pool_tells_nothing() -> None:
    load = LoadMeter(num_blocks=100, block_size=16)
    load.came("a")
    assert load.measure(step()) is None
    assert not load.has_news()
