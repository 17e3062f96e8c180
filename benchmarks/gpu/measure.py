"""Asks the setups that live at once, in turns. Fills `Results` as it goes; may be cancelled at any time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu.engine import cpu_s, prompt_tokens_by_source, recent_requests
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Part, Record, Results
from benchmarks.gpu.setups import Route, Setup

from twolane.bench.client import Sample, ask_once, quiet_collector
from twolane.bench.workload import Ask, poisson, random_prompt

PAUSE_S = 0.02  # so that what a request leaves to be done isn't done in the next one's time
STATS_EVERY = 20  # turns; the proxy remembers its last 100 requests
# Every part is measured in two passes, for all setups each time: when the budget ends early, each has something of all.
PASSES = 2
SHARE_UNLOADED = (0.35, 0.5)  # of the time left, in each pass; what they don't need, the parts behind them have
SHARE_PUSH = (0.3, 1.0)
PUSH_CONCURRENCY = 4
IDLE_S = 2.0


@dataclass(frozen=True)
class Live:
    """A setup that runs. `prefill`: P's own address, where its throughput is measured; empty: it isn't. `pids`: of its
    services."""

    setup: Setup
    model: str
    routes: tuple[Route, ...]
    proxy: str = ""
    prefill: str = ""
    decode: str = ""
    pids: tuple[int, ...] = ()


class Clock:
    """Says whether another unit of work still fits. A unit is taken to last as long as the longest of its kind."""

    def __init__(self, end_s: float) -> None:
        self._end_s = end_s
        self._longest_s: dict[str, float] = {}

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def part(self, share: float) -> Clock:
        return Clock(time.monotonic() + share * max(0.0, self.left_s))

    async def fits(self, kind: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Does it, if it fits."""
        began_s = time.monotonic()
        if self.left_s <= self._longest_s.get(kind, 0.0):
            return False
        await work()
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), time.monotonic() - began_s)
        return True


