"""What a prefill/decode proxy costs: ours and three peers, measured in turns in one run.

The physics: every token of every answer goes through the proxy, so its CPU time a token bounds how many streams one
process carries, and the time that it adds to a first byte is added to every TTFT. Instances are mocks that answer at
once, so that nothing but the proxy's own work shows. The proxy has core 0 alone; mocks and load share core 1. CPU time
is user + system time of the proxy's process and its children, from /proc/PID/task/*/schedstat (ns). The sides take
turns of about half a second, a b b a, so that what else the machine does falls on all alike; a ratio is that of two
neighbouring turns, and what is reported is the median of all of them, with quartiles and a 95 % interval (bootstrap).

16-token streams are sent without a pause, one token in each turn of the mock's event loop, so several may arrive
together. The 256 tokens of a long stream come at 10 ms ticks, all streams at the same tick, as from an engine's steps:
every token is a read and a write of its own.

    python -m benchmarks.proxy              the table; makes environments for the peers on its first run
    python -m benchmarks.proxy --before SRC --peers twolane --scrape
                                            ours against ours of another source tree, /metrics read every second
    python -m benchmarks.proxy --before SRC --peers twolane --instructions
                                            by callgrind, which a busy machine doesn't disturb
    python -m benchmarks.proxy --memory     100,000 requests through ours: memory
    python -m benchmarks.proxy --streams    1,000 streams at once through ours

Needs two cores that nobody else uses, but for --instructions: the load average before and after is in the report. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import uvloop
from benchmarks.proxy_instructions import count
from benchmarks.proxy_load import Load, Outcome, run
from benchmarks.proxy_peers import PEERS, TWOLANE, before
from benchmarks.proxy_run import LOAD_CORE, Candidate, candidate

WARM_UP_REQUESTS = 300
# A turn: requests, at once, tokens, ms between two tokens.
TABLE = {
    "16 tokens, 32 at once": (2000, 32, 16, 0.0),
    "16 tokens, 128 at once": (2000, 128, 16, 0.0),
    "256 tokens, 64 at once": (64, 64, 256, 10.0),
}
FIRST_BYTE_REQUESTS = 500
TURNS = 2  # a round
NUM_RESAMPLES = 2000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests; below 1 for a quick look")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="comma-separated names")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twolane/proxy-peers"
    parser.add_argument("--cache", type=Path, default=default, help="where the peers' environments are kept")
    parser.add_argument("--before", type=Path, help="another source tree's src, measured in turns with this one's")
    parser.add_argument("--scrape", action="store_true", help="read the proxy's /metrics every second meanwhile")
    parser.add_argument("--instructions", action="store_true", help="count instructions with valgrind's callgrind")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--streams", action="store_true")
    return parser.parse_args()


async def loaded(load: Load, scrape: bool) -> Outcome:
    """`run`, while somebody reads the proxy's /metrics every second, if so wished."""

    async def scrape_for_ever() -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await reader.read()
            writer.close()
            await asyncio.sleep(1)

    scraper = asyncio.ensure_future(scrape_for_ever()) if scrape else None
    try:
        return await run(load)
    finally:
        if scraper is not None:
            scraper.cancel()


class Measured:
    """Owns all turns' figures and errors, by peer."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.errors: dict[str, list[str]] = {}

    def add(self, peer: str, figures: dict[str, float], errors: list[str]) -> None:
        columns = self.figures.setdefault(peer, {})
        for name, value in figures.items():
            columns.setdefault(name, []).append(value)
        self.errors.setdefault(peer, []).extend(errors)

    def last(self) -> dict[str, dict[str, float]]:
        """The last round's."""
        return {
            peer: {name: round(mean(values[-TURNS:]), 3) for name, values in columns.items()}
            for peer, columns in self.figures.items()
        }


def measure_cpu(made: Candidate, name: str, seed: int, scale: float, scrape: bool) -> tuple[float, Outcome]:
    """CPU ms a request."""
    num_requests, concurrency, max_tokens, pace_ms = TABLE[name]
    load = Load(
        made.ports.http, max(concurrency, int(num_requests * scale)), concurrency, max_tokens, pace_ms, seed=seed
    )
    before_s = made.cpu_s()
    outcome = uvloop.run(loaded(load, scrape))
    spent_s = made.cpu_s() - before_s
    return spent_s / load.num_requests * 1e3, outcome


def first_byte_ms(port: int, seed: int, scale: float) -> tuple[float, Outcome]:
    """p50, one request at a time."""
    outcome = uvloop.run(run(Load(port, max(50, int(FIRST_BYTE_REQUESTS * scale)), 1, 16, seed=seed)))
    return median(outcome.first_byte_s or [float("nan")]) * 1e3, outcome


def measure_first_byte(made: Candidate, seed: int, scale: float) -> tuple[dict[str, float], list[str]]:
    direct, straight = first_byte_ms(made.ports.decode, seed, scale)
    proxied, outcome = first_byte_ms(made.ports.http, seed, scale)
    figures = {"first byte p50 ms": proxied, "first byte p50 over direct ms": proxied - direct}
    return figures, straight.errors + outcome.errors


