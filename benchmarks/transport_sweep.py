"""The copy kernel alone, from one GPU's paged memory to another's (or to its own): which parameters fill the link.

One process sees both GPUs, so peer access takes the place of mapped memory; the kernel doesn't see a difference. Every
figure is the median of some runs, each some launches in a row between two CUDA events behind a kernel that keeps the
stream busy: no call from Python is in it. Copies 16-token blocks in shuffled order, as a push does. Also beside it: one
contiguous copy of the same size, which is the link's limit.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from twolane.connector.layout import layout_of
from twolane.connector.transport.cuda import kernel, planes

BLOCK_TOKENS = 16
LAUNCHES = 3  # in a row
RUNS = 5
BUSY_CYCLES = 1_000_000  # about half a millisecond, while Python launches
PROGRAMS = (16, 32, 48, 64, 96, 128, 132, 264)
SHAPES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))  # words a turn, warps

Launch = Callable[[], None]


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each set of parameters, the best last. Ends after `--sweep-s` seconds, kind after kind."""
    end_s = time.monotonic() + args.sweep_s
    bench = Bench(args)
    limit = bench.rate(bench.contiguous)
    print(f"one contiguous copy: {limit:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for (words, warps), programs in _candidates():
        if time.monotonic() > end_s:
            print("the time is up")
            break
        launch = bench.launch(programs, words, warps)
        if not rows:
            bench.check(launch)
        rows.append({"programs": programs, "KiB a turn": words // 128, "warps": warps})
        rows[-1]["GB/s"] = round(bench.rate(launch), 1)
        print(rows[-1], flush=True)
    for row in sorted(rows, key=lambda row: float(row["GB/s"]))[-5:]:
        print("best:", row)
    return {"contiguous GB/s": limit, "gpu": torch.cuda.get_device_name(0), "MB": bench.size / 1e6, "sweep": rows}


def _candidates() -> Iterator[tuple[tuple[int, int], int]]:
    """Today's shape first, then the others."""
    today = (kernel._TILE_WORDS, kernel._NUM_WARPS)
    yield from itertools.product([today, *(shape for shape in SHAPES if shape != today)], PROGRAMS)


class Bench:
    """Two paged memories and a list of shuffled blocks of the longest prompt."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._blocks = max(int(text) for text in args.tokens.split(",")) // BLOCK_TOKENS
        num_blocks = 2 * self._blocks
        self._here, there = torch.device("cuda", int(args.source_gpu)), torch.device("cuda", int(args.target_gpu))
        torch.cuda.set_device(self._here)
        shape = (num_blocks, args.kv_heads, BLOCK_TOKENS, 2 * args.head_size)

        def memory(device: torch.device) -> dict[str, torch.Tensor]:
            return {f"layer.{i}": torch.zeros(shape, dtype=torch.bfloat16, device=device) for i in range(args.layers)}

        self._source, self._target = memory(self._here), memory(there)
        for index, layer in enumerate(self._source.values()):
            layer.random_(-index - 1, index + 1)
        self._target["layer.0"].copy_(self._source["layer.0"])  # torch opens peer access by that, one way each
        self._source["layer.0"].copy_(self._target["layer.0"])
        both = [planes.planes_of(layout_of(kv, num_blocks)) for kv in (self._source, self._target)]
        self._tables = [planes.PlaneTable(each, self._here) for each in both]
        shuffle = random.Random(1)
        self._ids = [shuffle.sample(range(num_blocks), self._blocks) for _ in range(2)]
        self._block_ids = torch.tensor(self._ids, dtype=torch.int32, device=self._here)
        self._permit = kernel.permit_of(0, 0, self._here)
        self.size = self._blocks * sum(plane.size_bytes for plane in both[0])
        self._flat = [torch.zeros(self.size, dtype=torch.uint8, device=device) for device in (self._here, there)]

    def contiguous(self) -> None:
        self._flat[1].copy_(self._flat[0], non_blocking=True)

    def launch(self, programs: int, words: int, warps: int) -> Launch:
        sources, targets = (table.tensor for table in self._tables)
        num_planes = len(self._tables[0].planes)

        def launch() -> None:
            kernel._copy[(programs,)](
                sources,
                targets,
                self._block_ids,
                self._blocks,
                0,
                num_planes,
                self._permit,
                tile_words=words,
                num_warps=warps,
            )

        return launch

    def check(self, launch: Launch) -> None:
        """Every byte is where it belongs."""
        for layer in self._target.values():
            layer.zero_()
        torch.cuda.synchronize(self._target["layer.0"].device)
        launch()
        torch.cuda.synchronize(self._here)
        from_ids, to_ids = self._ids
        for mine, theirs in zip(self._source.values(), self._target.values(), strict=True):
            assert torch.equal(mine[from_ids], theirs[to_ids].to(self._here)), "wrong bytes"

    def rate(self, launch: Launch) -> float:
        """GB/s."""
        launch()
        torch.cuda.synchronize(self._here)
        took_ms = []
        for _ in range(RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            for _ in range(LAUNCHES):
                launch()
            end.record()
            end.synchronize()
            took_ms.append(float(start.elapsed_time(end)) / LAUNCHES)
        return self.size / statistics.median(took_ms) / 1e6
