"""What it costs a forward pass to have its KV copied to another GPU while it computes, by the way of copying.

The physics: 1.2 GB that are read once are 0.3 ms of an H200's memory, a few programs of a copy kernel a few of its 132
SMs for some milliseconds: 0.6 % of a pass together. What a pass loses beyond that, it loses by how its own kernels
share the GPU: a matmul whose tiles are dealt to the SMs beforehand ends when its last SM does. Copy engines take no SM.

One process and two GPUs (or the same one twice, where there is one). A pass is 36 layers of Qwen3-4B's matmuls for 8192
tokens, with attention, norms and a product; after every fifth layer an event, behind which a thread of its own launches
the copies of those layers' KV: 512 shuffled blocks, K and V in planes of their own, 32 KiB a piece. The last group is
copied by 64 programs or more, since the pass is over by then; it is in no slowdown. Passes with and without copies take
turns, launched ahead of the GPU. Every row:

    slowdown    of the pass's time on the GPU against the bare pass beside it: median, and quartiles of the pairs. The
                row "none" is two bare passes: the noise
    alone       GB/s of the same copies without a pass
    tail        from the pass's end to the last byte's arrival
    launch      how long the copying thread was in the calls that launch, a pass
    kernel N    a copy kernel of N programs, on a stream of that priority; 16 with -1, 8 warps, 2048 words is TwoLane's
    short       the same kernel with a program for each piece
    copy engine cuMemcpyBatchAsync of a group's pieces; or a cuMemcpyAsync for each plane, whose blocks lie in a row
                there: what copy engines can do at best

    python -m benchmarks.beside                                    GPU 0 to GPU 1, what fits into a minute
    python -m benchmarks.beside --seconds 150 --out beside.json    every mode
    python -m benchmarks.beside --only "kernel 16" --only short    the modes whose names hold one of these
    python -m benchmarks.beside --source-gpu 0 --target-gpu 0      within one GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.beside_gpu import Bench, Timed
from benchmarks.beside_moves import MODES, NONE, Mode, Sizes

from twolane.connector.transport.cuda.driver import DriverError

HEAD = f"{'mode':<36}{'slowdown %':>11}{'quartiles':>17}{'bare ms':>9}{'alone GB/s':>12}{'tail ms':>9}{'launch ms':>11}"


@dataclass(frozen=True)
class Row:
    mode: str
    slowdown_percent: list[float]  # lower quartile, median, upper quartile
    bare_ms: float
    alone_gb_per_s: float | None
    tail_ms: float | None
    launch_ms: float | None
    is_right: bool
    pairs_ms: list[tuple[float, float]]  # bare, beside

    def __str__(self) -> str:
        low, middle, high = self.slowdown_percent
        text = f"{self.mode:<36}{middle:>+11.2f}{f'{low:+.2f} to {high:+.2f}':>17}{self.bare_ms:>9.2f}"
        if self.alone_gb_per_s is not None:
            text += f"{self.alone_gb_per_s:>12.1f}{self.tail_ms:>9.2f}{self.launch_ms:>11.2f}"
        return text if self.is_right else f"{text}  WRONG BYTES"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-gpu", type=int, default=0, help="computes, and is copied from")
    parser.add_argument("--target-gpu", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=12, help="of passes, a mode")
    parser.add_argument("--seconds", type=float, default=58.0, help="no mode begins that would end after that")
    parser.add_argument("--only", action="append", metavar="TEXT", help="modes whose names hold it; several times")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs: quartiles need two at least")
    return args


def row_of(mode: Mode, pairs: list[tuple[Timed, Timed]], alone: list[float], *, is_right: bool) -> Row:
    times = [(bare.pass_ms, beside.pass_ms) for bare, beside in pairs]
    moves = [beside for _, beside in pairs] if alone else []
    return Row(
        mode.name,
        statistics.quantiles([100 * (beside / bare - 1) for bare, beside in times], n=4, method="inclusive"),
        statistics.median(bare for bare, _ in times),
        statistics.median(alone) if alone else None,
        statistics.median(timed.tail_ms for timed in moves) if moves else None,
        statistics.median(timed.launch_ms for timed in moves) if moves else None,
        is_right,
        times,
    )


def measure(bench: Bench, mode: Mode, num_pairs: int) -> Row:
    if mode == NONE:
        return row_of(mode, bench.pairs(mode, num_pairs), [], is_right=True)
    is_right = bench.moves_right(mode)
    alone = bench.alone(mode)
    return row_of(mode, bench.pairs(mode, num_pairs), alone, is_right=is_right)


def devices(source_gpu: int, target_gpu: int) -> tuple[torch.device, torch.device]:
    """Each may write the other's memory. Ends the program where that can't be."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.beside needs an NVIDIA GPU, better two: torch sees none.")
    if torch.cuda.device_count() == 1 and target_gpu != source_gpu:
        print(f"One GPU only: GPU {source_gpu} is its own target, no link is crossed.")
        target_gpu = source_gpu
    if max(source_gpu, target_gpu) >= torch.cuda.device_count():
        sys.exit(f"There are {torch.cuda.device_count()} GPUs, numbered from 0.")
    here, there = torch.device("cuda", source_gpu), torch.device("cuda", target_gpu)
    if here != there:
        if not torch.cuda.can_device_access_peer(here, there):
            sys.exit(f"GPU {source_gpu} can't write the memory of GPU {target_gpu}: no peer access between them.")
        small = torch.zeros(1 << 10, device=here)
        small.copy_(small.to(there))  # torch opens peer access by that, one way each
    return here, there


