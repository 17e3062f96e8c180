"""`twolane up` with several instances on the same GPUs: right tokens, by whichever of them.

Two shapes: tensor parallelism 2 on P and D over the same two GPUs, and 2P2D with a P and a D on each of two GPUs. The
first is told how much memory to take, the second gets the launcher's shares: nothing else may use the GPUs meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.engine.place import Place
from tests.engine.stack import Stack, difference, metrics_of, wait_for
from tests.gpu.lanes import (
    BOTH,
    EAGER,
    FLOAT32,
    LENGTHS,
    MAX_LEN,
    NEEDS,
    NUM_GPUS,
    SMALL,
    TRUE_FLOAT32,
    all_alone,
    ask,
    computed_and_moved,
    judge,
    make_prompts,
    one_stack,
    report,
    used_mib,
    with_decode,
)
from tests.gpu.switches import MODEL, ON_CPU
from twolane.config import GpuGroups, Settings
from twolane.launch.control import Files, stop_all
from twolane.launch.plan import load_plan
from twolane.launch.probes import is_registered

pytestmark = [
    *NEEDS,
    pytest.mark.skipif(not ON_CPU and NUM_GPUS < 2, reason="needs two NVIDIA GPUs"),
]
TENSOR_PARALLEL = ("--tensor-parallel-size", "2")


@dataclass(frozen=True)
class Shape:
    """`gpus`: PREFILL_GPU and DECODE_GPU. `cpu_words`: the same without GPUs."""

    gpus: str
    groups: GpuGroups
    args: tuple[str, ...]
    cpu_words: tuple[str, ...] = ()
    cpu_args: tuple[str, ...] = ()


TP2 = Shape("0+1", ((0, 1),), SMALL, cpu_args=TENSOR_PARALLEL)
FOUR = Shape("0,1", ((0,),), (), cpu_words=("--prefill", "2", "--decode", "2"))


@dataclass
class Service:
    shape: Shape
    place: Place
    stack: Stack  # of which nothing was started here


@pytest.fixture(scope="module", params=[pytest.param(TP2, id="tp2"), pytest.param(FOUR, id="2p2d")])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    shape, folder = request.param, tmp_path_factory.mktemp("up")
    place = Place(folder)
    place.env |= TRUE_FLOAT32 | ({} if ON_CPU else {"PREFILL_GPU": shape.gpus, "DECODE_GPU": shape.gpus})
    args = (*BOTH, *(shape.cpu_args if ON_CPU else (*FLOAT32, *EAGER, *shape.args)))
    words = ("--model", MODEL, "--max-model-len", str(MAX_LEN), *(shape.cpu_words if ON_CPU else ()))
    files, started_s = Files(Settings(state_dir=folder / ".twolane", log_dir=folder / "logs")), time.monotonic()
    try:
        up = place.twolane("up", *words, "--vllm-args", " ".join(args))
        assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
        sys.stdout.write("\n" + json.dumps({"up_s": round(time.monotonic() - started_s, 1)}) + "\n")
        yield Service(shape, place, Stack(load_plan(folder / ".twolane" / "plan.json")))
    finally:
        stop_all(files)


def test_tokens_equal_d_alone_and_every_instance_took_part(request: pytest.FixtureRequest, service: Service) -> None:
    stack = service.stack
    prefills, decodes = stack.plan.of_role("prefill"), stack.plan.of_role("decode")
    prompts = make_prompts(31)
    expected = all_alone(stack, decodes[0], prompts)
    before = computed_and_moved(decodes)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(partial(ask, stack), prompts))
    wrong, ties = judge(got, expected)
    gained = difference(computed_and_moved(decodes), before)
    sent = {spec.name: int(metrics_of(spec)["twolane_kv_sent_transfers_total"]) for spec in prefills}
    received = {spec.name: int(metrics_of(spec)["twolane_kv_received_transfers_total"]) for spec in decodes}
    report(request, wrong=[LENGTHS[index] for index in wrong], ties=ties, **gained, sent=sent, received=received)
    assert not wrong
    assert gained["local_compute"] == len(prompts)
    assert gained["external_kv_transfer"] == sum(LENGTHS) - len(prompts)
    assert all(sent.values())
    assert all(received.values())


def test_the_comparison_fails_when_the_kv_is_zero(
    request: pytest.FixtureRequest, service: Service, tmp_path: Path
) -> None:
    """From one more P, beside those that run, with a proxy of its own."""
    shape, decode = service.shape, service.stack.plan.of_role("decode")[0]
    more = shape.cpu_args if ON_CPU else ()
    made = one_stack(tmp_path, *more, prefill_gpu=shape.groups, decode_gpu=shape.groups, fault="zero_kv")
    zero, started_s = with_decode(made, decode), time.monotonic()
    try:
        zero.start(zero.spec("prefill"))
        started_s = time.monotonic() - started_s
        wait_for("D at its proxy", partial(is_registered, zero.plan.proxy_address, decode), 60)
        prompts = make_prompts(32)
        expected = all_alone(service.stack, decode, prompts)
        wrong, ties = judge([ask(zero, prompt) for prompt in prompts], expected)
    finally:
        zero.stop()
    report(request, wrong=len(wrong), of=len(prompts), ties=ties, started_s=started_s)
    assert [LENGTHS[index] for index in wrong] == [length for length in LENGTHS if length > 1]


def test_down_ends_all_of_them(request: pytest.FixtureRequest, service: Service) -> None:
    """Last: nothing runs afterwards."""
    started_s = time.monotonic()
    down = service.place.twolane("down")
    assert down.returncode == 0, down.stderr
    report(request, down_s=time.monotonic() - started_s, gpu_mib_in_use=used_mib())
    assert down.stdout.count(": stopped") == 1 + len(service.stack.plan.instances()), down.stdout
