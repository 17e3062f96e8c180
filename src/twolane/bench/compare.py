"""`twolane bench --compare`: the same seeded load on plain instances and on the two lanes, in alternation.

Decisions are sweep.py's, state is the journal's; this starts sides, asks, and stops when all is done or time is up.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import zlib
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from twolane.bench import options, power, sweep
from twolane.bench.client import Sample, quiet_collector, run_at_times, run_in_turn
from twolane.bench.goodput import Objective
from twolane.bench.journal import Idle, Journal, Measured, Note, Objectives, Started, StepEnd, request_line
from twolane.bench.options import Asked
from twolane.bench.progress import Bar
from twolane.bench.service import Interrupt, started
from twolane.bench.sweep import Pace, Schedule, Side, Step
from twolane.bench.verdict import NAMES, in_words, number, p99s
from twolane.bench.workload import Ask, one_at_a_time, poisson
from twolane.config import Settings
from twolane.errors import StartError, TwoLaneError
from twolane.launch import probes
from twolane.launch.firstlight import sources_of
from twolane.launch.plan import Plan
from twolane.launch.state import ServiceState
from twolane.power import PowerRecorder

NUM_IDLE = 3  # requests of the idle measurement
NUM_WARM_UPS = 2  # rounds of requests, as many at once as there are instances, before it
STOP_RESERVE_S = 20.0  # of the budget, to stop what runs and to write the report; a tenth of a small one
SETTLE_S = 15.0  # until what timed out is gone from the instances
WARM_UP_TIMEOUT_S = 300.0
IDLE_ROUND = -1


@dataclass(frozen=True)
class Grounds:
    """What a comparison stands on. `together`: both sides may be up at once. `end_s` (monotonic): all is stopped then.

    `start_s`: how long a start usually takes.
    """

    asked: Asked
    plans: dict[Side, tuple[Settings, Plan]]
    together: bool
    end_s: float
    start_s: float


class Comparison:
    """One run of the command. Owns which sides are up, and adds to the journal."""

    def __init__(self, grounds: Grounds, journal: Journal, bar: Bar, interrupt: Interrupt) -> None:
        reserve_s = min(STOP_RESERVE_S, (grounds.end_s - time.monotonic()) / 10)
        self._asked = grounds.asked
        self._grounds = grounds
        self._journal = journal
        self._bar = bar
        self._interrupt = interrupt
        self._end_s = grounds.end_s - reserve_s
        self._up: dict[Side, ExitStack] = {}

    def run(self) -> None:
        """Returns when all is measured or the budget is spent, with nothing of it running any more.

        Whatever it raises (KeyboardInterrupt too), the journal has what was measured.
        """
        try:
            while (step := sweep.next_step(self._schedule(), self._measured.done())) and self._advance(step):
                self._bar.left(self._left_s())
        finally:
            self._stop_all()

    def _advance(self, step: Step) -> bool:
        """Does what comes first on the way to this step: start its side, or measure it. False: no time for it."""
        self._interrupt.check()
        try:
            if step.side not in self._up:
                self._begin(step.side)
            else:
                self._measure(step)
        except _BudgetSpent:
            self._journal.add(Note("the budget was spent before everything was measured"))
            return False
        except TwoLaneError as error:
            self._give_up(step.side, str(error))
        return True

    @property
    def _measured(self) -> Measured:
        return self._journal.measured

    @property
    def _objective(self) -> Objective:
        assert self._measured.objective is not None
        return self._measured.objective

    def _baseline(self) -> Idle | None:
        """The idle figures that all is derived from: the plain instances', if there are any."""
        return next((self._measured.idle[side] for side in sweep.SIDES if side in self._measured.idle), None)

    def _schedule(self) -> Schedule:
        able = tuple(side for side in sweep.SIDES if side not in self._measured.failed)
        return options.schedule_of(self._asked, self._baseline(), able, self._grounds.together)

    def _time_left_s(self) -> float:
        return self._end_s - time.monotonic()

    def _pace(self) -> Pace:
        took_s = [line.took_s for line in self._measured.starts]
        return options.pace_of(self._asked, self._baseline(), max(took_s, default=self._grounds.start_s))

    def _left_s(self) -> float:
        steps = sweep.remaining(self._schedule(), self._measured.done())
        return min(self._time_left_s(), sweep.left_s(steps, self._pace(), self._up, self._grounds.together))

    # --- sides --------------------------------------------------------------------------------------------------------

    def _begin(self, side: Side) -> None:
        """Starts it, warms it up, and asks it one by one if that wasn't done yet. Ends the other, if both don't fit."""
        if not self._grounds.together:
            self._stop_all()
        if self._time_left_s() < self._pace().start_s:
            raise _BudgetSpent
        self._bar.say(f"starting {NAMES[side]}")
        settings, plan = self._grounds.plans[side]
        began_s = time.monotonic()
        stack = ExitStack()
        self._up[side] = stack
        stack.enter_context(started(plan, settings, partial(self._watch, side)))
        took_s = round(time.monotonic() - began_s, 1)
        self._journal.add(Started(side, took_s, [list(spec.argv) for spec in plan.services]))
        self._interrupt.run(self._warm_up(side))

    def _watch(self, side: Side, services: list[ServiceState]) -> None:
        self._interrupt.check()
        self._bar.services(NAMES[side], services)
        if self._time_left_s() <= 0:
            raise _BudgetSpent

    def _stop_all(self) -> None:
        for side in list(self._up):
            self._bar.say(f"stopping {NAMES[side]}")
            self._up.pop(side).close()

    def _give_up(self, side: Side, why: str) -> None:
        self._bar.say(f"{NAMES[side]}: {why}")
        self._journal.add(Note(f"{NAMES[side]} could not be measured further: {why}", failed=side))
        if side in self._up:
            self._up.pop(side).close()

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _warm_up(self, side: Side) -> None:
        """The first idle figures give the objective what isn't given."""
        plan = self._grounds.plans[side][1]
        for turn in range(NUM_WARM_UPS):
            asks = self._asks(f"warm-up {len(self._measured.starts)} {turn}", len(plan.instances()))
            await self._within_budget(run_at_times(*self._where(side), asks, WARM_UP_TIMEOUT_S))
        if side in self._measured.idle:
            return
        samples = await self._within_budget(
            run_in_turn(*self._where(side), self._asks(f"idle {side}", NUM_IDLE), WARM_UP_TIMEOUT_S)
        )
        for sample in samples:
            self._journal.add(request_line(Step(side, IDLE_ROUND, 0.0), sample))
        self._journal.add(idle_of(side, samples))
        if self._measured.objective is None:
            baseline = self._baseline()
            assert baseline is not None
            self._journal.add(Objectives(options.objective_of(self._asked, baseline)))
            self._bar.say(f"objective: {in_words(self._objective)}")

    async def _within_budget(self, asking: Awaitable[list[Sample]]) -> list[Sample]:
        """A step that takes longer than the budget allows was cut, and doesn't count."""
        try:
            async with asyncio.timeout(max(0.0, self._time_left_s())):
                return await asking
        except TimeoutError:
            raise _BudgetSpent from None

    def _where(self, side: Side) -> tuple[str, str]:
        plan = self._grounds.plans[side][1]
        return plan.proxy_address, plan.model.names[0]

    def _asks(self, part: str, count: int) -> list[Ask]:
        """No prompt comes twice, so no prefix cache helps."""
        asked = self._asked
        return one_at_a_time(seed_of(asked.seed, part), count, asked.input_len, asked.output_len)

    def _measure(self, step: Step) -> None:
        """The same requests at the same times for both sides."""
        asked = self._asked
        count = sweep.num_requests(step.rate, asked.step_s, asked.num_prompts)
        seed = seed_of(asked.seed, f"round {step.round} rate {step.rate}")
        asks = poisson(seed, count, asked.input_len, asked.output_len, step.rate)
        timeout_s = options.timeout_s(asked, self._objective)
        if self._time_left_s() < asks[-1].at_s + self._pace().tail_s:
            raise _BudgetSpent
        self._bar.say(f"round {step.round + 1}: {NAMES[step.side]}, {step.rate:g} requests/s")
        with quiet_collector():
            self._interrupt.run(self._step(step, asks, timeout_s))

    async def _step(self, step: Step, asks: list[Ask], timeout_s: float) -> None:
        plan = self._grounds.plans[step.side][1]
        before = await asyncio.to_thread(counters, plan)
        with PowerRecorder() as recorder:
            began_s = time.monotonic()
            asking = run_at_times(
                *self._where(step.side), asks, timeout_s, lambda sample: self._journal.add(request_line(step, sample))
            )
            samples = await self._within_budget(asking)
            ended_s = time.monotonic()
        await settle(plan)
        proxy = {name: value - before.get(name, 0) for name, value in (await asyncio.to_thread(counters, plan)).items()}
        lanes = power.lanes_by_gpu(plan.instances(), plain=step.side == "aggregated")
        watts = power.drawn(recorder.series(), lanes, began_s, ended_s)
        self._journal.add(StepEnd(step, began_s, ended_s, len(samples), proxy, watts))
        self._tell(step)
        if all(sample.error for sample in samples):
            raise StartError(f"every request failed at {step.rate:g} requests/s: {samples[0].error}")

    def _tell(self, step: Step) -> None:
        figures = self._measured.figures[step]
        failed = f", {figures.failed} failed" if figures.failed else ""
        times = ", ".join(f"{name} p99 {number(ms)} ms" for name, ms in p99s(figures).items())
        self._bar.say(f"  {figures.good} of {figures.requests} within the objective{failed}; {times}")


