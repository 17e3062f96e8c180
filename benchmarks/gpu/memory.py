"""How much of a GPU each instance gets, and whether instances that share one may start at the same time.

vLLM 0.26 (v1/worker/gpu_worker.py) measures the free memory before and after a profile run, and what other instances
take meanwhile counts as its own: so instances start one after the other on a GPU. With `--kv-cache-memory-bytes` the
KV memory is that number and nothing is measured; what stays is the check at the start that `--gpu-memory-utilization`
of the whole GPU is free, which is why that is given as next to nothing then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import Options
from benchmarks.gpu.setups import Setup, gpus_of, max_model_len

from twolane.errors import ConfigError
from twolane.launch.plan import Machine, ServedModel
from twolane.power.nvml import nvml

MOST_OF_A_GPU = 0.84  # of its memory, for all instances on it: each needs some more than its share
A_SHARE = 0.35
UNMEASURED_SHARE = 0.01
PROMPTS_AT_ONCE = 6  # of the longest, with their answers: what an instance's KV memory holds
BESIDE_KV_BYTES = 4 << 30  # an instance's activations, CUDA graphs, context, buffers of transports
BYTES_A_VALUE = 2


@dataclass(frozen=True)
class Memory:
    """What each instance is told. `share`: of the GPU; None: vLLM's default. `kv_bytes`: of KV, a rank.

    `at_once`: how many instances start at the same time; 0: setup by setup, and in turns on each GPU.
    """

    share: float | None = None
    kv_bytes: int | None = None
    at_once: int = 0

    def args(self) -> tuple[str, ...]:
        args = () if self.kv_bytes is None else ("--kv-cache-memory-bytes", str(self.kv_bytes))
        return args if self.share is None else (*args, "--gpu-memory-utilization", str(self.share))


def memory_of(setups: list[Setup], options: Options, machine: Machine, model: ServedModel) -> Memory:
    """For instances of setups that live at once. ConfigError if they don't fit."""
    users = _users(setups, options)
    num_instances = sum(1 if setup.kind == "plain" else 2 for setup in setups)
    if machine.engine == "cpu":  # their KV memory is a given number in any case
        return Memory(options.memory, at_once=num_instances)
    if options.memory is not None or (options.kv_gib is None and not options.together):
        return Memory(options.memory if options.memory is not None else _share(users))
    folder = Path(model.source)
    kv_bytes = int(options.kv_gib * (1 << 30)) if options.kv_gib is not None else _kv_bytes(folder, options)
    _check_room(users, kv_bytes, _weights_bytes(folder))
    return Memory(UNMEASURED_SHARE, kv_bytes, num_instances)


def _users(setups: list[Setup], options: Options) -> Counter[int]:
    """GPU -> instances on it."""
    prefill, decode = gpus_of(options.prefill_gpu), gpus_of(options.decode_gpu)
    return Counter(
        gpu for s in setups for gpus in ((decode,) if s.kind == "plain" else (prefill, decode)) for gpu in gpus
    )


def _share(users: Counter[int]) -> float | None:
    most = max(users.values(), default=1)
    return None if most == 1 else min(A_SHARE, int(100 * MOST_OF_A_GPU / most) / 100)


def _kv_bytes(folder: Path, options: Options) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
        token_bytes = kv_bytes_a_token(config, max(len(gpus_of(options.decode_gpu)), 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"how much KV a token has isn't told by {folder}/config.json: give --kv-gib") from error
    return PROMPTS_AT_ONCE * max_model_len(options) * token_bytes


def kv_bytes_a_token(config: Mapping[str, Any], ranks: int) -> int:
    """On each rank, in 16-bit values. KeyError if the configuration has other words for it."""
    num_heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    heads_a_rank = max(1, int(config.get("num_key_value_heads") or num_heads) // ranks)
    return 2 * int(config["num_hidden_layers"]) * heads_a_rank * head_size * BYTES_A_VALUE


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in {".safetensors", ".bin"})


def _check_room(users: Counter[int], kv_bytes: int, weights_bytes: int) -> None:
    """Weights are taken as whole on each rank, so this errs to the safe side with several."""
    for gpu, total_bytes in gpu_bytes().items():
        if (needed := users[gpu] * (kv_bytes + weights_bytes + BESIDE_KV_BYTES)) > total_bytes:
            raise ConfigError(
                f"GPU {gpu} has {total_bytes / 2**30:.0f} GiB; {users[gpu]} instances with {kv_bytes / 2**30:.1f} GiB "
                f"of KV each need about {needed / 2**30:.0f}: fewer --setups, or a smaller --kv-gib"
            )


def gpu_bytes() -> dict[int, int]:
    """Nothing without a driver."""
    with nvml() as library:
        if library is None:
            return {}
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return {index: int(library.nvmlDeviceGetMemoryInfo(handle).total) for index, handle in enumerate(handles)}
