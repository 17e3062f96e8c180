"""Real vLLM, one P and one D a transport: right tokens, clients that leave, D killed, P killed.

`TWOLANE_GPU_MODEL` names the model's folder: small, with weights so wide that every token depends on the whole prompt.
P and D share a GPU where there is one; where there are two, each has its own. `TWOLANE_TEST_CPU=1` runs the same with
vLLM for CPUs: for work on the tests where there is no GPU. A transport's tests use the same instances, in this order.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.engine.stack import Instance, Stack, all_free, complete, completion_body, difference, wait_for
from tests.gpu.lanes import (
    LENGTHS,
    NEEDS,
    NUM_GPUS,
    NUM_TOKENS,
    Answer,
    Stream,
    all_alone,
    ask,
    assert_no_cuda_error,
    failed_transfers,
    gpu_mib,
    judge,
    make_prompts,
    one_stack,
    report,
    with_decode,
)
from tests.gpu.switches import ON_CPU, REQUESTS
from twolane.launch.plan import ServiceSpec
from twolane.launch.probes import is_registered
from twolane.launch.probes import request as ask_http

pytestmark = NEEDS

GIVEN_UP = 0.2  # of the requests
STALL_S = 1.0
LATE_S = 1.0  # an answer whose P died, beyond what D needs to compute it
LEASE_S = 40.0  # and some: P's lease, for a request that D never asked for
AT_ONCE_S = 10.0  # well below the lease
WITHIN_S = 300.0  # all REQUESTS
GROWTH_MIB = 64


@dataclass
class Pair:
    """P and D over one transport, and two more P, with a proxy each, which send the same D zeros, or promise it KV that
    doesn't come."""

    stack: Stack
    zero: Stack
    false: Stack

    @property
    def prefill(self) -> Instance:
        return self.stack.instances["prefill"]

    @property
    def decode(self) -> Instance:
        return self.stack.instances["decode"]

    @property
    def both(self) -> list[Instance]:
        return [self.prefill, self.decode]

    def d_alone(self, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, at_once: int = 4) -> list[Answer]:
        return all_alone(self.stack, self.decode.spec, prompts, num_tokens, at_once)

    def again(self, spec: ServiceSpec) -> float:
        """Another process in place of one that was killed; seconds until it is ready."""
        started_s = time.monotonic()
        self.stack.instances.pop(spec.name).child.stop(1.0)
        self.stack.start(spec)
        return time.monotonic() - started_s


def ways() -> list[object]:
    if ON_CPU:
        return ["shm", "tcp"]
    return ["cuda_ipc", "shm", "nccl"]


@pytest.fixture(scope="module", params=ways())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    transport, decode_gpu = request.param, 1 if NUM_GPUS > 1 else 0
    stack = one_stack(tmp_path_factory.mktemp(transport), transport=transport, decode_gpu=((decode_gpu,),))
    decode = stack.spec("decode")
    zero = with_decode(one_stack(tmp_path_factory.mktemp("zero"), transport=transport, fault="zero_kv"), decode)
    false = with_decode(one_stack(tmp_path_factory.mktemp("false"), transport=transport, fault="false_soon"), decode)
    started_s = time.monotonic()
    try:
        stack.launch(stack.spec("prefill"), decode)
        zero.launch(zero.spec("prefill"))
        false.launch(false.spec("prefill"))
        for each in (stack, zero, false):
            each.wait_ready(each.spec("prefill"))
            wait_for("D at each proxy", partial(is_registered, each.plan.proxy_address, decode), 240)
        sys.stdout.write("\n" + json.dumps({"started_s": round(time.monotonic() - started_s, 1)}) + "\n")
        yield Pair(stack, zero, false)
    finally:
        false.stop()
        zero.stop()
        stack.stop()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(1)


@pytest.fixture(scope="module")
def expected(pair: Pair, prompts: list[list[int]]) -> list[Answer]:
    """D alone, without a handoff."""
    return pair.d_alone(prompts, at_once=1)


