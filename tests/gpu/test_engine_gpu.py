"""Real vLLM on one GPU that P and D share: right tokens over each transport, clients that leave, a P that is killed.

`TWOLANE_GPU_MODEL` names the model's folder: small, with weights so wide that every token depends on the whole prompt.
All in float32, so that answers can be compared; D alone is what they are compared with. `TWOLANE_TEST_CPU=1` runs the
same with vLLM for CPUs, over shm: for work on the tests where there is no GPU.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engine.stack import (
    Instance,
    Stack,
    all_free,
    complete_choice,
    completion_body,
    difference,
    make_test_plan,
    wait_for,
    with_extra,
)
from tests.gpu.switches import MODEL, ON_CPU
from twolane.launch.plan import ServiceSpec
from twolane.launch.probes import is_registered

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    *([] if ON_CPU else [pytest.mark.gpu]),
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not MODEL, reason="TWOLANE_GPU_MODEL names no model"),
]

# Below one block, at edges of blocks (16 on a GPU) and of chunks, over several chunks.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 100, 127, 128, 129, 256, 257, 511, 513, 1024, 1025, 2000, 4000]
MAX_LEN = 4096
NUM_TOKENS = 12
TIE = 1e-4  # nats between the best two tokens: kernels of other shapes may decide otherwise
BOTH = ("--max-num-batched-tokens", "128", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--seed", "0")
# The KV's size is given, so that instances that start at the same time need not measure what is free.
ON_GPU = (
    *("--dtype", "float32", "--attention-backend", "TRITON_ATTN", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--gpu-memory-utilization", "0.05"),
)
TRUE_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}  # Triton multiplies float32 as TF32 otherwise
GIVEN_UP = 0.2  # of the requests
STALL_S = 1.0
LEASE_S = 40.0  # and some: P's lease, for a request that D never asked for


def report(request: pytest.FixtureRequest, **figures: object) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    sys.stdout.write("\n" + json.dumps({"test": request.node.name, **rounded}) + "\n")


# -- what runs


def one_stack(log_dir: Path, **extra: object) -> Stack:
    """`extra`: of P's connector."""
    changes: dict[str, Any] = {"model": MODEL, "max_model_len": MAX_LEN}
    if not ON_CPU:
        changes |= {"prefill_gpu": ((0,),), "decode_gpu": ((0,),)}
    plan = make_test_plan(log_dir, *BOTH, *(() if ON_CPU else ON_GPU), **changes)
    services = [
        spec if spec.role == "proxy" else msgspec.structs.replace(spec, env={**spec.env, **TRUE_FLOAT32})
        for spec in plan.services
    ]
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


@dataclass
class Lanes:
    """One D, and three P with a proxy each: `direct` over cuda_ipc, `shm`, and `zero`, which sends zeros."""

    direct: Stack
    shm: Stack
    zero: Stack

    @property
    def prefill(self) -> Instance:
        return self.direct.instances["prefill"]

    @property
    def decode(self) -> Instance:
        return self.direct.instances["decode"]

    @property
    def d_alone(self) -> str:
        return f"http://{self.decode.spec.address}"


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lanes]:
    direct_way = "shm" if ON_CPU else "cuda_ipc"
    direct = one_stack(tmp_path_factory.mktemp("direct"), transport=direct_way)
    decode = direct.spec("decode")
    shm = direct if ON_CPU else with_decode(one_stack(tmp_path_factory.mktemp("shm"), transport="shm"), decode)
    zero = with_decode(one_stack(tmp_path_factory.mktemp("zero"), transport=direct_way, fault="zero_kv"), decode)
    stacks, started_s = [direct, zero] if ON_CPU else [direct, shm, zero], time.monotonic()
    try:
        direct.launch(direct.spec("prefill"), decode)
        for stack in stacks[1:]:
            stack.launch(stack.spec("prefill"))
        for stack in stacks:
            stack.wait_ready(stack.spec("prefill"))
            wait_for("D at each proxy", partial(is_registered, stack.plan.proxy_address, decode), 240)
        sys.stdout.write("\n" + json.dumps({"started_s": round(time.monotonic() - started_s, 1)}) + "\n")
        yield Lanes(direct, shm, zero)
    finally:
        for stack in reversed(stacks):
            stack.stop()


# -- asking


def make_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 4000) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Answer:
    """`gaps`: between the best two tokens, at each place; empty where they weren't asked for."""

    tokens: list[int]
    gaps: list[float] = field(default_factory=list)


