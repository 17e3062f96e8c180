"""Whom the scheduler takes back when KV that was due never came. With vLLM's scheduler itself: tests/engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from twolane.connector.take_back import TakesBack


@dataclass
class Request:
    request_id: str
    state: str
    blocks: set[int]
    num_computed_tokens: int = 16

    @property
    def status(self) -> Any:
        return SimpleNamespace(name=self.state)


@dataclass
class Base:
    """What of vLLM's scheduler is touched."""

    everybody: list[Request]
    freed: list[str] = field(default_factory=list)
    evicted: set[int] = field(default_factory=set)
    preempted: list[str] = field(default_factory=list)
    updated: int = 0

    @property
    def requests(self) -> dict[str, Request]:
        return {one.request_id: one for one in self.everybody}

    @property
    def running(self) -> list[Request]:
        return [one for one in self.everybody if one.state == "RUNNING"]

    @property
    def kv_cache_manager(self) -> Any:
        return SimpleNamespace(
            get_block_ids=lambda req_id: (sorted(self.requests[req_id].blocks),),
            evict_blocks=self.evicted.update,
            free=lambda request: self.freed.append(request.request_id),
        )

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        assert reset_running_requests
        self.preempted += [one.request_id for one in self.running]
        raise RuntimeError("blocks of requests that wait for KV can't be forgotten")

    def update_from_output(self, _scheduler_output: Any, _output: Any) -> None:
        self.updated += 1


class Scheduler(TakesBack, Base):
    def __init__(self, *everybody: Request) -> None:
        Base.__init__(self, list(everybody))


def update(scheduler: Scheduler, *invalid: int) -> None:
    output = SimpleNamespace(kv_connector_output=SimpleNamespace(invalid_block_ids=set(invalid)))
    scheduler.update_from_output(None, output)
    assert scheduler.updated == 1


def test_all_that_run_are_preempted_if_one_of_them_has_such_a_block() -> None:
    scheduler = Scheduler(Request("a", "RUNNING", {1, 2}), Request("b", "RUNNING", {3}))
    update(scheduler, 2)
    assert scheduler.preempted == ["a", "b"]
    assert scheduler.evicted == {1, 2, 3}
    assert not scheduler.freed


def test_one_that_is_about_to_run_loses_its_blocks() -> None:
    about_to_run = Request("a", "WAITING", {1, 2})
    scheduler = Scheduler(about_to_run, Request("b", "RUNNING", {3}))
    update(scheduler, 2)
    assert scheduler.freed == ["a"]
    assert about_to_run.num_computed_tokens == 0
    assert not scheduler.preempted


@pytest.mark.parametrize("state", ["WAITING_FOR_REMOTE_KVS", "FINISHED_ABORTED"])
def test_who_waits_for_kv_or_is_over_is_left_to_vllm(state: str) -> None:
    scheduler = Scheduler(Request("a", state, {1, 2}))
    update(scheduler, 2)
    assert not scheduler.freed
    assert not scheduler.evicted
    assert not scheduler.preempted


def test_one_without_blocks_is_left_alone() -> None:
    scheduler = Scheduler(Request("a", "WAITING", {1}, num_computed_tokens=0))
    update(scheduler, 1)
    assert not scheduler.freed