def surroundings(here: torch.device, there: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "gpus": [f"{device.index}: {torch.cuda.get_device_name(device)}" for device in (here, there)],
        "sms": torch.cuda.get_device_properties(here).multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "pairs": args.pairs,
        "sizes": asdict(Sizes()),
    }


def run_modes(bench: Bench, modes: list[Mode], num_pairs: int, end_s: float, report: dict[str, Any]) -> None:
    """Prints a row a mode and adds it to the report, until the time is up."""
    pass_s = bench.warm_up() / 1e3
    print(f"a pass: {pass_s * 1e3:.1f} ms; KV: {bench.memories.total_bytes / 1e9:.2f} GB\n{HEAD}", flush=True)
    mode_s = (2 * num_pairs + 2) * pass_s * 1.1  # the checks and the copies alone are in it
    for index, mode in enumerate(modes):
        began_s = time.monotonic()
        if began_s + mode_s > end_s:
            report["left_out"] = [each.name for each in modes[index:]]
            print("The time is up. Left out:", "; ".join(report["left_out"]))
            return
        try:
            row = measure(bench, mode, num_pairs)
        except (AttributeError, DriverError) as error:  # of a call that this driver lacks or refuses
            report["skipped"][mode.name] = str(error)
            print(f"{mode.name:<36} skipped: {error}", flush=True)
            continue
        report["rows"].append(asdict(row))
        print(row, flush=True)
        mode_s = max(mode_s, time.monotonic() - began_s)


def main(argv: Sequence[str] | None = None) -> None:
    began_s = time.monotonic()
    args = parse_args(argv)
    modes = [mode for mode in MODES if not args.only or any(text in mode.name for text in args.only)]
    here, there = devices(args.source_gpu, args.target_gpu)
    report: dict[str, Any] = {**surroundings(here, there, args), "rows": [], "skipped": {}, "left_out": []}
    print(f"{' to '.join(report['gpus'])}; {report['sms']} SMs; torch {report['torch']}", flush=True)
    bench = Bench(Sizes(), here, there)
    try:
        run_modes(bench, modes, args.pairs, began_s + args.seconds, report)
    finally:  # what there is, whatever a mode has done to the GPU
        bench.close()
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({name: value for name, value in report.items() if name != "rows"}))
    if not all(row["is_right"] for row in report["rows"]):
        sys.exit("Wrong bytes: see above.")


if __name__ == "__main__":
    main()
