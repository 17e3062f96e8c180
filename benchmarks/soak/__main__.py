"""The connector under fire, in one command: phases of real load with faults, then a report that counts each.

The last line is JSON. Exit code 1 if a token was wrong, a request lost, or anything leaked. Ctrl+C ends it early:
nothing is left running, and what was counted so far is still reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.soak.client import make_reference
from benchmarks.soak.judge import Reference
from benchmarks.soak.phases import MAX_MODEL_LEN, PHASES, SOAK, Phase
from benchmarks.soak.report import DOCS, failures, merge, render_tables, write_docs
from benchmarks.soak.run import PhaseRun
from benchmarks.soak.service import Service, single_instance
from benchmarks.soak.workload import MAX_OUTPUT_TOKENS, make_prompts, make_requests

from twolane.errors import StartError
from twolane.launch import benchmark
from twolane.launch.configuration import load

NUM_PROMPTS = 200
REQUESTS = 2000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="in all phases together")
    parser.add_argument("--phases", default=",".join(SOAK), help=f"of {', '.join(PHASES)}; a part of the soak")
    parser.add_argument("--time-scale", type=float, default=1.0, help="of each phase's time limit")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="different ones; they come round")
    parser.add_argument("--reference", default="", help="host:port of a single instance; empty: one is started first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", choices=("", "zero_kv"), default="", help="break every P, to see that it is noticed")
    parser.add_argument("--out", type=Path, default=Path("logs/soak"), help="logs, the reference and report.json")
    parser.add_argument("--report", type=Path, nargs="+", help=f"run nothing: write these reports' tables into {DOCS}")
    return parser.parse_args(argv)


def references(args: argparse.Namespace, prompts: list[list[int]]) -> list[Reference]:
    """From a single instance; kept in a file, since the same seed and versions give the same."""
    key = {
        "seed": args.seed,
        "prompts": len(prompts),
        "versions": benchmark.versions(),
        "model": os.environ.get("MODEL", ""),
    }
    path = args.out / "reference.json"
    if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
        return [Reference(tuple(tokens)) for tokens in kept["tokens"]]
    print(f"reference: {len(prompts)} prompts through a single instance", flush=True)
    if args.reference:
        made = asyncio.run(make_reference(args.reference, prompts))
    else:
        with single_instance(args.out, int(os.environ.get("PREFILL_HTTP_PORT", "20003"))) as address:
            made = asyncio.run(make_reference(address, prompts))
    path.write_text(json.dumps({"key": key, "tokens": [reference.tokens for reference in made]}))
    return made


def run_phase(
    phase: Phase, num_requests: int, prompts: list[list[int]], made: list[Reference], args: Any
) -> dict[str, Any]:
    """Stops the service however the phase ends."""
    lengths = [len(prompt) for prompt in prompts]
    requests = make_requests(
        f"{args.seed} {phase.slug}", num_requests, lengths, [len(reference.tokens) for reference in made]
    )
    service = Service(phase, args.out / phase.slug)
    try:
        service.start()
        run = PhaseRun(phase, service, prompts, made, args.seed)
        result = asyncio.run(_until_stopped(run, requests))
        result["interrupted"] = run.stop.is_set()
    finally:
        service.stop()
    result["leftover_segments"] = run.leftover_segments()
    return result


async def _until_stopped(run: PhaseRun, requests: Any) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, run.stop.set)
    return await run.run(requests)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = make_prompts(args.seed, args.prompts, MAX_MODEL_LEN - MAX_OUTPUT_TOKENS - 1)
    made = references(args, prompts)
    report: dict[str, Any] = {"seed": args.seed, "reference_prompts": len(prompts), "phases": []}
    report |= benchmark.surroundings(load({}).settings)
    report["reference_tokens"] = sum(len(reference.tokens) for reference in made)
    report["reference_distinct"] = len({reference.tokens for reference in made})
    for name in args.phases.split(","):
        phase = replace(PHASES[name], max_s=PHASES[name].max_s * args.time_scale, fault=args.fault)
        result = run_phase(phase, round(args.requests * phase.share), prompts, made, args)
        report["phases"].append(result)
        (args.out / "report.json").write_text(json.dumps(report, indent=1))
        if result["interrupted"]:
            break
    return report


def main() -> None:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also under a runner that ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    if args.report:
        write_docs(merge([json.loads(path.read_text()) for path in args.report]))
        return
    try:
        report = soak(args)
    except KeyboardInterrupt:
        sys.exit("interrupted before a phase had begun; nothing is left running")
    except StartError as error:
        sys.exit(str(error))
    print(render_tables(report))
    found = failures(report)
    print("\n".join(found) or "nothing wrong, lost or leaked")
    print(json.dumps(report))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
