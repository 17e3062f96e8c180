"""What an instance is refused for at its start, each with what to do. Real engines: tests/engine/test_shapes.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from twolane.connector.supported import refuse_unsupported
from twolane.errors import ConfigError


class FullAttentionSpec:
    """As vLLM's class is called; the connector knows it by name."""


class MLAAttentionSpec(FullAttentionSpec):
    pass


class SlidingWindowSpec:
    pass


class MambaSpec:
    pass


class CrossAttentionSpec:
    pass


def config(**changes: Any) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_role="kv_consumer", kv_load_failure_policy="recompute"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        **changes,
    )


def kv_cache(*specs: object) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_full_attention_is_served() -> None:
    spec = FullAttentionSpec()
    refuse_unsupported(config(), kv_cache(spec))
    refuse_unsupported(config(), kv_cache(SimpleNamespace(kv_cache_specs={"a": spec, "b": spec})))


@pytest.mark.parametrize(
    ("specs", "remedy"),
    [
        ([SlidingWindowSpec()], "start with --disable-sliding-window"),
        ([MLAAttentionSpec()], "latent vectors .MLA. in place of keys and values"),
        ([MambaSpec()], "state-space layers, which TwoLaneConnector can.t move: serve it"),
        ([CrossAttentionSpec()], "kind CrossAttentionSpec: serve it without lanes"),
        ([SimpleNamespace(kv_cache_specs={"a": FullAttentionSpec(), "b": MambaSpec()})], "serve it without lanes"),
        ([FullAttentionSpec(), MambaSpec()], "start without --no-disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_cannot_be_moved_is_refused(specs: list[object], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        refuse_unsupported(config(), kv_cache(*specs))


@pytest.mark.parametrize(
    ("part", "changes", "remedy"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "use --tensor-parallel-size instead"),
        ("kv_transfer_config", {"kv_role": "kv_both"}, "TwoLane has kv_producer .* and kv_consumer"),
        ("kv_transfer_config", {"kv_load_failure_policy": "fail"}, "set .kv_load_failure_policy.: .recompute."),
    ],
)
def test_settings_that_would_hang_or_answer_wrongly_are_refused(
    part: str, changes: dict[str, Any], remedy: str
) -> None:
    made = config()
    vars(getattr(made, part)).update(changes)
    with pytest.raises(ConfigError, match=remedy):
        refuse_unsupported(made, kv_cache(FullAttentionSpec()))


def test_speculative_decoding_is_refused() -> None:
    made = config()
    made.speculative_config = object()
    with pytest.raises(ConfigError, match="start without --speculative-config"):
        refuse_unsupported(made, kv_cache(FullAttentionSpec()))