def check_tokens(pair: Pair, prompts: list[list[int]], expected: list[Answer]) -> dict[str, object]:
    """Through the lanes: right, and D computed one token of each. Returns figures."""
    before = pair.decode.tokens_by_source()
    wrong, ties = judge([ask(pair.stack, prompt) for prompt in prompts], expected)
    sources = difference(pair.decode.tokens_by_source(), before)
    assert not wrong, [len(prompts[index]) for index in wrong]
    assert sources == {
        "local_compute": len(prompts),
        "local_cache_hit": 0,
        "external_kv_transfer": sum(map(len, prompts)) - len(prompts),
    }
    return {"prompts": len(prompts), "ties": ties, **sources}


def test_tokens_equal_d_alone_and_d_computed_one_token_of_each_prompt(
    request: pytest.FixtureRequest, pair: Pair, prompts: list[list[int]], expected: list[Answer]
) -> None:
    report(request, **check_tokens(pair, prompts, expected))
    sent_over = Path(pair.prefill.spec.log).read_text(errors="replace")
    assert "transport not used" not in sent_over


def test_the_comparison_fails_when_the_kv_is_zero(
    request: pytest.FixtureRequest, pair: Pair, prompts: list[list[int]], expected: list[Answer]
) -> None:
    """So the equality above is the KV's doing."""
    wrong, ties = judge([ask(pair.zero, prompt) for prompt in prompts], expected)
    report(request, wrong=len(wrong), of=len(prompts), ties=ties)
    assert [LENGTHS[index] for index in wrong] == [length for length in LENGTHS if length > 1]


