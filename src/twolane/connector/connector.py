"""TwoLaneConnector: vLLM's connector API (0.26 to 0.32) on one side, our scheduler and worker sides on the other.

Nothing is decided here. Which hook runs when is told in docs/ARCHITECTURE.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from twolane.addresses import join_address
from twolane.connector.first_text import decode_prompt_ends_only
from twolane.connector.load import LoadMeter
from twolane.connector.metrics import TwoLanePromMetrics, TwoLaneStats
from twolane.connector.plan import StepPlan
from twolane.connector.scheduler import DecodeScheduler, PrefillScheduler
from twolane.connector.settings import parse_settings
from twolane.connector.supported import refuse_unsupported
from twolane.connector.worker import WorkerFacts, WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class TwoLaneMetadata(StepPlan, KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """A StepPlan in the type that vLLM carries from the scheduler to the workers."""


@dataclass
class TwoLaneWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """What the workers tell the scheduler in one step: how many of them expect the last byte of each request soon."""

    due: Counter[str] = field(default_factory=Counter)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> TwoLaneWorkerMetadata:
        assert isinstance(other, TwoLaneWorkerMetadata)
        return TwoLaneWorkerMetadata(self.due + other.due)


def _model_identity(config: VllmConfig) -> str:
    """The same on both sides if they serve the same architecture in the same configuration, wherever it lies."""
    model = config.model_config
    hf_config = model.hf_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        hf_config.pop(key, None)
    digest = hashlib.sha256(repr(sorted(hf_config.items(), key=str)).encode()).hexdigest()[:16]
    names = "/".join(model.hf_config.architectures or ())
    return f"{names} with {model.get_total_num_kv_heads()} KV heads of {model.get_head_size()} (config {digest})"


def _worker_facts(config: VllmConfig, kv_cache_config: KVCacheConfig) -> WorkerFacts:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank  # noqa: PLC0415 - workers only

    transfer = config.kv_transfer_config
    return WorkerFacts(
        is_prefill=transfer.is_kv_producer,
        settings=parse_settings(transfer.kv_connector_extra_config),
        kv_port=transfer.kv_port,
        model=_model_identity(config),
        kv_dtype=f"{config.cache_config.cache_dtype}/{config.model_config.dtype}",
        block_size=config.cache_config.block_size,
        num_blocks=kv_cache_config.num_blocks,
        tp_size=config.parallel_config.tensor_parallel_size,
        rank=get_tensor_model_parallel_rank(),
    )


class TwoLaneConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vLLM is untyped here
    """One instance in the scheduler, one in each worker; each has one of the two parts below."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        refuse_unsupported(vllm_config, kv_cache_config)
        self._scheduler: PrefillScheduler | DecodeScheduler | None = None
        self._worker: WorkerSide | None = None
        transfer = vllm_config.kv_transfer_config
        settings = parse_settings(transfer.kv_connector_extra_config)
        self._head_start_ms = settings.head_start_ms
        self._load = LoadMeter(kv_cache_config.num_blocks, vllm_config.cache_config.block_size)
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerSide(_worker_facts(vllm_config, kv_cache_config))
        elif transfer.is_kv_producer:
            self._scheduler = PrefillScheduler(join_address(settings.host, transfer.kv_port))
        else:
            num_ranks = vllm_config.parallel_config.tensor_parallel_size
            self._scheduler = DecodeScheduler(vllm_config.cache_config.block_size, num_ranks)

    # -- scheduler side

    def allow_head_start(self) -> None:
        """The scheduler can take back what was computed with KV that never came."""
        if isinstance(self._scheduler, DecodeScheduler):
            self._scheduler.head_starts.is_allowed = self._head_start_ms > 0

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._load.bind(gpu_block_pool)

    def has_pending_push_work(self) -> bool:
        """One more step for an idle engine, so that the workers hear of blocks that came back after the last one."""
        return self._load.has_news()

    def on_new_request(self, request: Request) -> None:
        assert self._scheduler is not None
        self._load.came(request.request_id)
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if isinstance(self._scheduler, DecodeScheduler):
            return self._scheduler.num_matched_tokens(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._load.got_blocks(request.request_id)
        if isinstance(self._scheduler, DecodeScheduler):
            self._scheduler.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._scheduler is not None
        plan = self._scheduler.take_plan(scheduler_output)
        plan.load = self._load.measure(scheduler_output)
        plan.num_tokens = scheduler_output.total_num_scheduled_tokens
        return TwoLaneMetadata(**vars(plan))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if isinstance(self._scheduler, DecodeScheduler):
            told = connector_output.kv_connector_worker_meta
            due = told.due if isinstance(told, TwoLaneWorkerMetadata) else Counter()
            self._scheduler.on_worker_output(connector_output, due)

    def request_finished(
        self,
        request: Request,
        block_ids: list[int],  # noqa: ARG002 - the workers know them
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.request_finished(request)

    # -- worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward pass in every release, which start_load_kv isn't (0.32 runs it afterwards)."""
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None
        assert isinstance(connector_metadata, TwoLaneMetadata)
        self._worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads begin in bind_connector_metadata and run beside the engine."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request whose KV has not landed isn't scheduled."""

    def save_kv_layer(self, layer_name: str, *_args: Any, **_kwargs: Any) -> None:
        """Pushes may follow the layers. Not called where a CUDA graph holds the whole pass: wait_for_save sweeps."""
        assert self._worker is not None
        self._worker.end_layer(layer_name)

    def wait_for_save(self) -> None:
        """Doesn't wait: the blocks are kept until get_finished reports the request."""
        assert self._worker is not None
        self._worker.end_forward()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        sent, received = self._worker.take_finished(finished_req_ids)
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.take_invalid_blocks()

    def build_connector_worker_meta(self) -> TwoLaneWorkerMetadata | None:
        assert self._worker is not None
        due = self._worker.take_due()
        return TwoLaneWorkerMetadata(Counter(due)) if due else None

    def get_kv_connector_stats(self) -> TwoLaneStats | None:
        if self._worker is None or not (counts := self._worker.take_counts()):
            return None
        return TwoLaneStats(data=counts)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    # -- metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TwoLaneStats:
        return TwoLaneStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TwoLanePromMetrics:
        """The one hook that vLLM calls in its API server's process."""
        decode_prompt_ends_only()
        return TwoLanePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
