"""Real instances with a tiny model, questions whose answers can be compared, and what a GPU's memory holds.

All in float32, through Triton's attention. Answers are compared with those of D asked alone: the same kernels.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pynvml
import pytest
import torch

from tests.contract.target import TWO_HOSTS
from tests.engine.stack import (
    Instance,
    Stack,
    complete_choice,
    completion_body,
    make_test_plan,
    metrics_of,
    tokens_by_source,
    with_extra,
)
from tests.gpu.switches import MODEL, ON_CPU
from twolane.config import GpuGroups
from twolane.launch.plan import ServiceSpec

NEEDS = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    *([] if ON_CPU else [pytest.mark.gpu]),
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not MODEL, reason="TWOLANE_GPU_MODEL names no model"),
]
NUM_GPUS = 0 if ON_CPU else torch.cuda.device_count()

# Below one block, at edges of blocks (16 on a GPU) and of chunks, over several chunks.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 100, 127, 128, 129, 256, 257, 511, 513, 1024, 1025, 2000, 4000]
MAX_LEN = 4096
NUM_TOKENS = 12
TIE = 1e-4  # nats between the best two tokens: kernels of other shapes may decide otherwise
BOTH = ("--max-num-batched-tokens", "128", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--seed", "0")
FLOAT32 = ("--dtype", "float32", "--attention-backend", "TRITON_ATTN")
EAGER = ("--enforce-eager",)
# The KV's size is given, so that instances that start at the same time need not measure what is free.
SMALL = ("--kv-cache-memory-bytes", str(256 << 20), "--gpu-memory-utilization", "0.05")
UNCACHED = {"VLLM_DISABLE_COMPILE_CACHE": "1"}  # several compile at the same time, and vLLM writes a file in pieces
TRUE_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}  # Triton multiplies float32 as TF32 otherwise


def report(request: pytest.FixtureRequest, **figures: object) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    sys.stdout.write("\n" + json.dumps({"test": request.node.name, **rounded}) + "\n")


# -- what runs


def one_stack(
    log_dir: Path, *more_args: str, prefill_gpu: GpuGroups = ((0,),), decode_gpu: GpuGroups = ((0,),), **extra: object
) -> Stack:
    """1P1D. `extra`: of P's connector. P computes in CUDA graphs, as it does for users. `nccl` works on one GPU too, by
    sockets."""
    changes: dict[str, Any] = {"model": MODEL, "max_model_len": MAX_LEN}
    if not ON_CPU:
        changes |= {"prefill_gpu": prefill_gpu, "decode_gpu": decode_gpu, "decode_args": EAGER}
    plan = make_test_plan(log_dir, *BOTH, *(() if ON_CPU else (*FLOAT32, *SMALL)), *more_args, **changes)
    of_prefill = TWO_HOSTS if extra.get("transport") == "nccl" and prefill_gpu == decode_gpu else {}
    envs = {"proxy": {}, "prefill": {**TRUE_FLOAT32, **UNCACHED, **of_prefill}, "decode": TRUE_FLOAT32}
    services = [msgspec.structs.replace(spec, env=spec.env | envs[spec.role]) for spec in plan.services]
    services = [with_extra(spec, **extra) if spec.role == "prefill" else spec for spec in services]
    return Stack(msgspec.structs.replace(plan, services=tuple(services)))


def with_decode(stack: Stack, decode: ServiceSpec) -> Stack:
    """Its proxy sends to another stack's D."""
    named = ("--kv", "twolane", "--decode", f"http://{decode.address}=127.0.0.1:{decode.kv_port}")
    services = [
        msgspec.structs.replace(spec, argv=(*spec.argv, *named)) if spec.role == "proxy" else spec
        for spec in stack.plan.services
    ]
    return Stack(msgspec.structs.replace(stack.plan, services=tuple(services)))


# -- asking


def make_prompts(seed: int, lengths: Iterable[int] = LENGTHS) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 4000) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Answer:
    """`gaps`: between the best two tokens, at each place; empty where they weren't asked for."""

    tokens: list[int]
    gaps: list[float] = field(default_factory=list)


