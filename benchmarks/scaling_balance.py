"""What several proxies' separate views of load cost in balance, by simulation.

The proxies' own code chooses (policy.Router, pool.Instance), and the instances tell their load at the registrar's pace
and by its rule; time, P and D are simulated, from event to event. P computes prompts one after the other, at a constant
rate. D takes a request when it has blocks for it, first come first served, and gives it its tokens at a constant rate
once P is through. Each request comes through any of the proxies; all of them hear all that the instances tell.

A proxy knows its own requests to the moment and others' by what was told, up to 3 s ago (0.5 s where much has changed),
and P's queue it knows in requests, not in tokens. That is what several proxies pay for.

    python -m benchmarks.scaling_balance                    4P4D, 1 to 8 proxies, 12 seeds: about a minute
    python -m benchmarks.scaling_balance --seeds 3 --load 0.8

The last line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from time import monotonic

from twolane.config import ProxySettings
from twolane.connector.register import changed_much
from twolane.protocol import REGISTER_EVERY_S, Load, Role
from twolane.proxy.policy import Ask, Router, Tried
from twolane.proxy.pool import Instance, State, Ticket

PROMPTS = (200, 200, 400, 800, 6000)  # tokens, each as likely
OUTPUT = (50, 600)  # tokens, even
PREFILL_TOKENS_PER_S = 50_000.0
ITL_S = 0.010
BLOCK_SIZE = 16
NUM_BLOCKS = 10_000  # of each instance
LOOK_EVERY_S = 0.1  # so often an instance compares its load with what it told last
SOONEST_S = 0.5  # between two words of one instance: register._SOONEST_S
SPENT = sum(PROMPTS) / len(PROMPTS) / PREFILL_TOKENS_PER_S  # seconds of a P a request


@dataclass
class Request:
    num_tokens: int
    num_output: int
    came_at: float
    tickets: list[Ticket]  # P's and D's
    on_p_s: float = 0.0  # how long it waited for its turn
    prefilled_at: float = -1.0
    has_blocks_at: float = -1.0

    @property
    def num_blocks(self) -> int:
        """On D: while it is there, half of its answer is, on average."""
        return -(-(self.num_tokens + self.num_output // 2) // BLOCK_SIZE)


@dataclass
class Server:
    """A P or D, and how each proxy sees it."""

    views: list[Instance]
    running: set[int] = field(default_factory=set)  # by id
    queue: deque[Request] = field(default_factory=deque)
    used_blocks: int = 0
    free_at: float = 0.0  # P: when all that is queued is computed
    told: Load | None = None
    next_word_at: float = 0.0
    soonest_at: float = 0.0

    def look(self, now: float) -> None:
        load = Load(NUM_BLOCKS - self.used_blocks, NUM_BLOCKS, BLOCK_SIZE, len(self.running), len(self.queue))
        if now >= self.next_word_at or (now >= self.soonest_at and changed_much(self.told, load)):
            for view in self.views:
                view.told(load, now)
            self.told, self.next_word_at, self.soonest_at = load, now + REGISTER_EVERY_S, now + SOONEST_S


class World:
    """Owns the clock and what happens next."""

    def __init__(self, seed: int, num_proxies: int, num_each: int, load: float, telling: bool) -> None:
        self._random = random.Random(seed)
        self._routers = [Router(ProxySettings()) for _ in range(num_proxies)]
        self._choices = random.Random(seed + 1)  # of a proxy: apart, so that all see the same requests
        self._prefills = [_server("P", number, num_proxies) for number in range(num_each)]
        self._decodes = [_server("D", number, num_proxies) for number in range(num_each)]
        self._of = {view: server for server in self._prefills + self._decodes for view in server.views}
        self._rate = load * num_each / SPENT  # requests a second
        self._telling = telling
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self.now = 0.0
        self.ended: list[Request] = []

    def run(self, seconds: float) -> list[Request]:
        """Those that came after the first tenth."""
        self._after(0.0, self._comes)
        for number, server in enumerate(self._prefills + self._decodes):
            server.next_word_at = number * REGISTER_EVERY_S / 8  # not all at once
            self._after(0.0, partial(self._looks, server))
        while self._events and self._events[0][0] < seconds:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return [request for request in self.ended if request.came_at > seconds / 10]

    def _after(self, seconds: float, happens: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + seconds, self._num_events, happens))

    def _looks(self, server: Server) -> None:
        if self._telling:
            server.look(self.now)
            self._after(LOOK_EVERY_S, partial(self._looks, server))

    def _comes(self) -> None:
        rng = self._random
        num_tokens, num_output = rng.choice(PROMPTS), rng.randint(*OUTPUT)
        proxy = self._choices.randrange(len(self._routers))
        prefills, decodes = ([s.views[proxy] for s in servers] for servers in (self._prefills, self._decodes))
        route = self._routers[proxy].route(prefills, decodes, Tried(), Ask(num_tokens=num_tokens))
        assert route is not None
        assert route.prefill is not None
        tickets = [Ticket(route.prefill, num_tokens), Ticket(route.decode, num_tokens)]
        request = Request(num_tokens, num_output, self.now, tickets)
        self._prefill(self._of[route.prefill], request)
        self._of[route.decode].queue.append(request)
        self._admit(self._of[route.decode])
        self._after(rng.expovariate(self._rate), self._comes)

    def _prefill(self, p: Server, request: Request) -> None:
        request.on_p_s = max(0.0, p.free_at - self.now)
        p.free_at = max(p.free_at, self.now) + request.num_tokens / PREFILL_TOKENS_PER_S
        p.queue.append(request)
        self._after(p.free_at - self.now, partial(self._prefilled, p))

    def _prefilled(self, p: Server) -> None:
        request = p.queue.popleft()
        request.tickets[0].give_back()
        request.prefilled_at = self.now
        self._begin(request)

    def _admit(self, d: Server) -> None:
        while d.queue and d.queue[0].num_blocks <= NUM_BLOCKS - d.used_blocks:
            request = d.queue.popleft()
            d.used_blocks += request.num_blocks
            d.running.add(id(request))
            request.has_blocks_at = self.now
            self._begin(request)

    def _begin(self, request: Request) -> None:
        """As soon as P is through and D has blocks."""
        if request.prefilled_at >= 0 and request.has_blocks_at >= 0:
            self._after(request.num_output * ITL_S, partial(self._ends, request))

    def _ends(self, request: Request) -> None:
        d = self._of[request.tickets[1].instance]
        d.running.discard(id(request))
        d.used_blocks -= request.num_blocks
        request.tickets[1].give_back()
        self.ended.append(request)
        self._admit(d)


def _server(role: Role, number: int, num_proxies: int) -> Server:
    views = [
        Instance(role, f"{role}:{number}", f"z:{number}", "twolane", "", State.READY, 0.0, 0.0, 0.0)
        for _ in range(num_proxies)
    ]
    return Server(views)


def waits_ms(requests: list[Request]) -> dict[str, float]:
    """For P's turn; for D's blocks beyond P's end; from coming to what could be the first token."""
    on_p = [r.on_p_s * 1e3 for r in requests]
    on_d = [max(0.0, r.has_blocks_at - r.prefilled_at) * 1e3 for r in requests]
    first = sorted((max(r.prefilled_at, r.has_blocks_at) - r.came_at) * 1e3 for r in requests)
    return {
        "p_mean": mean(on_p),
        "d_mean": mean(on_d),
        "first_mean": mean(first),
        "first_p99": first[int(0.99 * len(first))],
    }