def test_what_was_computed_with_kv_that_never_came_is_taken_back(request: pytest.FixtureRequest, pair: Pair) -> None:
    prompts, name = make_prompts(15, [4000, 2000, 513]), "twolane_kv_head_starts_total"
    wanted, before = pair.d_alone(prompts), pair.decode.metrics()
    with ThreadPoolExecutor(len(prompts)) as pool:
        got = list(pool.map(partial(ask, pair.false), prompts))
    after = pair.decode.metrics()
    wrong, ties = judge(got, wanted)
    head_starts = int(after.get(name, 0) - before.get(name, 0))
    taken_back = int(after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"])
    report(request, head_starts=head_starts, taken_back=taken_back, wrong=len(wrong), ties=ties)
    assert head_starts
    assert taken_back
    assert not wrong


def test_clients_that_leave_in_mid_prefill_and_in_mid_stream_give_the_blocks_back(
    request: pytest.FixtureRequest, pair: Pair
) -> None:
    wait_for("idle engines", lambda: all_free(pair.both), 10)
    address, headers = pair.stack.plan.proxy_address, {"Content-Type": "application/json"}
    clients = []
    for prompt in make_prompts(3, [4000] * 8):
        body = completion_body(pair.stack, prompt, 8)
        clients.append(http.client.HTTPConnection(address, timeout=60))
        clients[-1].request("POST", "/v1/completions", json.dumps(body), headers)
    wait_for("KV on its way", lambda: is_moving(pair), 30)
    for client in clients:
        client.close()
    from_prefill_s = wait_for("all blocks back", lambda: all_free(pair.both), AT_ONCE_S)
    (prompt,) = make_prompts(4, [300])
    connection = http.client.HTTPConnection(address, timeout=60)
    body = completion_body(pair.stack, prompt, 3000, stream=True)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    for _ in range(6):  # three events
        answer.readline()
    running = pair.decode.running()
    answer.close()
    connection.close()
    from_stream_s = wait_for("all blocks back", lambda: all_free(pair.both), AT_ONCE_S)
    report(request, mid_prefill_s=from_prefill_s, mid_stream_s=from_stream_s)
    assert running == 1


def is_moving(pair: Pair) -> bool:
    """P is in mid-prefill, and D's blocks wait for the rest."""
    return pair.prefill.running() > 0 and pair.prefill.used_blocks() > 0 and pair.decode.used_blocks() > 0


def test_many_requests_of_which_a_fifth_leave(request: pytest.FixtureRequest, pair: Pair) -> None:
    rng = random.Random(5)

    def one(work: tuple[list[int], float | None], end_s: float) -> Stream | None:
        """None: not asked any more."""
        stream, (prompt, leave_after_s) = Stream(), work
        if time.monotonic() > end_s:
            return None
        stream.read(pair.stack, prompt, NUM_TOKENS, leave_after_s)
        return stream

    def some(count: int, seed: int) -> tuple[int, int, int, float]:
        """(asked, complete, wrong, seconds); of those that stayed every twentieth is compared."""
        lengths = [rng.randrange(1, 900) for _ in range(count)]
        leave = [rng.uniform(0.0, 0.3) if rng.random() < GIVEN_UP else None for _ in range(count)]
        work, started_s = list(zip(make_prompts(seed, lengths), leave, strict=True)), time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            streams = list(pool.map(lambda each: one(each, started_s + WITHIN_S), work))
        seconds = time.monotonic() - started_s
        stayed = [(s, prompt) for s, (prompt, leaves) in zip(streams, work, strict=True) if s and leaves is None]
        assert all(len(stream.tokens) == NUM_TOKENS for stream, _ in stayed)
        sample = stayed[::20]
        wrong, _ = judge([Answer(stream.tokens) for stream, _ in sample], pair.d_alone([p for _, p in sample]))
        return sum(stream is not None for stream in streams), len(stayed), len(wrong), seconds

    some(min(60, REQUESTS), seed=6)  # warms up
    wait_for("all blocks back", lambda: all_free(pair.both), LEASE_S)
    before_mib = [gpu_mib(instance) for instance in pair.both]
    asked, complete_ones, wrong, seconds = some(REQUESTS, seed=7)
    blocks_back_s = wait_for("all blocks back", lambda: all_free(pair.both), LEASE_S)
    after_mib = [gpu_mib(instance) for instance in pair.both]
    report(
        request,
        requests=asked,
        complete=complete_ones,
        wrong=wrong,
        seconds=seconds,
        blocks_back_s=blocks_back_s,
        gpu_mib_of_p_and_d=(before_mib, after_mib),
    )
    assert not wrong
    for before, after in zip(before_mib, after_mib, strict=True):
        assert after - before < GROWTH_MIB
    for instance in pair.both:
        assert_no_cuda_error(instance)
    assert asked == REQUESTS, f"all that could be asked in {WITHIN_S:g} s"


def how_it_ended(stack: Stack, prompt: list[int]) -> str:
    """A status, or the error that cut the connection."""
    try:
        body = completion_body(stack, prompt, 8)
        return str(ask_http(stack.plan.proxy_address, "POST", "/v1/completions", body, 60.0)[0])
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def test_d_killed_in_mid_transfer_and_p_goes_on_with_the_next_d(request: pytest.FixtureRequest, pair: Pair) -> None:
    wait_for("idle engines", lambda: all_free(pair.both), LEASE_S)
    before_mib = gpu_mib(pair.prefill)
    long_prompts, stream_prompts = make_prompts(11, [4000] * 8), make_prompts(12, [64] * 2)
    with ThreadPoolExecutor(len(long_prompts) + len(stream_prompts)) as pool:
        streams = [Stream() for _ in stream_prompts]
        reading = [
            pool.submit(stream.read, pair.stack, prompt, 3000)
            for stream, prompt in zip(streams, stream_prompts, strict=True)
        ]
        wait_for("streams on D", lambda: all(len(stream.tokens) > 10 for stream in streams), 60)
        asked = [pool.submit(how_it_ended, pair.stack, prompt) for prompt in long_prompts]
        wait_for("KV on its way", lambda: is_moving(pair), 30)
        pair.decode.kill()
        gone_s = time.monotonic()
        free_s = wait_for("P's blocks", lambda: all_free([pair.prefill]), AT_ONCE_S)
        ended = [one.result() for one in asked]
        ended_s = time.monotonic() - gone_s
        cut = [one.exception() or stream.error for one, stream in zip(reading, streams, strict=True)]
    without_d_mib, started_s = gpu_mib(pair.prefill), time.monotonic()
    (short,) = make_prompts(13, [200])
    complete(f"http://{pair.prefill.spec.address}", completion_body(pair.stack, short, 1))
    p_alone_s = time.monotonic() - started_s
    restart_s = pair.again(pair.decode.spec)
    wait_for("P at the proxy", partial(is_registered, pair.stack.plan.proxy_address, pair.prefill.spec), 30)
    some = make_prompts(14, [1, 100, 513, 2000, 4000])
    figures = check_tokens(pair, some, pair.d_alone(some))
    wait_for("all blocks back", lambda: all_free(pair.both), LEASE_S)
    with_next_mib = gpu_mib(pair.prefill)
    report(
        request,
        killed_to_blocks_free_s=free_s,
        killed_to_last_client_told_s=ended_s,
        told=ended,
        p_alone_answers_s=p_alone_s,
        restart_s=restart_s,
        gpu_mib_of_p=(before_mib, without_d_mib, with_next_mib),
        **figures,
    )
    assert any(outcome != "200" for outcome in ended), "the kill hit no request"
    assert all(cut), "a stream of a D that is dead must not end as if it were whole"
    assert with_next_mib - before_mib < GROWTH_MIB
    assert_no_cuda_error(pair.prefill)


def test_p_killed_in_mid_transfer_while_d_decodes_and_d_goes_on_with_the_next_p(
    request: pytest.FixtureRequest, pair: Pair
) -> None:
    failed_before = failed_transfers(pair.decode)
    num_tokens, num_streams = 1200 if not ON_CPU else 400, 4
    stream_prompts, long_prompts = make_prompts(8, [64] * num_streams), make_prompts(9, [4000] * 6)
    streams = [Stream() for _ in stream_prompts]
    started_s = time.monotonic()
    with ThreadPoolExecutor(num_streams + len(long_prompts)) as pool:
        running = [
            pool.submit(stream.read, pair.stack, prompt, num_tokens)
            for stream, prompt in zip(streams, stream_prompts, strict=True)
        ]
        wait_for("all streams", lambda: all(len(stream.tokens) > 30 for stream in streams), 60)
        asked = [pool.submit(ask, pair.stack, prompt, 8) for prompt in long_prompts]
        wait_for("KV on its way", lambda: is_moving(pair), 30)
        killed_s = time.monotonic()
        pair.prefill.kill()
        gone_s = time.monotonic()
        answers = [one.result() for one in asked]
        answered_s = time.monotonic()
        for one in running:
            one.result()
    still = sum(stream.at_s[-1] > gone_s for stream in streams)
    before = max(stream.longest_gap_s(started_s, killed_s) for stream in streams)
    during = max(stream.longest_gap_s(killed_s - 0.1, answered_s + 0.5) for stream in streams)
    failures = difference(failed_transfers(pair.decode), failed_before)
    blocks_back_s = wait_for("all blocks back", lambda: all_free([pair.decode]), 5.0)
    began_s = time.monotonic()
    wanted = pair.d_alone(long_prompts, 8, at_once=len(long_prompts))
    alone_s = time.monotonic() - began_s
    wrong, ties = judge(answers, wanted)
    wrong_streams, stream_ties = judge(
        [Answer(stream.tokens) for stream in streams], pair.d_alone(stream_prompts, num_tokens)
    )
    restart_s = pair.again(pair.prefill.spec)
    some = make_prompts(10, [1, 100, 513, 2000, 4000])
    figures = check_tokens(pair, some, pair.d_alone(some))
    report(
        request,
        kill_s=gone_s - killed_s,
        gone_to_last_answer_s=answered_s - gone_s,
        d_computes_all_of_them_in_s=alone_s,
        longest_itl_before_s=before,
        longest_itl_during_s=during,
        streams_running_at_the_kill=still,
        transfers_failed={cause: count for cause, count in failures.items() if count},
        wrong=len(wrong) + len(wrong_streams),
        tied=ties + stream_ties,
        blocks_back_s=blocks_back_s,
        restart_s=restart_s,
        gpu_mib_of_d=gpu_mib(pair.decode),
        **figures,
    )
    assert not wrong
    assert not wrong_streams
    assert still == num_streams, "the streams ended before the kill"
    assert sum(failures.values()), "the kill hit no transfer"
    assert_no_cuda_error(pair.decode)
    if not ON_CPU:  # where P and D take the cores from each other
        assert during < STALL_S
        assert answered_s - gone_s < alone_s + LATE_S
