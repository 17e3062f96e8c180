"""Pure: what vLLM is told about the engine, by its command line and environment, where its own default doesn't fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twolane.launch.kv import without_kv
from twolane.launch.options import tensor_parallel_size

if TYPE_CHECKING:
    from twolane.config import Settings
    from twolane.launch.plan import Machine, ServedModel

CPU_MAX_MODEL_LEN = 8192
CPU_KV_SPACE_GIB = 1

# Up to some 2,000 tokens a prefill takes as long as launching its kernels one by one does: 20 ms and more for 36
# layers, of which the GPU computes 512 tokens in 8 (docs/LOG.md). CUDA graphs launch at once what lies between two
# attentions, but vLLM captures 512 tokens at most, with decoding in mind. P gets these; a pass is padded to the next.
_CAPTURED = (*(1, 2, 4, 8, 16, 32), *range(64, 1024, 64), *range(1024, 2049, 128))
CAPTURE = ("--cudagraph-capture-sizes", *map(str, _CAPTURED))
# Whoever says one of these decides by himself, or may: a file could say it, too.
_OWN_WAY = (
    *("--cudagraph", "--max-cudagraph", "--compilation-config", "-cc"),
    *("-O", "--optimization-level", "--enforce-eager", "--config"),
)


def engine_args(settings: Settings, machine: Machine, model: ServedModel, role: str, given: list[str]) -> list[str]:
    """`given`: the user's own arguments, which come behind them."""
    max_len = settings.max_model_len
    if machine.engine == "cuda":
        captures = role == "prefill" and not any(word.replace("_", "-").startswith(_OWN_WAY) for word in given)
        return [*(["--max-model-len", str(max_len)] if max_len else []), *(CAPTURE if captures else ())]
    max_len = max_len or min(CPU_MAX_MODEL_LEN, model.max_len or CPU_MAX_MODEL_LEN)
    # A CPU gains little from compiling a small model, and it takes minutes and a compiler. `uni`: see engine_env.
    args = ["--enforce-eager", "--dtype", "float32", "--max-model-len", str(max_len)]
    return [*args, "--distributed-executor-backend", "uni" if tensor_parallel_size(given) == "1" else "mp"]


def engine_env(settings: Settings, machine: Machine, model: ServedModel, gpus: tuple[int, ...]) -> dict[str, str]:
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if model.local:
        env["HF_HUB_OFFLINE"] = "1"
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
    if machine.engine == "cpu":
        instances = settings.prefill + settings.decode
        env["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_SPACE_GIB)
        # The model in the engine's own process, if it has one rank: as two, which is vLLM's default, each busy-waits
        # for the other, also while a D only waits for KV, and that takes the core that P computes on (docs/LOG.md).
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM would bind every instance to the same cores, as if it were alone: give each its part, unbound.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(max(1, machine.num_cpus // instances))
        # Parts of the sampler are compiled in spite of --enforce-eager, at the first request that needs them (logprobs
        # do): that stops the engine for seconds, and kills it where there is no C++ compiler.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


def without_lane(argv: tuple[str, ...]) -> tuple[str, ...]:
    """An instance's command line without what it is told for being P or D: vLLM as it is without us."""
    size = len(CAPTURE)
    at = next((i for i in range(len(argv)) if argv[i : i + size] == CAPTURE), len(argv))
    return without_kv(argv[:at] + argv[at + size :])
