"""The connector inside vLLM's scheduler: which requests hand off, and what the workers must do in this step.

Runs on the engine's thread; each side owns its dictionaries and builds one StepPlan a step.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from twolane.addresses import split_address
from twolane.connector.agent import logger
from twolane.connector.head_start import HeadStarts
from twolane.connector.plan import Advance, Drop, Ended, Finish, Offer, Receive, StepPlan
from twolane.protocol import HandoffParams, Role, params_from_request_id

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


def handoff_params(request: Request, role: Role) -> HandoffParams | None:
    """The request's handoff parameters; None if it has none, or if they are unusable (logged: it runs alone).

    They come in the body from TwoLane's proxy, in the request id from a proxy made for P2pNcclConnector.
    """
    raw = request.kv_transfer_params
    try:
        if raw and "transfer_id" in raw:
            params = msgspec.convert(raw, HandoffParams)
        elif (found := params_from_request_id(request.request_id, role)) is not None:
            params = found
        else:
            return None
        split_address(params.remote_address)
    except (msgspec.ValidationError, ValueError) as error:
        logger.warning("kv_transfer_params ignored req_id=%s reason=%r", request.request_id, str(error))
        return None
    return params


def prompt_digest(request: Request) -> bytes:
    """Identifies what the KV of this prompt depends on besides the model: token ids, media, adapter."""
    digest = hashlib.blake2b(array("q", request.prompt_token_ids or ()).tobytes(), digest_size=16)
    for feature in request.mm_features or ():
        digest.update(str(feature.identifier).encode())
    if request.lora_request is not None:
        digest.update(str(request.lora_request.lora_name).encode())
    return digest.digest()


class DecodeScheduler:
    """D's side. A request's transfer is used once: after its first allocation it never waits for KV again."""

    def __init__(self, block_size: int, num_ranks: int = 1) -> None:
        self._block_size = block_size
        self.head_starts = HeadStarts(num_ranks)
        self._fresh: dict[str, HandoffParams] = {}  # seen, no blocks yet
        self._waiting: dict[str, HandoffParams] = {}  # announced, not finished
        self._told: dict[str, str] = {}  # whose end somebody wants to hear of: their transfer ids
        self._plan = StepPlan()

    def on_new_request(self, request: Request) -> None:
        params = handoff_params(request, "D")
        if params is not None and params.do_remote_prefill and request.prompt_token_ids:
            self._fresh[request.request_id] = params
            if params.story:
                self._told[request.request_id] = params.transfer_id

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """All of the prompt but its last token, which D computes itself to get the first output token."""
        if request.request_id not in self._fresh:
            return 0, False
        num_missing = request.num_prompt_tokens - 1 - num_computed_tokens
        return (num_missing, True) if num_missing > 0 else (0, False)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        params = self._fresh.pop(request.request_id, None)
        if params is None:
            return
        if num_external_tokens == 0:
            self._plan.drop.append(Drop(params.transfer_id, params.remote_address, "nothing of it is needed"))
            return
        num_tokens = request.num_prompt_tokens - 1
        first_block = (num_tokens - num_external_tokens) // self._block_size
        end_block = -(-num_tokens // self._block_size)
        (block_ids,) = blocks.get_block_ids()
        self._waiting[request.request_id] = params
        self._plan.receive.append(
            Receive(
                request.request_id,
                params.transfer_id,
                params.remote_address,
                num_tokens,
                first_block,
                block_ids[first_block:end_block],
                prompt_digest(request),
                params.story,
            )
        )

    def request_finished(self, request: Request) -> tuple[bool, None]:
        """vLLM itself keeps the blocks of a request that still waits until the worker reports it as received. Those of
        one with a head start are ours to keep until then."""
        params = self._fresh.pop(request.request_id, None) or self._waiting.pop(request.request_id, None)
        is_written_to = self.head_starts.ended(request.request_id)
        if params is not None and not request.num_output_tokens:
            self._plan.drop.append(Drop(params.transfer_id, params.remote_address, "the request ended"))
        if transfer_id := self._told.pop(request.request_id, None):
            self._plan.ended.append(Ended(transfer_id, time.monotonic()))
        return is_written_to, None

    def on_worker_output(self, output: KVConnectorOutput, due: Counter[str]) -> None:
        """Before vLLM reads it. `due`: how many ranks expect the last byte of each request soon."""
        received = set(output.finished_recving or ())
        output.finished_recving = self.head_starts.commit(due, received, self._waiting) or None
        for req_id in received:
            self._waiting.pop(req_id, None)

    def take_plan(self, scheduler_output: SchedulerOutput) -> StepPlan:
        plan, self._plan = self._plan, StepPlan()
        plan.started = self.head_starts.started([new.req_id for new in scheduler_output.scheduled_new_reqs])
        plan.may_start_early = self.head_starts.is_allowed and not scheduler_output.total_num_scheduled_tokens
        return plan


class PrefillScheduler:
    """P's side. Every request that hands off keeps its blocks until the worker says that nobody reads them."""

    def __init__(self, control_address: str) -> None:
        self._control_address = control_address
        self._offered: dict[
            str, HandoffParams | None
        ] = {}  # what P's answer tells the proxy to hand on to D, if anything
        self._plan = StepPlan()

    def on_new_request(self, request: Request) -> None:
        for_decode = self._mint(request)
        params = for_decode or handoff_params(request, "P")
        if params is not None and (for_decode or params.do_remote_decode):
            self._offered[request.request_id] = for_decode
            self._plan.offer.append(Offer(request.request_id, params.transfer_id, prompt_digest(request), params.story))

    def _mint(self, request: Request) -> HandoffParams | None:
        """For a proxy that speaks as to vLLM's NixlConnector: it asks P for parameters and passes them on to D as they
        are."""
        raw = request.kv_transfer_params
        if not raw or "transfer_id" in raw or raw.get("do_remote_decode") is not True:
            return None
        return HandoffParams(uuid.uuid4().hex, self._control_address, do_remote_prefill=True)

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        if request.request_id not in self._offered:
            return False, None
        for_decode = self._offered.pop(request.request_id)
        computed = request.num_computed_tokens >= request.num_prompt_tokens
        ok = computed and request.status.name in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
        self._plan.finish.append(Finish(request.request_id, ok))
        return True, msgspec.to_builtins(for_decode) if for_decode and ok else None

    def take_plan(self, scheduler_output: SchedulerOutput) -> StepPlan:
        plan, self._plan = self._plan, StepPlan()
        if self._offered:
            plan.preempted = [req_id for req_id in scheduler_output.preempted_req_ids or () if req_id in self._offered]
            plan.advance = self._advances(scheduler_output)
        return plan

    def _advances(self, output: SchedulerOutput) -> list[Advance]:
        scheduled = output.num_scheduled_tokens
        advances = [
            self._advance(new.req_id, new.block_ids, True, new.num_computed_tokens + scheduled[new.req_id])
            for new in output.scheduled_new_reqs
            if new.req_id in self._offered
        ]
        cached = output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            if req_id in self._offered:
                num_valid_tokens = cached.num_computed_tokens[index] + scheduled[req_id]
                replace = req_id in cached.resumed_req_ids
                advances.append(self._advance(req_id, cached.new_block_ids[index], replace, num_valid_tokens))
        return advances

    @staticmethod
    def _advance(req_id: str, block_ids: Any, replace: bool, num_valid_tokens: int) -> Advance:
        return Advance(req_id, list(block_ids[0]) if block_ids else [], replace, num_valid_tokens)
