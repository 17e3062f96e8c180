"""Pure: what the connector can't do right, said when the instance starts. vLLM's classes are known by name only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twolane.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def refuse_unsupported(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises ConfigError for what would hang or answer wrongly."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    if transfer.kv_role not in ("kv_producer", "kv_consumer"):
        raise ConfigError(f"kv_role {transfer.kv_role!r}: TwoLane has kv_producer (P) and kv_consumer (D) instances.")
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError('set "kv_load_failure_policy": "recompute", or a lost transfer fails the client\'s request.')
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("TwoLaneConnector does no pipeline parallelism: use --tensor-parallel-size instead.")
    if config.speculative_config is not None:
        raise ConfigError("TwoLaneConnector does no speculative decoding: start without --speculative-config.")
    if len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            "TwoLaneConnector moves one KV cache group, and this model got several: start without "
            "--no-disable-hybrid-kv-cache-manager; if vLLM can't do without, serve the model without lanes."
        )
    for group in kv_cache_config.kv_cache_groups:
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values():
            _check_kind(spec)


def _check_kind(spec: Any) -> None:
    """Only where every block of a prompt is kept until the request ends can P send it, and D cache it."""
    kinds = {kind.__name__ for kind in type(spec).__mro__}  # its own and those that it is a kind of
    if "MLAAttentionSpec" in kinds:
        raise ConfigError(
            "this model keeps latent vectors (MLA) in place of keys and values, which TwoLaneConnector has not been "
            "shown to move right: serve it without lanes."
        )
    if "FullAttentionSpec" in kinds:  # sliding windows beside full attention are made into one
        return
    if "SlidingWindowSpec" in kinds:
        raise ConfigError(
            "all layers of this model attend to a sliding window, and vLLM frees blocks behind it while P still has to "
            "send them: start with --disable-sliding-window, which ends prompts at the window's length."
        )
    if "MambaSpec" in kinds:
        raise ConfigError(
            "this model has state-space layers, which TwoLaneConnector can't move: serve it without lanes."
        )
    raise ConfigError(f"TwoLaneConnector can't move a KV cache of kind {type(spec).__name__}: serve it without lanes.")
