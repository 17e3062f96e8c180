"""Two lanes beside one instance: TTFT and ITL of the same seeded prompts, measured in turns in one run.

The physics: through two lanes the first token waits for P's prefill, the KV's way to D and one step of D. P computes
what a single instance would compute, so the difference of the two TTFTs is the price of the handoff. What it buys is
D's undisturbed steps: in a single instance every prefill chunk stops all streams. On one CPU machine both lanes share
the cores, so the figures here show that the price is small, not that the lanes pay; that takes GPUs.

Start both first, on a quiet machine:
    make up
    .venv/bin/python -m vllm.entrypoints.openai.api_server ... --port 20009    (the same flags as in logs/prefill.log)
    .venv/bin/python benchmarks/lanes.py --lanes 127.0.0.1:10001 --single 127.0.0.1:20009 --model SmolLM2-135M-Instruct

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
from typing import Any

from twolane.bench.client import Sample, run_at_times, run_in_turn
from twolane.bench.report import summarize
from twolane.bench.workload import one_at_a_time, poisson

WARM_UP_TOKENS = 50


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", required=True, help="host:port of the proxy")
    parser.add_argument("--single", required=True, help="host:port of one vLLM instance of the same model")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=120.0)
    return parser.parse_args()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    targets = {"lanes": args.lanes, "single": args.single}
    samples: dict[str, dict[str, list[Sample]]] = {}
    for address in targets.values():
        await run_in_turn(address, args.model, one_at_a_time(0, 2, WARM_UP_TOKENS, 4), args.timeout_s)
    for round_index in range(args.rounds):
        for name, address in targets.items():
            seed = 1000 * args.seed + 10 * round_index + (name == "single")  # nobody meets a prompt twice
            for tokens in (100, 1000, 3000):
                key = f"{tokens} tokens, one at a time"
                asks = one_at_a_time(seed, 2, tokens, 16)
                got = await run_in_turn(address, args.model, asks, args.timeout_s)
                samples.setdefault(key, {}).setdefault(name, []).extend(got)
            asks = poisson(seed, 8, 500, 40, rate_per_s=1.0)
            got = await run_at_times(address, args.model, asks, args.timeout_s)
            samples.setdefault("500 tokens, 1 request a second", {}).setdefault(name, []).extend(got)
            print(f"round {round_index + 1} of {args.rounds}: {name} done", flush=True)
    return {key: {name: summarize(got) for name, got in by.items()} for key, by in samples.items()}


def main() -> None:
    args = parse_args()
    figures = asyncio.run(measure(args))
    for key, by in figures.items():
        for name, summary in by.items():
            print(f"{key:32} {name:7} {summary}")
    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    print(json.dumps({"seed": args.seed, "rounds": args.rounds, "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()
