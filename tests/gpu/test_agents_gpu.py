"""Transfers between GPU memories of two processes, and either of them killed or stopped in the middle.

`TWOLANE_TEST_CPU=1` runs the same on the CPU, over shm: for work on the tests where there is no GPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.connector.agents import BLOCK_SIZE, Memory
from tests.contract.target import TWO_HOSTS, Death, TargetProcess, footprint
from tests.gpu.peers import DecodePeer, PrefillPeer, flood_ids
from tests.gpu.switches import ON_CPU
from twolane.connector.agent import logger
from twolane.connector.settings import ConnectorSettings

FLOOD = 200  # transfers of all blocks: tens of milliseconds for any transport
DETECTED_S = 1.0  # from a process's end to the word of it
GONE_S = 10.0  # from SIGKILL to a process's end, at most: CUDA takes its memory apart


@dataclass(frozen=True)
class Way:
    transport: str
    prefill: Memory
    decode: Memory
    num_kills: int
    wave: int = 10  # P instances killed at the same time
    child_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> ConnectorSettings:
        return ConnectorSettings(
            transport=self.transport,  # type: ignore[arg-type]
            slot_bytes=8 << 20,
            num_slots=4,
            lease_s=20.0,
            # NCCL connects with the first bytes, for a second and more on a busy machine: meanwhile a slot is out.
            peer_timeout_s=5.0 if self.transport == "nccl" else 1.0,
            transfer_timeout_s=30.0,
        )


def memory_on(device: str, num_blocks: int = 512) -> Memory:
    """A MiB a block."""
    return Memory(device, num_blocks=num_blocks, layers=4, width=8192)


def ways() -> list[object]:
    gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
    two = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]
    first, second = memory_on("cuda:0"), memory_on("cuda:1")
    few = memory_on("cuda:0", num_blocks=64)  # by sockets
    cpu = memory_on("cpu", num_blocks=64)
    made: list[object] = [
        pytest.param(Way("shm", first, first, num_kills=20), marks=gpu, id="gpu-shm"),
        pytest.param(Way("tcp", first, first, num_kills=20), marks=gpu, id="gpu-tcp"),
        pytest.param(Way("cuda_ipc", first, first, num_kills=50), marks=gpu, id="gpu-cuda_ipc"),
        pytest.param(Way("nccl", few, few, num_kills=8, wave=2, child_env=TWO_HOSTS), marks=gpu, id="gpu-nccl"),
        pytest.param(Way("cuda_ipc", first, second, num_kills=10), marks=two, id="two-gpus-cuda_ipc"),
        pytest.param(Way("nccl", first, second, num_kills=8, wave=2), marks=two, id="two-gpus-nccl"),
    ]
    if ON_CPU:
        made += [pytest.param(Way(name, cpu, cpu, num_kills=4, wave=2), id=f"cpu-{name}") for name in ("shm", "tcp")]
    return made


def report(request: pytest.FixtureRequest, **figures: object) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    sys.stdout.write("\n" + json.dumps({"test": request.node.name, **rounded}) + "\n")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Not a line for each of the many transfers that fail, on purpose."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@dataclass
class Remote:
    """A P in a process of its own."""

    process: TargetProcess
    address: str


@pytest.fixture(scope="module", params=ways())
def way(request: pytest.FixtureRequest) -> Way:
    assert isinstance(request.param, Way)
    return request.param


@pytest.fixture(scope="module")
def prefill(way: Way) -> Iterator[Remote]:
    """Survives all tests."""
    process = TargetProcess(PrefillPeer, way.child_env)
    yield Remote(process, process.start(way.settings, way.prefill))
    process.stop()


@pytest.fixture
def decode(way: Way) -> Iterator[DecodePeer]:
    peer = DecodePeer()
    peer.start(way.settings, way.decode)
    yield peer
    peer.end()


def after_death(*deaths: Death, within_s: float = DETECTED_S) -> dict[str, float]:
    """Called as soon as the other side has said all that it has to say of them."""
    said_s = time.monotonic()
    gone_s = max(death.wait() for death in deaths)
    assert said_s - gone_s < within_s
    return {"killed_to_gone_s": gone_s - deaths[0].began_s, "gone_to_reported_s": said_s - gone_s}


def transfer(prefill: Remote, decode: DecodePeer, transfer_id: str) -> None:
    """One that must work."""
    prefill.process.offer(transfer_id)
    prefill.process.compute([1, 2], 2 * BLOCK_SIZE + 1, transfer_id)
    decode.receive(prefill.address, [7, 5], 2 * BLOCK_SIZE, transfer_id)
    assert decode.wait_reported([transfer_id], 30.0)[1] == []
    assert decode.wrong([(1, 7), (2, 5)]) == []
    prefill.process.finish([transfer_id], 5.0)


def test_chunks_land_byte_exact_in_shuffled_blocks(
    request: pytest.FixtureRequest, way: Way, prefill: Remote, decode: DecodePeer
) -> None:
    rng = random.Random(1)
    sources = rng.sample(range(way.prefill.num_blocks), 40)
    targets = rng.sample(range(way.decode.num_blocks), 40)
    num_tokens = 40 * BLOCK_SIZE - 2
    prefill.process.offer("chunks")
    decode.receive(prefill.address, targets, num_tokens, "chunks")
    for end in (50, 51, 130, num_tokens + 1):
        prefill.process.compute(sources[: -(-end // BLOCK_SIZE)], end, "chunks", 0.02)
    seconds, invalid = decode.wait_reported(["chunks"], 30.0)
    assert invalid == []
    assert decode.wrong(list(zip(sources, targets, strict=True))) == []
    assert decode.written() == sorted(targets)
    prefill.process.finish(["chunks"], 5.0)
    report(request, seconds=seconds)


def test_d_drops_in_mid_transfer_and_nothing_lands_afterwards(
    request: pytest.FixtureRequest, prefill: Remote, decode: DecodePeer
) -> None:
    prefill.process.offer("dropped")
    decode.receive(prefill.address, [20, 21, 22], 3 * BLOCK_SIZE - 2, "dropped")
    prefill.process.compute([3], BLOCK_SIZE, "dropped")
    decode.wait_received(1)
    prefill.process.compute([3, 4, 5], 3 * BLOCK_SIZE, "dropped", 0.3)  # the push waits on the GPU
    decode.drop(prefill.address, "dropped")
    seconds, _ = decode.wait_reported(["dropped"], 5.0)
    decode.zero()
    prefill.process.finish(["dropped"], 5.0)
    prefill.process.check()
    assert decode.written() == []
    report(request, dropped_to_reported_s=seconds)


def test_p_killed_between_two_chunks_leaves_what_landed(
    request: pytest.FixtureRequest, way: Way, prefill: Remote, decode: DecodePeer
) -> None:
    process = TargetProcess(PrefillPeer, way.child_env)
    try:
        address = process.start(way.settings, way.prefill)
        process.offer("cut")
        decode.receive(address, [20, 21, 22], 3 * BLOCK_SIZE - 2, "cut")
        process.compute([3], BLOCK_SIZE, "cut")
        decode.wait_received(1)
        if way.prefill.device != "cpu":  # where nothing is ever between computed and sent
            process.compute([3, 4, 5], 3 * BLOCK_SIZE, "cut", 2.0)
        death = process.kill()
        _, invalid = decode.wait_reported(["cut"], GONE_S)
        figures = after_death(death)
        assert invalid == [21, 22]
        assert decode.wrong([(3, 20)]) == []
    finally:
        process.stop()
    transfer(prefill, decode, "after the cut")
    report(request, **figures)


def test_p_killed_while_many_pushes_run(
    request: pytest.FixtureRequest, way: Way, prefill: Remote, decode: DecodePeer
) -> None:
    process = TargetProcess(PrefillPeer, way.child_env)
    try:
        address = process.start(way.settings, way.prefill)
        process.flood("flood", FLOOD)
        decode.flood(address, "flood", FLOOD)
        decode.wait_received(1)
        death = process.kill()
        _, invalid = decode.wait_reported(flood_ids("flood", FLOOD), GONE_S)
        figures = after_death(death)
        assert invalid, "all was sent before the kill"
        last = way.prefill.num_blocks - 1
        assert decode.wrong([(last - block, block) for block in range(last + 1) if block not in invalid]) == []
        decode.zero()
        time.sleep(0.3)
        assert decode.written() == []
    finally:
        process.stop()
    transfer(prefill, decode, "after the flood")
    asked_mib = FLOOD * way.prefill.num_blocks
    report(request, **figures, landed_mib=decode.received_bytes() >> 20, asked_mib=asked_mib)


def test_p_stopped_in_mid_transfer_can_write_no_more(
    request: pytest.FixtureRequest, way: Way, prefill: Remote, decode: DecodePeer
) -> None:
    prefill.process.flood("stopped", FLOOD)
    prefill.process.offer("slow")
    prefill.process.compute([3], BLOCK_SIZE, "slow")
    decode.receive(prefill.address, [20, 21, 22], 3 * BLOCK_SIZE - 2, "slow")
    decode.flood(prefill.address, "stopped", FLOOD)
    decode.wait_received(1)
    prefill.process.signal(signal.SIGSTOP)
    try:
        seconds, _ = decode.wait_reported([*flood_ids("stopped", FLOOD), "slow"], way.settings.peer_timeout_s + 4.0)
        decode.zero()  # the blocks are used again
        time.sleep(0.3)
        assert decode.written() == [], "what was on its way when P was stopped"
    finally:
        prefill.process.signal(signal.SIGCONT)
    prefill.process.compute([3, 4, 5], 3 * BLOCK_SIZE, "slow")
    time.sleep(1.0)
    prefill.process.check()
    assert decode.written() == [], "what P began after it was woken"
    transfer(prefill, decode, "after the stop")  # D connects anew, so P frees what the old connection waited for
    prefill.process.finish([*flood_ids("stopped", FLOOD), "slow"], way.settings.lease_s + 5.0)
    report(request, stopped_to_reported_s=seconds)


def test_d_killed_in_mid_transfer_frees_ps_blocks(request: pytest.FixtureRequest, way: Way) -> None:
    here = PrefillPeer()
    address = here.start(way.settings, way.prefill)
    first, second = TargetProcess(DecodePeer, way.child_env), TargetProcess(DecodePeer, way.child_env)
    try:
        first.start(way.settings, way.decode)
        second.start(way.settings, way.decode)
        here.flood("orphan", FLOOD)
        first.flood(address, "orphan", FLOOD)
        deadline_s = time.monotonic() + 30.0
        while not here.sent_bytes():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        sent_mib = here.sent_bytes() >> 20
        assert sent_mib < FLOOD * way.prefill.num_blocks, "all was sent before the kill"
        death = first.kill()
        here.finish(flood_ids("orphan", FLOOD), GONE_S)
        figures = after_death(death)
        here.check()
        here.offer("next")
        here.compute([1, 2], 2 * BLOCK_SIZE + 1, "next")
        second.receive(address, [7, 5], 2 * BLOCK_SIZE, "next")
        assert second.wait_reported(["next"], 30.0)[1] == []
        assert second.wrong([(1, 7), (2, 5)]) == []
        here.finish(["next"], 5.0)
        here.check()
    finally:
        first.stop()
        second.stop()
        here.end()
    report(request, **figures, sent_mib=sent_mib)


def test_many_kills_of_p_leave_nothing_in_d(request: pytest.FixtureRequest, way: Way, decode: DecodePeer) -> None:
    """Several at a time. The first wave warms up: it is not counted."""
    started_s, count = time.monotonic(), 16
    wave, slowest_s = start_wave(way), 0.0
    before, rss_before, links_before = footprint(), resident_mib(), open_links()
    try:
        for number in range(way.num_kills // way.wave + 1):
            seconds = kill_wave(way, decode, wave, f"wave{number}-", count)
            wave = []
            if number == 0:
                before, rss_before, links_before = settled(), resident_mib(), open_links()
            if number < way.num_kills // way.wave:
                wave = start_wave(way)
            slowest_s = max(slowest_s, seconds)
    finally:
        for process in wave:
            process.stop()
    after, rss_after, links_after = settled(), resident_mib(), open_links()
    decode.check()
    report(
        request,
        kills=way.num_kills,
        seconds=time.monotonic() - started_s,
        slowest_gone_to_reported_s=slowest_s,
        descriptors=(before[0], after[0]),
        more_of=dict(links_after - links_before),
        arenas=(before[1], after[1]),
        free_gpu_mib=(before[2], after[2]),
        resident_mib=(rss_before, rss_after),
    )
    if way.child_env:  # NCCL by sockets keeps some of those that it aborts (docs/LOG.md)
        assert 0 <= after[0] - before[0] <= 2 * way.num_kills
        assert after[1] == before[1]
    else:
        assert after[:2] == before[:2]
    slack_mib = 16 if way.transport == "nccl" else 0  # NCCL's pools
    assert before[2] - after[2] < way.num_kills / 4 + slack_mib, "GPU memory: not even 1 MiB in four kills"


def start_wave(way: Way) -> list[TargetProcess]:
    return [TargetProcess(PrefillPeer, way.child_env) for _ in range(way.wave)]


def kill_wave(way: Way, decode: DecodePeer, wave: list[TargetProcess], prefix: str, count: int) -> float:
    """Seconds from the end of the last P to D's word of the last transfer."""
    try:
        for process in wave:
            process.begin("start", way.settings, way.prefill)
        addresses = [process.result("start") for process in wave]
        prefixes = [f"{prefix}{index}-" for index in range(len(wave))]
        for process, address, mine in zip(wave, addresses, prefixes, strict=True):
            transfer(Remote(process, address), decode, f"{mine}first")  # from now on D watches this process
        for process, mine in zip(wave, prefixes, strict=True):
            process.flood(mine, count)
        received = decode.received_bytes()
        for address, mine in zip(addresses, prefixes, strict=True):
            decode.flood(address, mine, count)
        decode.wait_received(received + 1)
        deaths = [process.kill() for process in wave]
        decode.wait_reported([one for mine in prefixes for one in flood_ids(mine, count)], GONE_S)
        in_series = len(deaths) if way.transport == "nccl" else 1  # NCCL aborts one after the other
        return after_death(*deaths, within_s=DETECTED_S * in_series)["gone_to_reported_s"]
    finally:
        for process in wave:
            process.stop()


def settled() -> tuple[int, int, int]:
    """The footprint once it is the same for a second: what was killed is gone, what was closed is closed."""
    last, since_s = footprint(), time.monotonic()
    while time.monotonic() - since_s < 1.0:
        time.sleep(0.1)
        if (now := footprint()) != last:
            last, since_s = now, time.monotonic()
    return last


def open_links() -> Counter[str]:
    """What this process's descriptors are, without their numbers."""
    found: Counter[str] = Counter()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[re.sub(r"\d+", "", str(path.readlink()))] += 1
    return found


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