def ask_alone(stack: Stack, spec: ServiceSpec, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Answer:
    """The instance itself, without a handoff."""
    body = completion_body(stack, prompt, num_tokens, logprobs=2, return_tokens_as_token_ids=True)
    choice = complete_choice(f"http://{spec.address}", body)
    best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    assert len(choice["token_ids"]) == num_tokens == len(best)
    return Answer(choice["token_ids"], [top[0] - top[1] for top in best])


def ask(stack: Stack, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Answer:
    tokens = complete_choice(stack.url, completion_body(stack, prompt, num_tokens))["token_ids"]
    assert len(tokens) == num_tokens
    return Answer(tokens)


def all_alone(
    stack: Stack, spec: ServiceSpec, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, at_once: int = 4
) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: ask_alone(stack, spec, prompt, num_tokens), prompts))


def is_right(got: Answer, wanted: Answer) -> bool:
    """The same tokens, up to a place where the best two are as good as equal."""
    pairs = zip(got.tokens, wanted.tokens, wanted.gaps, strict=True)
    return next((gap < TIE for mine, theirs, gap in pairs if mine != theirs), True)


def judge(got: list[Answer], wanted: list[Answer]) -> tuple[list[int], int]:
    """(which are wrong, how many differ at a tie only)"""
    pairs = list(zip(got, wanted, strict=True))
    wrong = [index for index, (mine, theirs) in enumerate(pairs) if not is_right(mine, theirs)]
    return wrong, sum(mine.tokens != theirs.tokens for mine, theirs in pairs) - len(wrong)


@dataclass
class Stream:
    """One streamed answer: tokens, and when each came; and the event that says that it failed."""

    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    error: object = None

    def read(self, stack: Stack, prompt: list[int], num_tokens: int, leave_after_s: float | None = None) -> None:
        body = completion_body(stack, prompt, num_tokens, stream=True)
        connection = http.client.HTTPConnection(stack.plan.proxy_address, timeout=60)
        end_s = None if leave_after_s is None else time.monotonic() + leave_after_s
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            if end_s is not None:  # gone before the answer begins, or soon after
                time.sleep(max(0.0, end_s - time.monotonic()))
                return
            answer = connection.getresponse()
            assert answer.status == 200, answer.read().decode()
            for line in answer:
                if line.startswith(b"data: {"):
                    self._add(json.loads(line[6:]))
        finally:
            connection.close()

    def _add(self, event: dict[str, Any]) -> None:
        self.error = event.get("error", self.error)
        for choice in event.get("choices", []):
            self.tokens += choice.get("token_ids") or []
            self.at_s.append(time.monotonic())

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        times = [at_s for at_s in self.at_s if since_s <= at_s <= until_s]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


# -- what it holds


def gpu_mib(instance: Instance) -> int:
    """Memory of its processes on all GPUs; where the driver tells none apart, what all processes use. 0 on the CPU."""
    if ON_CPU:
        return 0
    pids = {member.pid for member in instance.child.look()}
    mine = [
        process.usedGpuMemory or 0
        for handle in gpu_handles()
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if process.pid in pids
    ]
    return sum(mine) >> 20 or sum(used_mib())


def used_mib() -> list[int]:
    """Of each GPU, by whomever."""
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20 for handle in gpu_handles()]


def gpu_handles() -> list[Any]:
    if ON_CPU:
        return []
    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]


def computed_and_moved(specs: Iterable[ServiceSpec]) -> dict[str, int]:
    """Where the prompts' tokens came from, of all of them together."""
    pages = [tokens_by_source(metrics_of(spec)) for spec in specs]
    return {source: sum(page[source] for page in pages) for source in pages[0]}


def failed_transfers(decode: Instance) -> dict[str, int]:
    """By cause."""
    name = "twolane_kv_receive_failures_total"
    return {key: int(value) for key, value in decode.metrics().items() if key.startswith(name)}


def assert_no_cuda_error(instance: Instance) -> None:
    log = Path(instance.spec.log).read_text(errors="replace")
    bad = [line for line in log.splitlines() if "CUDA error" in line or "Traceback" in line or "cuInit" in line]
    assert not bad, bad[:5]
    assert instance.child.exit_code() is None