class Measurement:
    """One group of setups that live at once."""

    def __init__(self, lives: list[Live], options: Options, results: Results, say: Callable[[str], None]) -> None:
        self._lives = lives
        self._models = {live.setup.name: live.model for live in lives}
        self._routes = [route for live in lives for route in live.routes]
        self._options = options
        self._results = results
        self._say = say
        self._done: Counter[str] = Counter()  # turns of a part

    async def run(self, end_s: float) -> None:
        """Returns by `end_s` (monotonic), give or take; what didn't fit is noted."""
        clock = Clock(end_s)
        try:
            async with asyncio.timeout(max(0.0, clock.left_s)):
                with quiet_collector():
                    await self._all(clock)
        except TimeoutError:
            self._results.note("the budget ended in the middle of a measurement")

    async def _all(self, clock: Clock) -> None:
        options = self._options
        await self._warm_up(clock)
        await self._idle()
        for number in range(PASSES):
            self._say(f"pass {number + 1} of {PASSES}")
            others = options.load_rate or options.push_prompts
            before = await self._sources()
            await self._unloaded(number, clock.part(SHARE_UNLOADED[number]) if others else clock)
            await self._note_sources(before)
            if options.load_rate:
                await self._loaded(number, clock)
            if options.push_prompts:
                await self._push(number, clock.part(SHARE_PUSH[number]))
        self._note_what_is_missing()

    def _turns(self, part: str, wanted: int, number: int) -> Iterator[int]:
        """Of a part, those that are to be done by the end of this pass. Counts them once they are done."""
        while self._done[part] < -(-wanted * (number + 1) // PASSES):
            yield self._done[part]
            self._done[part] += 1

    def _note_what_is_missing(self) -> None:
        options = self._options
        wanted = {"unloaded": options.requests}
        wanted |= {"load": options.load_rounds} if options.load_rate else {}
        wanted |= {"push": options.push_blocks} if options.push_prompts else {}
        units = {"unloaded": "requests a length and route", "load": "rounds a route", "push": "pairs of blocks a setup"}
        for part, count in wanted.items():
            if self._done[part] < count:
                self._results.note(f"{part}: {self._done[part]} of {count} {units[part]} fitted into the budget")

    # --- one request at a time ----------------------------------------------------------------------------------------

    async def _warm_up(self, clock: Clock) -> None:
        """Also what tokens are compared by: ids come back with these alone, since vLLM sends the prompt's along."""
        for turn in range(max(3, self._options.warm_ups)):
            if not await clock.fits("warm-up", partial(self._turn, "warm-up", turn)):
                self._results.note("the budget ended while warming up")
                return
        self._say("warmed up")

    async def _idle(self) -> None:
        """A setup whose threads spin takes cores from the one that is measured."""
        before_s = [cpu_s(live.pids) for live in self._lives]
        await asyncio.sleep(IDLE_S)
        for live, busy_s in zip(self._lives, before_s, strict=True):
            if live.pids:
                self._results.idle_cores[live.setup.name] = round((cpu_s(live.pids) - busy_s) / IDLE_S, 3)
        self._say(f"idle, cores kept busy: {self._results.idle_cores}")

    async def _unloaded(self, number: int, clock: Clock) -> None:
        count = self._options.requests
        for turn in self._turns("unloaded", count, number):
            if not await clock.fits("turn", partial(self._turn, "unloaded", turn)):
                break
            if turn % STATS_EVERY == STATS_EVERY - 1:
                await asyncio.to_thread(self.fetch_records)
                self._say(f"unloaded: {turn + 1} of {count}")
        await asyncio.to_thread(self.fetch_records)

    async def _turn(self, part: Part, turn: int) -> None:
        """The same prompt on every route, who is first changes from turn to turn."""
        for length in self._options.lengths:
            prompt = random_prompt(self._seed(part, turn, length), length)
            for route in rotated(self._routes, turn):
                output = self._options.output_alone or self._options.output
                ask = Ask(0.0, prompt, output, f"{part}-{turn}-{length}", part == "warm-up")
                await self._ask(part, turn, route, ask)
                await asyncio.sleep(PAUSE_S)

    def _seed(self, part: Part, turn: int, length: int) -> int:
        """Another prompt each time: nothing that was computed before helps."""
        parts: tuple[Part, ...] = ("warm-up", "unloaded", "loaded", "push", "push warm-up")
        return ((self._options.seed * len(parts) + parts.index(part)) * 100_000 + turn) * 1_000_000 + length

    async def _ask(self, part: Part, turn: int, route: Route, ask: Ask, address: str = "") -> Sample:
        """The request id gets the route's number, so that it names one request of the run."""
        request_id = f"{ask.request_id}-{route.setup}-{self._routes.index(route)}"
        named = replace(ask, request_id=request_id)
        sample = await ask_once(address or route.address, self._models[route.setup], named, self._options.timeout_s)
        name = route.name if not address else f"{route.setup}: P alone"
        length = len(ask.prompt)
        self._results.records.append(Record(part, route.setup, name, length, turn, request_id, sample))
        return sample

    # --- under load ---------------------------------------------------------------------------------------------------

    async def _loaded(self, number: int, clock: Clock) -> None:
        """One route after the other; where one instance lives, the pairs' Ds alone would say the same once more."""
        has_plain = any(live.setup.kind == "plain" for live in self._lives)
        alone = {route.baseline for route in self._routes} if has_plain else set()
        routes = [route for route in self._routes if route.name not in alone]
        for turn in self._turns("load", self._options.load_rounds, number):
            for route in rotated(routes, turn):
                if not await clock.fits("load", partial(self._load_round, turn, route)):
                    self._results.note(f"load: {route.name} has {turn} of {self._options.load_rounds} rounds (budget)")
                    return
                self._say(f"load: round {turn + 1} of {self._options.load_rounds}, {route.name}")

    async def _load_round(self, turn: int, route: Route) -> None:
        """Each request at its time, whether the earlier ones have ended or not."""
        options = self._options
        seed = self._seed("loaded", turn, options.longest)
        asks = poisson(seed, options.load_requests, options.longest, options.output, options.load_rate)
        began_s = time.monotonic()

        async def wait_and_ask(index: int, ask: Ask) -> None:
            await asyncio.sleep(max(0.0, began_s + ask.at_s - time.monotonic()))
            await self._ask("loaded", turn, route, replace(ask, request_id=f"loaded-{turn}-{index}"))

        async with asyncio.TaskGroup() as group:
            for index, ask in enumerate(asks):
                group.create_task(wait_and_ask(index, ask))

    # --- P's throughput -----------------------------------------------------------------------------------------------

    async def _push(self, number: int, clock: Clock) -> None:
        """Blocks of prompts with and without handoff, alternating; who begins changes from pair to pair."""
        lives = [live for live in self._lives if live.prefill]
        for turn in self._turns("push", self._options.push_blocks if lives else 0, number):
            for live in lives:
                if not await clock.fits(f"push {live.setup.name}", partial(self._push_pair, turn, live)):
                    self._results.note(f"push: {live.setup.name} has {turn} pairs of blocks (budget)")
                    return
            self._say(f"P's throughput: pair {turn + 1} of {self._options.push_blocks}")

    async def _push_pair(self, turn: int, live: Live) -> None:
        if turn == 0:
            for address in ("", live.prefill):
                await self._block("push warm-up", 0, live.routes[0], address, PUSH_CONCURRENCY)
        pair = ["", live.prefill]  # through the proxy with handoff; P itself without
        for address in pair if turn % 2 == 0 else reversed(pair):
            await self._block("push", turn, live.routes[0], address, self._options.push_prompts)

    async def _block(self, part: Part, turn: int, route: Route, address: str, count: int) -> None:
        """Back to back: a few askers, each asks its next as soon as its last is answered."""
        length = self._options.longest
        first = 1000 * turn + (500 if address else 0)
        prompts = deque(random_prompt(self._seed(part, first + index, length), length) for index in range(count))

        async def asker(number: int) -> None:
            while prompts:
                ask = Ask(0.0, prompts.popleft(), 1, f"push-{first}-{number}-{len(prompts)}")
                await self._ask(part, turn, route, ask, address)

        async with asyncio.TaskGroup() as group:
            for number in range(PUSH_CONCURRENCY):
                group.create_task(asker(number))

    # --- what the other sides counted ---------------------------------------------------------------------------------

    def fetch_records(self) -> None:
        """What the proxies remember, which is their last 100 requests. Blocks."""
        for live in self._lives:
            for record in recent_requests(live.proxy) if live.proxy else []:
                self._results.proxied[record["request_id"]] = record

    async def _sources(self) -> dict[str, dict[str, float]]:
        return {
            live.setup.name: await asyncio.to_thread(prompt_tokens_by_source, live.decode)
            for live in self._lives
            if live.decode
        }

    async def _note_sources(self, before: dict[str, dict[str, float]]) -> None:
        for name, after in (await self._sources()).items():
            counts = self._results.received.setdefault(name, {})
            for key, count in after.items():
                counts[key] = counts.get(key, 0.0) + count - before[name].get(key, 0.0)


def rotated(routes: list[Route], turn: int) -> list[Route]:
    first = turn % len(routes)
    return routes[first:] + routes[:first]
