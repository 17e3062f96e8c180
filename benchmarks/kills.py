"""A P, then a D, of a service that runs is killed in the middle of a load: who notices, and how much.

    twolane up --prefill 2 --decode 2 --foreground        # in another terminal
    python -m benchmarks.kills --rate 2 --window-s 30

Three windows of the same Poisson arrivals: nobody is killed, one P is (SIGKILL), one D is; between them all come back.
Every answer is compared with what the service said to the same prompt when it was calm, up to the first token that
rounding could change. Kills instances of the service in this folder; its supervisor starts them again.
The last line is JSON. Exit code 1 if a token was wrong, or a request lost that had no first byte yet.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak.client import ask, make_reference, new_client
from benchmarks.soak.fire import ROLES
from benchmarks.soak.judge import Outcome, Reference, is_wrong, judge
from benchmarks.soak.service import Running, kill
from benchmarks.soak.workload import Request
from rich.console import Console
from rich.table import Table

from twolane.bench.report import percentile
from twolane.errors import StartError
from twolane.launch import benchmark, control
from twolane.launch.configuration import load
from twolane.launch.plan import load_plan

KILL_AT = 0.3  # of a window
BACK_S = 300.0
POLL_S = 0.5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second (default 2)")
    parser.add_argument("--window-s", type=float, default=30.0, help="of arrivals, each of three (default 30)")
    parser.add_argument("--input-len", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of an answer at most (default 32)")
    parser.add_argument("--prompts", type=int, default=24, help="different ones; they come round (default 24)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the JSON, beside the last line")
    return parser.parse_args(argv)


def find_service() -> Running:
    settings = load({}).settings
    files = control.Files(settings)
    state = control.running(files)
    if state is None or state.overall != "up":
        raise StartError("nothing is up in this folder: `twolane up --prefill 2 --decode 2` first")
    return Running(settings, load_plan(files.plan))


class Kills:
    """Mutable state: none but the service's."""

    def __init__(
        self, args: argparse.Namespace, service: Running, prompts: list[list[int]], references: list[Reference]
    ) -> None:
        self._args = args
        self._service = service
        self._prompts = prompts
        self._references = references

    async def window(self, victim: str) -> dict[str, Any]:
        """`victim`: P, D, or empty. Returns when all instances are back."""
        killed_s = 0.0
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(self._ask_all())
            if victim:
                await asyncio.sleep(self._args.window_s * KILL_AT)
                kill(self._service.ready(ROLES[victim])[-1])
                killed_s = time.monotonic()
        outcomes = asking.result()
        await asyncio.to_thread(self._until_all_are_ready)
        row = figures(outcomes, [self._references[outcome.request.prompt] for outcome in outcomes])
        return row | ({"all_back_after_s": round(time.monotonic() - killed_s, 1)} if victim else {})

    async def _ask_all(self) -> list[Outcome]:
        """The same arrivals in every window."""
        rng, at_s = random.Random(self._args.seed), 0.0
        started_s = time.monotonic()
        usable = [index for index, reference in enumerate(self._references) if reference.tokens]
        async with new_client() as client, asyncio.TaskGroup() as group:
            tasks = []
            for number in itertools.count():
                at_s += rng.expovariate(self._args.rate)
                if at_s > self._args.window_s:
                    break
                prompt = usable[number % len(usable)]
                request = Request(number, prompt, len(self._references[prompt].tokens), stream=True)
                await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
                url, model = self._service.plan.proxy_url, self._service.model
                tasks.append(group.create_task(ask(client, url, model, request, self._prompts[prompt])))
        return [task.result() for task in tasks]

    def _until_all_are_ready(self) -> None:
        deadline_s = time.monotonic() + BACK_S
        while not self._service.all_ready():
            if time.monotonic() > deadline_s:
                raise StartError(f"not all instances were back {BACK_S:g} s after the load; see `twolane status`")
            time.sleep(POLL_S)


def figures(outcomes: list[Outcome], references: list[Reference]) -> dict[str, Any]:
    """Pure. Times are of the requests that were answered whole: what a kill did to those it didn't hit."""
    verdicts = [judge(outcome, reference) for outcome, reference in zip(outcomes, references, strict=True)]
    ended = Counter(
        "right" if verdict == "right" else "wrong" if is_wrong(verdict) else _cut(outcome)
        for outcome, verdict in zip(outcomes, verdicts, strict=True)
    )
    whole = [outcome for outcome, verdict in zip(outcomes, verdicts, strict=True) if verdict == "right"]
    ttft_ms = [1e3 * outcome.event_s[0] for outcome in whole]
    gaps_ms = [1e3 * (b - a) for outcome in whole for a, b in itertools.pairwise(outcome.event_s)]
    row: dict[str, Any] = {"requests": len(outcomes), "ended": dict(ended)}
    for name, values in (("ttft", ttft_ms), ("itl", gaps_ms)):
        row |= {f"{name}_p{p}_ms": round(percentile(values, p / 100), 1) for p in (50, 99) if values}
    row["messages"] = sorted({outcome.message for outcome in outcomes if outcome.message})
    return row


def _cut(outcome: Outcome) -> str:
    return "cut off after the first token" if outcome.event_s else "lost before the first token"


def failures(windows: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {count} {what}"
        for name, row in windows.items()
        for what, count in row["ended"].items()
        if what in {"wrong", "lost before the first token"}
    ]


def table(windows: dict[str, dict[str, Any]]) -> Table:
    made = Table("", *windows)
    calm = next(iter(windows.values()))
    for what in ("right", "cut off after the first token", "lost before the first token", "wrong"):
        made.add_row(what, *(str(row["ended"].get(what, 0)) for row in windows.values()))
    for name in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"):
        made.add_row(name, *(_beside(row.get(name), calm.get(name)) for row in windows.values()))
    made.add_row("all back after", *(f"{row.get('all_back_after_s', '-')} s" for row in windows.values()))
    return made


def _beside(value: float | None, calm: float | None) -> str:
    return "-" if value is None else f"{value} ({value / calm:.2f})" if calm else f"{value}"


async def run(args: argparse.Namespace) -> dict[str, Any]:
    service = find_service()
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(100, 32000) for _ in range(args.input_len)] for _ in range(args.prompts)]
    print(f"reference: {args.prompts} prompts through the calm service", flush=True)
    references = await make_reference(service.plan.proxy_address, prompts, at_once=1, max_tokens=args.output_len)
    kills = Kills(args, service, prompts, references)
    windows: dict[str, dict[str, Any]] = {}
    for name, victim in (("calm", ""), ("one P killed", "P"), ("one D killed", "D")):
        print(f"{name}: {args.window_s:g} s at {args.rate:g} a second", flush=True)
        windows[name] = await kills.window(victim)
    shape = f"{len(service.plan.of_role('prefill'))}P{len(service.plan.of_role('decode'))}D"
    about = {name: value for name, value in vars(args).items() if name != "out"}
    return {"shape": shape, "asked": about, "windows": windows, **benchmark.surroundings(load({}).settings)}


def main() -> None:
    args = parse_args()
    try:
        report = asyncio.run(run(args))
    except KeyboardInterrupt:
        sys.exit("interrupted; the service goes on, and what was killed comes back")
    except StartError as error:
        sys.exit(str(error))
    Console().print(table(report["windows"]))
    found = failures(report["windows"])
    print("\n".join(found) or "nothing wrong, nothing lost before its first token")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