def measure(made: Candidate, name: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """One turn of one side."""
    if name not in TABLE:
        return measure_first_byte(made, seed, args.scale)
    cpu_ms, outcome = measure_cpu(made, name, seed, args.scale, args.scrape)
    return {f"{name}: CPU ms": cpu_ms}, outcome.errors


def one_round(running: list[Candidate], number: int, args: argparse.Namespace, into: Measured) -> None:
    for name in (*TABLE, "first byte"):
        for turn in range(TURNS):
            seed = number * TURNS + turn
            for made in running if seed % 2 else reversed(running):  # nobody is always first
                figures, failed = measure(made, name, seed, args)
                into.add(made.peer.name, figures, failed)


def table(args: argparse.Namespace) -> dict[str, Any]:
    wanted = [peer for peer in PEERS if peer.name in args.peers.split(",")]
    if args.before is not None:
        wanted.append(before(args.before))
    left_out: dict[str, str] = {}
    measured = Measured()
    with ExitStack() as stack:
        running = []
        for peer in wanted:
            try:
                running.append(stack.enter_context(candidate(peer, args.cache)))
            except (OSError, subprocess.CalledProcessError) as error:
                left_out[peer.name] = str(error)
        for made in running:
            uvloop.run(run(Load(made.ports.http, WARM_UP_REQUESTS, 32, 16)))
        for number in range(args.rounds):
            one_round(running, number, args, measured)
            print(f"round {number + 1} of {args.rounds}: {measured.last()}", flush=True)
    summary = {peer: {name: spread(got) for name, got in columns.items()} for peer, columns in measured.figures.items()}
    ratios = against(measured.figures, "vllm-router") | against(measured.figures, "before")
    print_table(summary | {f"{TWOLANE.name} over {base}": got for base, got in ratios.items()})
    return {
        "summary": summary,
        "ratios": ratios,
        "errors": {name: len(got) for name, got in measured.errors.items()},
        "first_error": {name: got[0] for name, got in measured.errors.items() if got},
        "left_out": left_out,
    }


def spread(values: list[float]) -> dict[str, float]:
    """With a 95 % interval of the median: that of as many values drawn from these again and again."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    low, high = medians[int(0.025 * NUM_RESAMPLES)], medians[int(0.975 * NUM_RESAMPLES)]
    q1, _, q3 = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    figures = {"median": median(values), "q1": q1, "q3": q3, "low": low, "high": high}
    return {name: round(value, 4) for name, value in figures.items()}


def against(figures: dict[str, dict[str, list[float]]], base: str) -> dict[str, dict[str, dict[str, float]]]:
    """Ours over another's, turn by turn."""
    if base not in figures or TWOLANE.name not in figures:
        return {}
    ours = figures[TWOLANE.name]
    pairs = {name: list(zip(ours[name], theirs, strict=True)) for name, theirs in figures[base].items()}
    return {base: {name: spread([our / their for our, their in got]) for name, got in pairs.items()}}


def print_table(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, figures in summary.items():
        print(name)
        for what, got in figures.items():
            quartiles = f"quartiles {got['q1']:8.4f} to {got['q3']:8.4f}"
            print(f"  {what:34} median {got['median']:8.4f} ({got['low']:.4f} to {got['high']:.4f})   {quartiles}")


def instructions(args: argparse.Namespace) -> dict[str, Any]:
    sides = [TWOLANE] if args.before is None else [TWOLANE, before(args.before)]
    figures = {side.name: count(side, args.cache, args.rounds) for side in sides}
    for side, columns in figures.items():
        for name, got in columns.items():
            print(f"{side:10} {name:30} thousand instructions a request: median {median(got):8.1f}   {got}")
    return figures


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """RSS after each 10,000 of 100,000 requests, a fresh connection for each hundred or so."""
    rss: list[float] = []
    with candidate(TWOLANE, args.cache) as made:
        errors: list[str] = []
        for number in range(10):
            load = Load(made.ports.http, int(10_000 * args.scale), 64, 16, seed=number)
            errors += uvloop.run(run(load)).errors
            rss.append(round(made.rss_mb(), 1))
            print(f"{(number + 1) * load.num_requests} requests: {rss[-1]} MB", flush=True)
    return {"rss_mb": rss, "num_errors": len(errors)}


def streams(args: argparse.Namespace) -> dict[str, Any]:
    with candidate(TWOLANE, args.cache) as made:
        outcome = uvloop.run(run(Load(made.ports.http, 1000, 1000, 256, 100.0)))
        rss_mb = round(made.rss_mb(), 1)
    return {"num_ok": outcome.num_ok, "num_errors": len(outcome.errors), "errors": outcome.errors[:3], "rss_mb": rss_mb}


def main() -> None:
    args = parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    load_before = os.getloadavg()
    report: dict[str, Any] = {"memory": memory(args)} if args.memory else {}
    if args.streams:
        report["streams"] = streams(args)
    if args.instructions:
        report["thousand_instructions"] = instructions(args)
    if not report:
        report = table(args)
    machine: dict[str, Any] = {
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    machine |= {"load_average_before": load_before, "load_average_after": os.getloadavg()}
    print(json.dumps({"rounds": args.rounds, "scale": args.scale, "machine": machine, **report}))


if __name__ == "__main__":
    main()
