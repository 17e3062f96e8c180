"""vLLM's scheduler, which can take back requests that were computed with KV that never came (see head_start.py).

`--scheduler-cls twolane.connector.take_back.make_scheduler` on D; `twolane up` says so. Without it everything works,
and D gives no head start.
"""

from __future__ import annotations

import contextlib
from inspect import signature
from typing import TYPE_CHECKING, Any

from twolane.connector.agent import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput


_TAKEN_UP = ("RUNNING", "WAITING", "PREEMPTED")  # not waiting for KV, not over


class TakesBack:
    """Mixed into vLLM's Scheduler or AsyncScheduler.

    The workers name blocks that hold nothing. Requests that wait for KV are vLLM's own business, and that is enough for
    them. Others among whose blocks one of these is were taken up early, or share blocks with one that was. Those that
    run are preempted, and all others that run with them, which is vLLM's own way to drop the tokens of all steps in
    flight: a head start is given to an idle engine only, so whoever runs came with that request or after it. Those
    that are about to run lose their blocks. All are computed anew, from nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from twolane.connector.connector import TwoLaneConnector  # noqa: PLC0415 - needs vLLM, as the base does

        super().__init__(*args, **kwargs)
        connector = getattr(self, "connector", None)
        if isinstance(connector, TwoLaneConnector) and self._can_drop_tokens():
            connector.allow_head_start()

    def _can_drop_tokens(self: Any) -> bool:
        """Whether this release drops the tokens of a preempted request that are in flight: newer ones in every mode,
        0.26 in async scheduling only, which is its default."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415

        return "drop_stale_output" in signature(self._preempt_request).parameters or isinstance(self, AsyncScheduler)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        output = model_runner_output.kv_connector_output
        if output is not None and output.invalid_block_ids:
            self._take_back(output.invalid_block_ids)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _take_back(self: Any, invalid_block_ids: set[int]) -> None:
        blocks = {
            request.request_id: self._block_ids(request.request_id)
            for request in self.requests.values()
            if request.num_computed_tokens and request.status.name in _TAKEN_UP
        }
        hit = [req_id for req_id, block_ids in blocks.items() if not block_ids.isdisjoint(invalid_block_ids)]
        if not hit:
            return
        logger.warning("KV that was due never came: taken back req_ids=%s", hit)
        # What holds nothing must not be found in the prefix cache, nor what was computed with it.
        self.kv_cache_manager.evict_blocks(set().union(*blocks.values()))
        for request in [self.requests[req_id] for req_id in hit]:
            if request.status.name != "RUNNING":
                self.kv_cache_manager.free(request)
                request.num_computed_tokens = 0
        if any(request.request_id in hit for request in self.running):
            # It preempts first, and fails where other requests wait for KV, since their blocks can't be forgotten.
            with contextlib.suppress(RuntimeError):
                self.reset_prefix_cache(reset_running_requests=True)

    def _block_ids(self: Any, req_id: str) -> set[int]:
        return {block_id for group in self.kv_cache_manager.get_block_ids(req_id) for block_id in group}


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Any:
    """What vLLM takes for the scheduler's class: the one it would have taken, with `TakesBack`."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415 - slow, and the engine has it already
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type("TwoLaneScheduler", (TakesBack, base), {})(vllm_config=vllm_config, **kwargs)
