"""Follows a service through a phase: sums its counters over restarts, and says what its processes hold."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.soak import watch
from benchmarks.soak.judge import Footprint, Totals
from benchmarks.soak.service import Service

from twolane.launch.process import shared_memory
from twolane.launch.state import ServiceState

PREEMPTIONS = "vllm:num_preemptions_total"
LOOK_EVERY_S = 3.0
IDLE_POLL_S = 0.5


class Observer:
    """State: the sums, and every segment in /dev/shm that was seen mapped."""

    def __init__(self, service: Service) -> None:
        self.totals = Totals()
        self.segments: set[str] = set()
        self.looks = 0
        self.looks_waiting_for_blocks = 0  # D had requests waiting, and too few free blocks for the next
        self._service = service

    async def run(self) -> None:
        """Never returns."""
        while True:
            await asyncio.to_thread(self.look_at_all)
            await asyncio.sleep(LOOK_EVERY_S)

    def look_at_all(self) -> None:
        for role in ("prefill", "decode"):
            for state in self._service.ready(role):
                self.look(state)

    def look(self, state: ServiceState) -> None:
        samples = watch.metrics(self._service.specs[state.name].address)
        counters = watch.counters(samples)
        if PREEMPTIONS in counters:
            counters[f"{state.role}: {PREEMPTIONS}"] = counters[PREEMPTIONS]
        self.totals.add(state.pid, counters)
        self.segments |= shared_memory(state.members)
        if state.role == "decode" and samples:
            self.looks += 1
            self.looks_waiting_for_blocks += samples.get(watch.WAITING_FOR_BLOCKS, 0.0) > 0

    async def until_idle(self, deadline_s: float) -> tuple[float, dict[str, int]]:
        """Seconds until all instances run, serve nothing and hold no block; and what each still holds after that."""
        started_s = time.monotonic()
        while True:
            held = await asyncio.to_thread(self._held)
            waited_s = time.monotonic() - started_s
            if not held or waited_s > deadline_s:
                return waited_s, held
            await asyncio.sleep(IDLE_POLL_S)

    def _held(self) -> dict[str, int]:
        """Blocks by instance, of those that aren't idle; -1 for one that doesn't answer."""
        samples = {spec.name: watch.metrics(spec.address) for spec in self._service.plan.instances()}
        return {
            name: watch.used_blocks(sample) if sample else -1
            for name, sample in samples.items()
            if not watch.is_idle(sample)
        }

    def footprints(self) -> dict[int, Footprint]:
        """Of every process of the service, the supervisor too."""
        named = [(state.name, member.pid) for state in self._service.states() for member in state.members]
        if supervisor := self._service.supervisor:
            named.append(("supervisor", supervisor.pid))
        found = {pid: watch.footprint(name, pid) for name, pid in named}
        return {pid: footprint for pid, footprint in found.items() if footprint is not None}

    def leftover_segments(self) -> list[str]:
        """After the end of the service."""
        return sorted(segment for segment in self.segments if Path(segment).exists())
