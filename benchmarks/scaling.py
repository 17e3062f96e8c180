"""What one proxy carries: instances, open streams, and several proxies beside each other.

The physics: an open stream costs the proxy two sockets and what it keeps of the request, and each of its tokens a read
and a write; an instance costs registrations, health probes and a look at its numbers. So CPU should grow with tokens a
second and with instances, memory with streams, and nothing faster than that. The instances are mocks in one process
(benchmarks/scaling_mock.py), which register with the connector's own code; the proxies are real processes on core 0,
mocks and clients share core 1.

    python -m benchmarks.scaling                              the whole sweep, about 8 minutes
    python -m benchmarks.scaling --instances 2,10 --streams 100,1000 --seconds 4 --proxies 1,2
                                                              a quick look, under two minutes
    python -m benchmarks.scaling --json scaling.json          the same figures, for programs

CPU is what the scheduler counted for the proxy's threads (/proc/PID/task/*/schedstat), so other work on the machine
shows in the times to first byte, hardly in CPU. Ctrl+C ends it and shows what there is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import psutil
import uvloop
from benchmarks.proxy_run import LOAD_CORE, PROXY_CORE, free_ports, process, wait_for_port
from benchmarks.scaling_load import Streams, Times, ask_again_and_again, get, request_bytes

READY_TIMEOUT_S = 120.0
SHORT = request_bytes(1)
NUM_SHORT, AT_ONCE = 1600, 16
HEALTH = b"GET /health HTTP/1.1\r\nHost: mock\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: mock\r\n\r\n"
SPARE_FILES = 800  # of the proxy's descriptors: its reserve, kept-alive connections to P, probes
FEW_FOR_PROXIES = 1000  # streams, all together


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", default="2,10,30,100", help="how many, P and D in equal parts")
    parser.add_argument("--streams", default="100,1000,3000,10000", help="open at once; fewer where files run out")
    parser.add_argument("--proxies", default="1,2,4", help="beside each other, 30 instances; 0: leave that out")
    parser.add_argument("--pace", type=float, default=5.0, help="seconds between two tokens of a stream")
    parser.add_argument("--seconds", type=float, default=10.0, help="each point is measured for")
    parser.add_argument("--minutes", type=float, default=10.0, help="then it ends and shows what there is")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    return parser.parse_args()


@dataclass
class Proxy:
    """A proxy's process, watched from outside."""

    process: psutil.Process
    http_port: int
    discovery_port: int
    log: Path

    def cpu_s(self) -> float:
        """Of all its threads, as the scheduler counts it, in ns."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def rss_mb(self) -> float:
        rss_bytes: int = self.process.memory_info().rss
        return round(rss_bytes / 1e6, 1)

    def complaints(self) -> list[str]:
        """Lines of its log that are no good news."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[:300] for line in lines if "WARNING" in line or "ERROR" in line]

    async def stats(self) -> Any:
        return json.loads(await get(self.http_port, "/stats"))


@contextmanager
def proxy(home: Path, max_in_flight: int) -> Iterator[Proxy]:
    ports = free_ports()
    log = home / f"proxy-{ports.http}.log"
    argv = ["env", "-C", str(home), sys.executable, "-m", "twolane.cli", "proxy", "--http-port", str(ports.http)]
    argv += ["--discovery-port", str(ports.discovery), "--max-in-flight", str(max_in_flight)]
    with process(argv, PROXY_CORE, log) as running:
        wait_for_port(ports.http)
        yield Proxy(running, ports.http, ports.discovery, log)


@contextmanager
def mocks(home: Path, num: int, proxies: list[Proxy]) -> Iterator[None]:
    discovery = ",".join(f"127.0.0.1:{made.discovery_port}" for made in proxies)
    argv = [sys.executable, "-m", "benchmarks.scaling_mock", str(free_ports().decode), str(num), discovery]
    with process(argv, LOAD_CORE, home / "mock.log"):
        yield


async def until_ready(made: Proxy, num: int) -> float:
    """Seconds until the proxy would send something to all of them."""
    began_at = monotonic()
    async with asyncio.timeout(READY_TIMEOUT_S):
        while sum(i["state"] == "ready" for i in (await made.stats())["instances"]) < num:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return round(monotonic() - began_at, 2)


