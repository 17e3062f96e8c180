"""What a prefill/decode proxy costs: ours and three peers, measured in turns in one run.

The physics: every token of every answer goes through the proxy, so its CPU time a token bounds how many streams one
process carries, and the time that it adds to a first byte is added to every TTFT. Instances are mocks that answer at
once, so that nothing but the proxy's own work shows. The proxy has core 0 alone; mocks and load share core 1. CPU time
is user + system time of the proxy's process and its children, from /proc/PID/stat.

16-token streams are sent without a pause, one token in each turn of the mock's event loop, so several may arrive
together. The 256 tokens of a long stream come at 10 ms ticks, all streams at the same tick, as from an engine's steps:
every token is a read and a write of its own.

    python -m benchmarks.proxy              the table; makes environments for the peers on its first run
    python -m benchmarks.proxy --before SRC --peers twolane --scrape
                                            ours against ours of another source tree, /metrics read every second
    python -m benchmarks.proxy --memory     100,000 requests through ours: memory
    python -m benchmarks.proxy --streams    1,000 streams at once through ours

Needs two cores that nobody else uses: the load average before and after is in the report. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from benchmarks.proxy_load import Load, Outcome, run
from benchmarks.proxy_peers import PEERS, TWOLANE, before
from benchmarks.proxy_run import LOAD_CORE, Candidate, candidate

WARM_UP_REQUESTS = 300
TABLE = {
    "16 tokens, 32 at once": (4000, 32, 16, 0.0),
    "16 tokens, 128 at once": (4000, 128, 16, 0.0),
    "256 tokens, 64 at once": (192, 64, 256, 10.0),
}
FIRST_BYTE_REQUESTS = 1000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests; below 1 for a quick look")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="comma-separated names")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twolane/proxy-peers"
    parser.add_argument("--cache", type=Path, default=default, help="where the peers' environments are kept")
    parser.add_argument("--before", type=Path, help="another source tree's src, measured in turns with this one's")
    parser.add_argument("--scrape", action="store_true", help="read the proxy's /metrics every second meanwhile")
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


def one_round(made: Candidate, seed: int, scale: float, scrape: bool) -> tuple[dict[str, float], list[str]]:
    figures: dict[str, float] = {}
    errors: list[str] = []
    for name in TABLE:
        figures[f"{name}: CPU ms"], outcome = measure_cpu(made, name, seed, scale, scrape)
        errors += outcome.errors
    direct, outcome = first_byte_ms(made.ports.decode, seed, scale)
    errors += outcome.errors
    figures["first byte p50 ms"], outcome = first_byte_ms(made.ports.http, seed, scale)
    figures["first byte p50 over direct ms"] = figures["first byte p50 ms"] - direct
    return figures, errors + outcome.errors


def table(args: argparse.Namespace) -> dict[str, Any]:
    wanted = [peer for peer in PEERS if peer.name in args.peers.split(",")]
    if args.before is not None:
        wanted.append(before(args.before))
    rounds: dict[str, list[dict[str, float]]] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, list[str]] = {}
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
            for made in running if number % 2 else reversed(running):  # nobody is always first
                figures, failed = one_round(made, number, args.scale, args.scrape)
                rounds.setdefault(made.peer.name, []).append(figures)
                errors.setdefault(made.peer.name, []).extend(failed)
                print(f"round {number + 1} of {args.rounds}: {made.peer.name} {rounded(figures)}", flush=True)
    summary = {name: summarize(got) for name, got in rounds.items()}
    print_table(summary)
    num_errors = {name: len(got) for name, got in errors.items()}
    first_errors = {name: got[0] for name, got in errors.items() if got}
    ratios = against(summary, "vllm-router") | against(summary, "before")
    return {
        "summary": summary,
        "ratios": ratios,
        "errors": num_errors,
        "first_error": first_errors,
        "left_out": left_out,
    }


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


def summarize(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    return {name: rounded({"median": median(got), "min": min(got), "max": max(got)}) for name, got in columns.items()}


def against(summary: dict[str, dict[str, dict[str, float]]], base: str) -> dict[str, dict[str, float]]:
    """Our medians over another's, in the same run."""
    if base not in summary or TWOLANE.name not in summary:
        return {}
    ours = summary[TWOLANE.name]
    return {base: rounded({name: ours[name]["median"] / got["median"] for name, got in summary[base].items()})}


def print_table(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, figures in summary.items():
        print(name)
        for what, got in figures.items():
            print(f"  {what:34} median {got['median']:8.3f}   {got['min']:8.3f} to {got['max']:8.3f}")


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
