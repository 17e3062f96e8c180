"""What the engine has to do and what room it has: what a connector's scheduler side knows of it, in every release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twolane.protocol import Load

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput


class LoadMeter:
    """Owns who waits and who runs; reads vLLM's block pool. Engine's thread.

    vLLM tells a connector of every request that comes, that gets its blocks, that loses them again (preemption), and
    that has ended.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks - 1  # vLLM keeps one to point to nothing
        self._block_size = block_size
        self._pool: BlockPool | None = None
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._told_free = self._num_blocks

    def bind(self, pool: BlockPool) -> None:
        self._pool = pool
        self._told_free = pool.get_num_free_blocks()

    def came(self, req_id: str) -> None:
        self._waiting.add(req_id)

    def got_blocks(self, req_id: str) -> None:
        self._waiting.discard(req_id)
        self._running.add(req_id)

    def measure(self, output: SchedulerOutput) -> Load | None:
        """For this step; None if vLLM never showed its block pool."""
        # One that was preempted between two steps may run again in this one.
        preempted = self._running.intersection(output.preempted_req_ids or ()).difference(output.num_scheduled_tokens)
        self._running -= preempted | output.finished_req_ids
        self._waiting |= preempted
        self._waiting -= output.finished_req_ids
        if self._pool is None:
            return None
        self._told_free = self._pool.get_num_free_blocks()
        return Load(self._told_free, self._num_blocks, self._block_size, len(self._running), len(self._waiting))

    def has_news(self) -> bool:
        """Blocks came back after the last step. An engine that has gone idle would never tell."""
        return self._pool is not None and self._pool.get_num_free_blocks() != self._told_free
