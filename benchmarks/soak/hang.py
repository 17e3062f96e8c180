"""D's streams while P hangs in mid-transfer, beside the same streams undisturbed, in turns.

The physics: P and D have a core each; what D's step waits for is only its own work, unless the connector makes it wait
for P. A hung P computes nothing, so it takes nothing from D either. Counted are the gaps between events of
eight streams.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import time
from typing import Any

import httpx
from benchmarks.soak import watch
from benchmarks.soak.beside import beside
from benchmarks.soak.client import completion, new_client
from benchmarks.soak.phases import MAX_MODEL_LEN
from benchmarks.soak.service import Service, send_signal

from twolane.bench.report import percentile

NUM_STREAMS = 8
WINDOW_S = 10.0
STREAM_TOKENS = 1500
LONG_PROMPT_TOKENS = MAX_MODEL_LEN - 16
RECOVERY_S = 90.0
POLL_S = 0.2
NUM_POLLS = 50
LANDED_BYTES = "twolane_kv_received_bytes_total"
LANDED_TRANSFERS = "twolane_kv_received_transfers_total"


class Gaps:
    """When each stream got an event (monotonic, s)."""

    def __init__(self) -> None:
        self.event_s: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self.begun = asyncio.Event()  # all streams have begun

    def note(self, index: int) -> None:
        self.event_s[index].append(time.monotonic())
        if all(self.event_s):
            self.begun.set()

    def within(self, start_s: float, end_s: float) -> list[float]:
        """Gaps that ended in this window."""
        return [
            after - before
            for events in self.event_s
            for before, after in itertools.pairwise(events)
            if start_s <= after <= end_s
        ]

    def worst(self, start_s: float, end_s: float) -> list[str]:
        """The longest gaps of the first stream, and when in the window they ended."""
        pairs = [(after - before, after - start_s) for before, after in itertools.pairwise(self.event_s[0])]
        within = [pair for pair in pairs if 0 <= pair[1] <= end_s - start_s]
        return [f"{gap_s * 1e3:.0f} ms at {at_s:.1f} s" for gap_s, at_s in sorted(within, reverse=True)[:3]]


async def measure(service: Service, rounds: int, seed: int, patience_s: float) -> dict[str, Any]:
    """Pooled p50 and p99 of both, in ms, and each round's. A round without a hang in mid-transfer isn't counted."""
    rng = random.Random(seed)
    quiet: list[float] = []
    hung: list[float] = []
    until_answered: list[float] = []
    each = []
    for number in range(rounds):
        got = await _round(service, rng, quiet_first=number % 2 == 0)
        each.append(got["row"])
        if got["row"]["in_mid_transfer"]:
            quiet += got["quiet"]
            hung += got["hung"]
            until_answered += got["until_answered"]
    p99 = [percentile(gaps, 0.99) * 1e3 if gaps else 0.0 for gaps in (quiet, hung, until_answered)]
    return {
        "streams": NUM_STREAMS,
        "window_s": WINDOW_S,
        "patience_s": patience_s,
        "rounds": each,
        "gaps_quiet": len(quiet),
        "gaps_hung": len(hung),
        "quiet_p99_ms": round(p99[0], 1),
        "hung_p99_ms": round(p99[1], 1),
        "until_answered_p99_ms": round(p99[2], 1),
        "ratio": round(p99[1] / p99[0], 2) if p99[0] else 0.0,
    }


async def _round(service: Service, rng: random.Random, quiet_first: bool) -> dict[str, Any]:
    gaps = Gaps()
    async with (
        new_client() as client,
        beside(*(_stream(client, service, rng, gaps, index) for index in range(NUM_STREAMS))),
    ):
        await gaps.begun.wait()
        await asyncio.sleep(1.0)
        quiet = await _quiet(gaps) if quiet_first else []
        hang = await _hang(client, service, rng, gaps)
        quiet = quiet or await _quiet(gaps)
    row = {
        "quiet_p99_ms": round(percentile(quiet, 0.99) * 1e3, 1),
        "hung_p99_ms": round(percentile(hang["hung"], 0.99) * 1e3, 1),
        "in_mid_transfer": hang["in_mid_transfer"],
        "worst_hung": hang["worst"],
        "answered_after_s": round(hang["answered_after_s"], 1),
    }
    return {"row": row, "quiet": quiet, **hang}


async def _stream(client: httpx.AsyncClient, service: Service, rng: random.Random, gaps: Gaps, index: int) -> None:
    prompt = [rng.randrange(100, 32000) for _ in range(32)]
    body = completion(service.model, prompt, STREAM_TOKENS, stream=True)
    async with client.stream("POST", f"{service.plan.proxy_url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:]), line
                gaps.note(index)


async def _quiet(gaps: Gaps) -> list[float]:
    start_s = time.monotonic()
    await asyncio.sleep(WINDOW_S)
    return gaps.within(start_s, time.monotonic())


async def _until_some_landed(address: str, before: dict[str, float]) -> None:
    """Or for some seconds; the caller looks again."""
    for _ in range(NUM_POLLS):
        await asyncio.sleep(POLL_S)
        if (await asyncio.to_thread(watch.metrics, address)).get(LANDED_BYTES, 0.0) > before.get(LANDED_BYTES, 0.0):
            return


async def _hang(client: httpx.AsyncClient, service: Service, rng: random.Random, gaps: Gaps) -> dict[str, Any]:
    """A long prompt; P is stopped when some of its chunks have landed and others haven't."""
    (prefill,), (decode,) = service.ready("prefill"), service.ready("decode")
    decode_address = service.specs[decode.name].address
    prompt = [rng.randrange(100, 32000) for _ in range(LONG_PROMPT_TOKENS)]
    before = await asyncio.to_thread(watch.metrics, decode_address)
    body = completion(service.model, prompt, 2)
    asked_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(client.post(f"{service.plan.proxy_url}/v1/completions", json=body))
        try:
            await _until_some_landed(decode_address, before)
            send_signal(prefill.members, signal.SIGSTOP)
            during = await asyncio.to_thread(watch.metrics, decode_address)
            start_s = time.monotonic()
            await asyncio.sleep(WINDOW_S)
            end_s = time.monotonic()
        finally:
            send_signal(prefill.members, signal.SIGCONT)
        async with asyncio.timeout(RECOVERY_S):
            (await asking).raise_for_status()
        answered_s = time.monotonic()

    return {
        "hung": gaps.within(start_s, end_s),
        "worst": gaps.worst(start_s, end_s),
        "until_answered": gaps.within(start_s, answered_s),
        "in_mid_transfer": during.get(LANDED_BYTES, 0.0) > before.get(LANDED_BYTES, 0.0)
        and during.get(LANDED_TRANSFERS) == before.get(LANDED_TRANSFERS),
        "answered_after_s": answered_s - asked_s,
    }
