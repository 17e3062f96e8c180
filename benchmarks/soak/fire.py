"""Faults, done: kills and stops instances by the schedule, and counts what it did. Nothing stays stopped."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.soak.phases import STOP_S, Fault
from benchmarks.soak.service import Service, kill, send_signal

from twolane.launch.state import ServiceState

ROLES = {"P": "prefill", "D": "decode"}


class Fire:
    """State: what was injected, by kind. `before_kill` sees an instance a last time."""

    def __init__(
        self, service: Service, seed: int, before_kill: Callable[[ServiceState], None], spare_last: bool
    ) -> None:
        self.injected: Counter[str] = Counter()
        self._service = service
        self._rng = random.Random(seed)
        self._before_kill = before_kill
        self._least_to_kill = 2 if spare_last else 1

    async def run(self, faults: list[Fault]) -> None:
        """Returns when all of them are done; cancel it to end it earlier."""
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, started_s + fault.at_s - time.monotonic()))
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        action, role = fault.kind.split()
        ready = self._service.ready(ROLES[role])
        if len(ready) < (self._least_to_kill if action == "kill" else 1):
            self.injected[f"left out: {len(ready)} {role} ready to {action}"] += 1
            return
        victim = self._rng.choice(ready)
        self.injected[fault.kind] += 1
        if action == "stop":
            await self._stop(victim)
        else:
            await asyncio.to_thread(self._kill, victim)

    def _kill(self, victim: ServiceState) -> None:
        self._before_kill(victim)
        kill(victim)

    async def _stop(self, victim: ServiceState) -> None:
        try:
            send_signal(victim.members, signal.SIGSTOP)
            await asyncio.sleep(STOP_S)
        finally:
            send_signal(victim.members, signal.SIGCONT)