def simulate(
    seed: int, num_proxies: int, *, num_each: int = 4, load: float = 0.7, seconds: float = 40.0, telling: bool = True
) -> dict[str, float]:
    """`load`: the share of time that P computes."""
    return waits_ms(World(seed, num_proxies, num_each, load, telling).run(seconds))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", default="1,2,4,8")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--each", type=int, default=4, help="how many P, and how many D")
    parser.add_argument("--load", type=float, default=0.7, help="the share of time that P computes")
    parser.add_argument("--seconds", type=float, default=40.0, help="simulated")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    setups = [(int(num), True) for num in args.proxies.split(",")]
    setups += [(num, False) for num, _ in setups if num > 1]
    got: dict[str, list[dict[str, float]]] = {}
    began_at = monotonic()
    for num, telling in setups:
        name = f"{num} proxies" + ("" if telling else ", instances tell nothing")
        got[name] = [
            simulate(seed, num, num_each=args.each, load=args.load, seconds=args.seconds, telling=telling)
            for seed in range(args.seeds)
        ]
        print(f"{name}: {summary(got[name], got['1 proxies'])} ({monotonic() - began_at:.0f} s)", flush=True)
    print(json.dumps({"load": args.load, "each": args.each, "seconds": args.seconds, "waits_ms": got}))


def summary(runs: list[dict[str, float]], alone: list[dict[str, float]]) -> str:
    """Medians over the seeds, and against one proxy, seed by seed: median, lowest, highest."""
    parts = []
    for what in ("p_mean", "d_mean", "first_mean", "first_p99"):
        ratios = [run[what] / one[what] for run, one in zip(runs, alone, strict=True) if one[what]]
        times = f" x{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        parts.append(f"{what} {median(run[what] for run in runs):.1f} ms{times}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