async def measure(made: Proxy, seconds: float, streams: Streams | None = None, extra: bytes = b"") -> dict[str, Any]:
    """CPU, memory and descriptors, while a few short requests look at the time they take. `extra` is asked for every
    second meanwhile."""
    first, health, others = Times(), Times(), Times()
    cpu_s, at_s, tokens = made.cpu_s(), perf_counter(), streams.counts.num_tokens if streams else 0
    asking = [(SHORT, first, 0.1), (HEALTH, health, 0.02)] + ([(extra, others, 1.0)] if extra else [])
    tasks = [asyncio.ensure_future(ask_again_and_again(made.http_port, *what)) for what in asking]
    try:
        await asyncio.sleep(seconds)
    finally:
        for task in tasks:
            task.cancel()
    elapsed_s = perf_counter() - at_s
    errors = first.errors + health.errors + others.errors + (streams.counts.errors if streams else [])
    spent = {"p50": health.percentile(0.5), "p99": health.percentile(0.99), "max": health.percentile(1.0)}
    return {
        "cpu_percent": round((made.cpu_s() - cpu_s) / elapsed_s * 100, 2),
        "tokens_per_s": round((streams.counts.num_tokens - tokens) / elapsed_s, 1) if streams else 0.0,
        "rss_mb": made.rss_mb(),
        "files": made.process.num_fds(),
        "first_byte_ms": {"p50": first.percentile(0.5), "p99": first.percentile(0.99)},
        "health_ms": spent,
        "num_errors": len(errors),
        "first_error": errors[0] if errors else "",
    }


