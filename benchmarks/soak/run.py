"""One phase: starts a service, puts it under load and faults, and hands back what there is to count."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.soak import hang
from benchmarks.soak.beside import beside
from benchmarks.soak.client import ask, new_client
from benchmarks.soak.fire import Fire
from benchmarks.soak.judge import Footprint, Outcome, Reference, growth, judge
from benchmarks.soak.observer import Observer
from benchmarks.soak.phases import CLIENT_DEADLINE_S, LEASE_S, Phase, fault_schedule
from benchmarks.soak.service import Service
from benchmarks.soak.workload import Request

WARM_UP_SHARE = 0.2
ARRIVALS_SHARE = 0.7  # of the phase's time, in which all requests arrive if the service keeps up
BURST = 6  # requests that arrive at once, so that a queue builds up
BACK_OFF_S = 1.0
ALL_BACK_S = 150.0  # for what was killed last
IDLE_S = LEASE_S + 10.0
CLOSED_S = 6.0  # after which the proxy's and vLLM's kept-alive connections are closed
PROGRESS_EVERY_S = 10.0


class PhaseRun:
    """State: the outcomes so far. `stop`: somebody wants an end; the phase then ends early and still reports."""

    def __init__(
        self, phase: Phase, service: Service, prompts: Sequence[list[int]], references: Sequence[Reference], seed: int
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.stop = asyncio.Event()
        self._phase = phase
        self._service = service
        self._prompts = prompts
        self._references = references
        self._seed = seed
        self._observer = Observer(service)
        self._fire = Fire(service, seed, self._observer.look, phase.spare_last)

    async def run(self, requests: list[Request]) -> dict[str, Any]:
        """The phase's part of the report. The caller stops the service, and then asks for `leftover`."""
        started_s = time.monotonic()
        await self._or_stop(asyncio.to_thread(self._service.await_ready))
        if self.stop.is_set():
            await asyncio.to_thread(self._service.stop)  # which ends the wait
        result: dict[str, Any] = {"phase": self._phase.name, "started_after_s": round(time.monotonic() - started_s)}
        if self._phase.hang_rounds:
            self._say("P hangs while D streams")
            patience_s = self._phase.extra["peer_timeout_s"]
            measuring = hang.measure(self._service, self._phase.hang_rounds, self._seed, patience_s)
            result["hang"] = await self._or_stop(measuring)
        num_warm_up = int(len(requests) * WARM_UP_SHARE)
        await self._load(requests[:num_warm_up], self._phase.max_s * WARM_UP_SHARE, with_faults=False)
        await self._or_stop(self._observer.until_idle(IDLE_S))
        before = await self._footprints()
        await self._load(requests[num_warm_up:], self._phase.max_s * (1 - WARM_UP_SHARE), with_faults=True)
        idle_after_s, held = await self._settle()
        result |= self._counts(len(requests), time.monotonic() - started_s)
        result |= {"idle_after_s": round(idle_after_s, 1), "idle_bound_s": IDLE_S, "held_blocks": held}
        result["growth"] = [
            asdict(grown) | {"within_bounds": grown.within_bounds}
            for grown in growth(before, await self._footprints(), self._phase.prefill)
        ]
        return result

    def leftover_segments(self) -> list[str]:
        return self._observer.leftover_segments()

    async def _or_stop(self, work: Any) -> Any:
        """The work's result, or None once somebody wants an end."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for part in (task, stop):
                part.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _load(self, requests: list[Request], max_s: float, with_faults: bool) -> None:
        if self.stop.is_set():
            return
        works = [self._observer.run(), self._tell()]
        if with_faults:
            works.append(self._fire.run(fault_schedule(self._seed, self._phase)))
        async with beside(*works):
            await self._or_stop(self._ask_all(requests, max_s))

    async def _ask_all(self, requests: list[Request], max_s: float) -> None:
        """In bursts spread over the time, so many in flight at most; begins none after `max_s`, but lets them end."""
        gate = asyncio.Semaphore(self._phase.concurrency)
        started_s = time.monotonic()
        every_s = max_s * ARRIVALS_SHARE / max(1, len(requests))
        async with new_client() as client, asyncio.TaskGroup() as group:

            async def one(request: Request) -> None:
                try:
                    prompt = self._prompts[request.prompt]
                    outcome = await ask(client, self._service.plan.proxy_url, self._service.model, request, prompt)
                    self.outcomes.append(outcome)
                    if outcome.end in {"error", "lost"}:
                        await asyncio.sleep(BACK_OFF_S)
                finally:
                    gate.release()

            for index, request in enumerate(requests):
                due_s = started_s + index // BURST * BURST * every_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await gate.acquire()
                if time.monotonic() > started_s + max_s:
                    gate.release()
                    return
                group.create_task(one(request))

    async def _settle(self) -> tuple[float, dict[str, int]]:
        """Waits for what was killed last, then for every block."""
        deadline_s = time.monotonic() + ALL_BACK_S
        while not await asyncio.to_thread(self._service.all_ready) and not self.stop.is_set():
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.5)
        waited_s, held = await self._or_stop(self._observer.until_idle(IDLE_S)) or (0.0, {})
        await asyncio.to_thread(self._observer.look_at_all)
        return waited_s, held

    async def _footprints(self) -> dict[int, Footprint]:
        await self._or_stop(asyncio.sleep(CLOSED_S))
        return self._observer.footprints()

    def _counts(self, num_planned: int, took_s: float) -> dict[str, Any]:
        verdicts = [judge(outcome, self._references[outcome.request.prompt]) for outcome in self.outcomes]
        left = Counter(
            outcome.request.leave.point for outcome in self.outcomes if outcome.end == "left" and outcome.request.leave
        )
        of_note = [
            f"{verdict}: request {outcome.request.number}, prompt {outcome.request.prompt}, "
            f"{len(outcome.tokens)} of {outcome.request.max_tokens} tokens: {outcome.message}"
            for verdict, outcome in zip(verdicts, self.outcomes, strict=True)
            if verdict not in {"right", "left", "error"}
        ]
        messages = Counter(outcome.message for outcome in self.outcomes if outcome.end == "error")
        return {
            "planned": num_planned,
            "requests": len(self.outcomes),
            "took_s": round(took_s),
            "verdicts": dict(Counter(verdicts)),
            "left_at": dict(left),
            "tokens_compared": sum(len(outcome.tokens) for outcome in self.outcomes),
            "error_messages": dict(messages.most_common(8)),
            "of_note": of_note[:20],
            "faults": dict(self._fire.injected),
            "counters": {name: int(value) for name, value in sorted(self._observer.totals.sums.items())},
            "looks": self._observer.looks,
            "looks_waiting_for_blocks": self._observer.looks_waiting_for_blocks,
            "longest_wait_s": round(max((outcome.longest_wait_s for outcome in self.outcomes), default=0.0), 1),
            "longest_request_s": round(max((outcome.total_s for outcome in self.outcomes), default=0.0), 1),
            "deadline_s": CLIENT_DEADLINE_S,
        }

    async def _tell(self) -> None:
        while True:
            ends = Counter(outcome.end for outcome in self.outcomes)
            self._say(f"{len(self.outcomes)} requests {dict(ends)}, faults {dict(self._fire.injected)}")
            await asyncio.sleep(PROGRESS_EVERY_S)

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self._phase.name}: {text}", flush=True)