class _BudgetSpent(Exception):  # noqa: N818 - no error
    """There is no time for what would come next."""


def seed_of(seed: int, part: str) -> int:
    return zlib.crc32(f"{seed} {part}".encode())


def idle_of(side: Side, samples: Sequence[Sample]) -> Idle:
    """StartError if a request failed: then there is nothing to measure."""
    if errors := [sample.error for sample in samples if sample.error]:
        raise StartError(f"a request failed while nobody else asked: {errors[0]}")
    gaps_s = [gap_s for sample in samples for gap_s in sample.gaps_s]
    times_s = (
        statistics.median(sample.ttft_s for sample in samples),
        statistics.median(gaps_s) if gaps_s else 0.0,
        statistics.median(sample.event_s[-1] - sample.sent_s for sample in samples),
    )
    return Idle(side, *(round(1000 * seconds, 2) for seconds in times_s))


def counters(plan: Plan) -> dict[str, int]:
    """What the proxy and the decode instances have counted: legs that failed (each is tried elsewhere), prompts that D
    computed though there are P, and prompt tokens on D by where they came from. Blocks."""
    stats = probes.get_json(plan.proxy_address, "/stats") or {}
    found = {"failed_legs": sum(int(entry.get("failures", 0)) for entry in stats.get("instances", ()))}
    found |= {f"alone_{why}": int(count) for why, count in stats.get("decode_alone", {}).items()}
    if any(spec.role == "prefill" for spec in plan.services):
        sources = sources_of([spec.address for spec in plan.services if spec.role == "decode"])
        found["moved_tokens"] = sources.get("external_kv_transfer", 0)
        found["computed_tokens"] = sources.get("local_compute", 0)
    return found


async def settle(plan: Plan) -> None:
    """Until no request is at an instance any more, so that a time-out's rest isn't done in the next step's time."""
    deadline_s = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline_s:
        known = await asyncio.to_thread(probes.instances, plan.proxy_address)
        if known is not None and not any(entry.get("in_flight") for entry in known):
            return
        await asyncio.sleep(0.2)