def ask_d_alone(lanes: Lanes, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Answer:
    body = completion_body(lanes.direct, prompt, num_tokens, logprobs=2, return_tokens_as_token_ids=True)
    choice = complete_choice(lanes.d_alone, body)
    best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    assert len(choice["token_ids"]) == num_tokens == len(best)
    return Answer(choice["token_ids"], [top[0] - top[1] for top in best])


def ask(stack: Stack, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Answer:
    tokens = complete_choice(stack.url, completion_body(stack, prompt, num_tokens))["token_ids"]
    assert len(tokens) == num_tokens
    return Answer(tokens)


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
    """One streamed answer: tokens, and when each came."""

    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

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
        for choice in event.get("choices", []):
            self.tokens += choice.get("token_ids") or []
            self.at_s.append(time.monotonic())

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        times = [at_s for at_s in self.at_s if since_s <= at_s <= until_s]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def used_gpu_mib() -> int:
    """By all processes; 0 on the CPU."""
    if ON_CPU:
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return int(total_bytes - free_bytes) >> 20


def assert_no_cuda_error(instance: Instance) -> None:
    log = Path(instance.spec.log).read_text(errors="replace")
    bad = [line for line in log.splitlines() if "CUDA error" in line or "Traceback" in line or "cuInit" in line]
    assert not bad, bad[:5]
    assert instance.child.exit_code() is None


# -- tests


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(1, LENGTHS)


@pytest.fixture(scope="module")
def expected(lanes: Lanes, prompts: list[list[int]]) -> list[Answer]:
    """D alone, without a handoff."""
    return [ask_d_alone(lanes, prompt) for prompt in prompts]


@pytest.mark.parametrize("way", ["direct", "shm"])
def test_tokens_equal_d_alone_and_d_computed_one_token_of_each_prompt(
    request: pytest.FixtureRequest, lanes: Lanes, prompts: list[list[int]], expected: list[Answer], way: str
) -> None:
    stack: Stack = getattr(lanes, way)
    before = lanes.decode.tokens_by_source()
    wrong, ties = judge([ask(stack, prompt) for prompt in prompts], expected)
    sources = difference(lanes.decode.tokens_by_source(), before)
    report(request, prompts=len(prompts), wrong=[LENGTHS[index] for index in wrong], ties=ties, **sources)
    assert not wrong
    assert sources == {
        "local_compute": len(prompts),
        "local_cache_hit": 0,
        "external_kv_transfer": sum(LENGTHS) - len(prompts),
    }
    sent_over = Path(stack.instances["prefill"].spec.log).read_text(errors="replace")
    assert "transport not used" not in sent_over


def test_the_comparison_fails_when_the_kv_is_zero(
    request: pytest.FixtureRequest, lanes: Lanes, prompts: list[list[int]], expected: list[Answer]
) -> None:
    """So the equality above is the KV's doing."""
    wrong, ties = judge([ask(lanes.zero, prompt) for prompt in prompts], expected)
    report(request, wrong=len(wrong), of=len(prompts), ties=ties)
    assert [LENGTHS[index] for index in wrong] == [length for length in LENGTHS if length > 1]


def test_clients_that_leave_in_mid_prefill_and_in_mid_stream_give_the_blocks_back(
    request: pytest.FixtureRequest, lanes: Lanes
) -> None:
    both = [lanes.prefill, lanes.decode]
    wait_for("idle engines", lambda: all_free(both), 10)
    clients = []
    for prompt in make_prompts(3, [4000] * 8):
        body = completion_body(lanes.direct, prompt, 8)
        clients.append(http.client.HTTPConnection(lanes.direct.plan.proxy_address, timeout=60))
        clients[-1].request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for("a prefill", lambda: lanes.prefill.running() > 0 and lanes.prefill.used_blocks() > 0, 30)
    waiting = lanes.decode.used_blocks()
    for client in clients:
        client.close()
    from_prefill_s = wait_for("all blocks back", lambda: all_free(both), 2.0)
    (prompt,) = make_prompts(4, [300])
    connection = http.client.HTTPConnection(lanes.direct.plan.proxy_address, timeout=60)
    body = completion_body(lanes.direct, prompt, 3000, stream=True)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    for _ in range(6):  # three events
        answer.readline()
    running = lanes.decode.running()
    answer.close()
    connection.close()
    from_stream_s = wait_for("all blocks back", lambda: all_free(both), 2.0)
    report(request, d_used_before=waiting, mid_prefill_s=from_prefill_s, mid_stream_s=from_stream_s)
    assert waiting > 0
    assert running == 1


def test_300_requests_of_which_a_fifth_leave(request: pytest.FixtureRequest, lanes: Lanes) -> None:
    rng = random.Random(5)

    def some(count: int, seed: int) -> tuple[int, int]:
        """(complete, wrong) of those that stayed; a tenth of those is compared."""
        lengths = [rng.randrange(1, 900) for _ in range(count)]
        leave = [rng.uniform(0.0, 0.3) if rng.random() < GIVEN_UP else None for _ in range(count)]
        work = list(zip(make_prompts(seed, lengths), leave, strict=True))
        streams = [Stream() for _ in work]
        with ThreadPoolExecutor(16) as pool:
            for done in [
                pool.submit(stream.read, lanes.direct, prompt, NUM_TOKENS, leave_after_s)
                for stream, (prompt, leave_after_s) in zip(streams, work, strict=True)
            ]:
                done.result()
        stayed = [
            (stream, prompt)
            for stream, (prompt, leave_after_s) in zip(streams, work, strict=True)
            if leave_after_s is None
        ]
        assert all(len(stream.tokens) == NUM_TOKENS for stream, _ in stayed)
        sample = stayed[::10]
        wrong, _ = judge(
            [Answer(stream.tokens) for stream, _ in sample], [ask_d_alone(lanes, prompt) for _, prompt in sample]
        )
        return len(stayed), len(wrong)

    both = [lanes.prefill, lanes.decode]
    some(60, seed=6)  # warms up
    wait_for("all blocks back", lambda: all_free(both), LEASE_S)
    before_mib, started_s = used_gpu_mib(), time.monotonic()
    complete, wrong = some(300, seed=7)
    seconds = wait_for("all blocks back", lambda: all_free(both), LEASE_S)
    after_mib = used_gpu_mib()
    report(
        request,
        requests=300,
        complete=complete,
        wrong=wrong,
        seconds=time.monotonic() - started_s,
        blocks_back_s=seconds,
        gpu_mib=(before_mib, after_mib),
    )
    assert not wrong
    assert after_mib - before_mib < 64, "GPU memory: a quarter of a MiB a request"
    for instance in both:
        assert_no_cuda_error(instance)


def failed_transfers(decode: Instance) -> dict[str, int]:
    """By cause."""
    name = "twolane_kv_receive_failures_total"
    return {key: int(value) for key, value in decode.metrics().items() if key.startswith(name)}


def test_p_killed_in_mid_prefill_while_d_decodes(request: pytest.FixtureRequest, lanes: Lanes) -> None:
    """Last of all: this P is gone afterwards."""
    failed_before = failed_transfers(lanes.decode)
    num_tokens, num_streams = 1200 if not ON_CPU else 400, 4
    stream_prompts, long_prompts = make_prompts(8, [64] * num_streams), make_prompts(9, [4000] * 6)
    streams = [Stream() for _ in stream_prompts]
    started_s = time.monotonic()
    with ThreadPoolExecutor(num_streams + len(long_prompts)) as pool:
        running = [
            pool.submit(stream.read, lanes.direct, prompt, num_tokens)
            for stream, prompt in zip(streams, stream_prompts, strict=True)
        ]
        wait_for("all streams", lambda: all(len(stream.tokens) > 30 for stream in streams), 60)
        asked = [pool.submit(ask, lanes.direct, prompt, 8) for prompt in long_prompts]
        wait_for("a prefill", lambda: lanes.prefill.running() > 0 and lanes.prefill.used_blocks() > 0, 30)
        killed_s = time.monotonic()
        lanes.prefill.kill()
        gone_s = time.monotonic()
        answers = [one.result() for one in asked]
        answered_s = time.monotonic()
        for one in running:
            one.result()
    still = sum(stream.at_s[-1] > gone_s for stream in streams)
    before = max(stream.longest_gap_s(started_s, killed_s) for stream in streams)
    during = max(stream.longest_gap_s(killed_s - 0.1, answered_s + 0.5) for stream in streams)
    wrong, ties = judge(answers, [ask_d_alone(lanes, prompt, 8) for prompt in long_prompts])
    wanted = [ask_d_alone(lanes, prompt, num_tokens) for prompt in stream_prompts]
    wrong_streams, stream_ties = judge([Answer(stream.tokens) for stream in streams], wanted)
    failures = difference(failed_transfers(lanes.decode), failed_before)
    blocks_back_s = wait_for("all blocks back", lambda: all_free([lanes.decode]), 5.0)
    report(
        request,
        kill_s=gone_s - killed_s,
        killed_to_last_answer_s=answered_s - killed_s,
        longest_itl_before_s=before,
        longest_itl_during_s=during,
        streams_running_at_the_kill=still,
        transfers_failed=failures,
        wrong=len(wrong) + len(wrong_streams),
        ties=ties + stream_ties,
        blocks_back_s=blocks_back_s,
        gpu_mib=used_gpu_mib(),
    )
    assert not wrong
    assert not wrong_streams
    assert still == num_streams, "the streams ended before the kill"
    assert sum(failures.values()), "the kill hit no transfer"
    assert during < STALL_S
    assert_no_cuda_error(lanes.decode)
    (prompt,) = make_prompts(10, [500])
    assert is_right(ask(lanes.shm, prompt), ask_d_alone(lanes, prompt)), "D takes KV from another P"