async def cpu_a_request_ms(made: Proxy) -> tuple[float, int]:
    """Of short requests, 16 at once, and how many failed."""
    before_s, times = made.cpu_s(), Times()
    asking = [ask_again_and_again(made.http_port, SHORT, times, 0.0, NUM_SHORT // AT_ONCE) for _ in range(AT_ONCE)]
    await asyncio.gather(*asking)
    return round((made.cpu_s() - before_s) / NUM_SHORT * 1e3, 3), len(times.errors)


async def watched(made: Proxy, seconds: float) -> dict[str, Any]:
    """With an open dashboard."""
    reader, writer = await asyncio.open_connection("127.0.0.1", made.http_port)
    writer.write(b"GET /dashboard/events HTTP/1.1\r\nHost: mock\r\n\r\n")

    async def read() -> int:
        num_bytes = 0
        while data := await reader.read(1 << 16):
            num_bytes += len(data)
        return num_bytes

    reading = asyncio.ensure_future(read())
    try:
        return await measure(made, seconds)
    finally:
        reading.cancel()
        writer.close()


async def sweep_streams(args: argparse.Namespace, home: Path, num: int, report: dict[str, Any]) -> None:
    """One number of instances, all numbers of streams, which only grow."""
    async with AsyncExitStack() as stack:
        made = stack.enter_context(proxy(home, max(args.streams) + 50))
        stack.enter_context(mocks(home, num, [made]))
        ready_s = await until_ready(made, num)
        request_ms, num_failed = await cpu_a_request_ms(made)
        idle = await measure(made, args.seconds)
        base = {"instances": num, "ready_s": ready_s, "request_cpu_ms": request_ms, "failed": num_failed}
        report["idle"].append(base | idle)
        show(num, 0, idle, f"ready after {ready_s} s, {request_ms} ms CPU a request")
        if num == max(args.instances):
            report["scraped"] = await measure(made, args.seconds, extra=METRICS)
            report["watched"] = await watched(made, args.seconds)
            show(num, 0, report["scraped"], "/metrics read every second")
            show(num, 0, report["watched"], "a dashboard open")
        streams = Streams([made.http_port], args.pace)
        stack.callback(streams.close)
        for wanted in args.streams:
            opened_per_s = await streams.grow_to(wanted)
            await asyncio.sleep(1)
            point = await measure(made, args.seconds, streams)
            point |= {"instances": num, "streams": streams.counts.num_open, "opened_per_s": round(opened_per_s, 1)}
            point["num_errors"] += wanted - streams.counts.num_open
            point["complaints"] = made.complaints()[:3]
            report["points"].append(point)
            show(num, wanted, point, f"opened at {opened_per_s:.0f}/s")


async def side_by_side(args: argparse.Namespace, home: Path, num_proxies: int, report: dict[str, Any]) -> None:
    """The same instances and streams for several proxies: what each knows, and how even all together are."""
    num = min(30, max(args.instances))
    with ExitStack() as stack:
        made = [stack.enter_context(proxy(home, max(args.streams) + 50)) for _ in range(num_proxies)]
        stack.enter_context(mocks(home, num, made))
        ready_s = [await until_ready(one, num) for one in made]
        streams = Streams([one.http_port for one in made], args.pace)
        stack.callback(streams.close)
        await streams.grow_to(FEW_FOR_PROXIES)
        point = await measure(made[0], args.seconds, streams)
        seen = [await one.stats() for one in made]
        by_instance = [sum(s["instances"][n]["in_flight"] for s in map(by_address, seen)) for n in range(num)]
        on_d = [count for count in by_instance if count]
        point |= {"proxies": num_proxies, "instances": num, "known_by_each": [len(s["instances"]) for s in seen]}
        point |= {"ready_s": ready_s, "streams": streams.counts.num_open, "most_on_a_d": max(on_d), "least": min(on_d)}
        point["complaints"] = [line for one in made for line in one.complaints()][:3]
        report["side_by_side"].append(point)
        what = f"{num_proxies} proxies, each knows {set(point['known_by_each'])}, on a D {min(on_d)} to {max(on_d)}"
        show(num, FEW_FOR_PROXIES, point, what)


def by_address(stats: Any) -> Any:
    return {"instances": sorted(stats["instances"], key=lambda i: (i["role"], i["address"]))}


def show(instances: int, streams: int, point: dict[str, Any], more: str) -> None:
    print(
        f"{instances:4} instances {streams:6} streams: CPU {point['cpu_percent']:6.2f} %, {point['rss_mb']:6.1f} MB, "
        f"{point['files']:5} files, {point['tokens_per_s']:7.1f} tokens/s, first byte {point['first_byte_ms']['p50']} "
        f"(p99 {point['first_byte_ms']['p99']}) ms, /health p99 {point['health_ms']['p99']} ms, "
        f"{point['num_errors']} errors {point['first_error']}{point.get('complaints') or ''}; {more}",
        flush=True,
    )


def growth(report: dict[str, Any]) -> list[dict[str, float]]:
    """From one number of streams to the next: how CPU and memory above the idle proxy's grew, as powers of the number
    of streams. 1 is linear, less is better."""
    idle = {base["instances"]: base for base in report["idle"]}
    steps = []
    for before, after in zip(report["points"], report["points"][1:], strict=False):
        if before["instances"] != after["instances"] or after["streams"] <= before["streams"]:
            continue
        step = {"instances": after["instances"], "from": before["streams"], "to": after["streams"]}
        times = math.log(after["streams"] / before["streams"])
        for what in ("cpu_percent", "rss_mb"):
            above = [point[what] - idle[point["instances"]][what] for point in (before, after)]
            step[what] = round(math.log(above[1] / above[0]) / times, 2) if min(above) > 0 else math.nan
        steps.append(step)
    return steps


def most_streams(wanted: list[int]) -> list[int]:
    """With all the descriptors that this user may have: here and in the proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = (hard - SPARE_FILES) // 2 // 100 * 100
    if max(wanted) > most:
        print(f"{hard} open files (ulimit -Hn) are enough for {most} streams; asked for {max(wanted)}", flush=True)
    return sorted({min(most, num) for num in wanted})


async def run(args: argparse.Namespace, home: Path, report: dict[str, Any]) -> None:
    """Within the time; what fails is left out, with its reason."""
    parts = [(sweep_streams, num) for num in args.instances] + [(side_by_side, num) for num in args.proxies]
    async with asyncio.timeout(args.minutes * 60):
        for part, num in parts:
            try:
                await part(args, home, num, report)
            except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
                print(f"{part.__name__} {num} was given up: {error!r}", flush=True)
                report["left_out"].append(f"{part.__name__} {num}: {error!r}")


def main() -> None:
    args = parse_args()
    args.instances = sorted(int(num) for num in args.instances.split(","))
    args.streams = most_streams([int(num) for num in args.streams.split(",")])
    args.proxies = [int(num) for num in args.proxies.split(",") if int(num)]
    os.sched_setaffinity(0, {LOAD_CORE})
    report: dict[str, Any] = {"idle": [], "points": [], "side_by_side": [], "left_out": []}
    report["machine"] = {"cores": os.cpu_count(), "cpu": platform.processor(), "python": platform.python_version()}
    report["load_average"] = [os.getloadavg()[0]]
    began_at = monotonic()
    with tempfile.TemporaryDirectory() as home, suppress(KeyboardInterrupt, TimeoutError):
        uvloop.run(run(args, Path(home), report))
    report["load_average"].append(os.getloadavg()[0])
    report |= {"growth": growth(report), "pace_s": args.pace, "took_s": round(monotonic() - began_at, 1)}
    for step in report["growth"]:
        print(step)
    text = json.dumps(report)
    if args.json is not None:
        args.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
