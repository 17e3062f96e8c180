"""How fast a transport moves KV from one process to another, without an engine.

The physics: a push of a chunk reads P's blocks and writes D's once; over NVLink the link's bandwidth is the limit (a
contiguous copy between two H200s: 396 GB/s), on one GPU its memory's (read and write). Pinned host memory costs two
trips over PCIe, which overlap but for the first and the last slot; so `shm` is measured against the slower of the two
pinned copies alone. `tcp` copies into a slot, into a socket, out of one, into D's slot and out of it, on the cores that
there are. Every figure is the median of some pushes of the same size into shuffled blocks, with quartiles.

Two rates: `GB/s` is that of whole calls from Python, until the sender knows of the last byte. `running GB/s` is that
of the bytes while they move: of `cuda_ipc` between two CUDA events around the kernel, in pushes of their own; of the
others by the slope from the shortest to the longest prompt, in which what every push costs cancels out.

    python -m benchmarks.transport --transport cuda_ipc --target-gpu 1     two GPUs, each process seeing its own
    python -m benchmarks.transport --transport shm --target-gpu 0          one GPU, both processes
    python -m benchmarks.transport --transport shm,tcp --device cpu        no GPU, one after the other
    python -m benchmarks.transport --transport nccl,nccl@NCCL_P2P_DISABLE=1 --target-gpu 1    NCCL as told
    python -m benchmarks.transport --sweep --target-gpu 1                  the kernel alone: programs, sizes, warps

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zmq
from benchmarks.transport_gpu import median_kernel_ms, pinned_copies

from twolane.connector.agent import SWITCH_INTERVAL_S
from twolane.connector.host import host_identity
from twolane.connector.layout import layout_of
from twolane.connector.parts import Cursor, Part
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import Items, Ticket
from twolane.connector.transport.select import receivers_for, senders_for
from twolane.protocol import Transport

BLOCK_TOKENS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--transport",
        default="cuda_ipc",
        help="cuda_ipc, shm, nccl, tcp; several with commas; @NAME=VALUE: the environment",
    )
    parser.add_argument("--device", default="cuda:0", choices=["cuda:0", "cpu"])
    parser.add_argument("--source-gpu", default="0", help="CUDA_VISIBLE_DEVICES of the sending process")
    parser.add_argument("--target-gpu", default="0", help="CUDA_VISIBLE_DEVICES of the receiving process")
    parser.add_argument("--tokens", default="1024,8192", help="lengths of the prompts, with commas")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--programs", default="", help="numbers of kernel programs to try, with commas")
    parser.add_argument("--pushes", type=int, default=15, help="measured pushes a size")
    parser.add_argument("--limit-s", type=float, default=120.0, help="a transport that takes longer is given up")
    parser.add_argument(
        "--sweep", action="store_true", help="parameters of the kernel alone; one process sees both GPUs"
    )
    parser.add_argument("--sweep-s", type=float, default=50.0, help="when the sweep ends")
    parser.add_argument("--out", type=Path, help="file for the JSON, which benchmarks.gpu --link takes")
    return parser.parse_args()


def kv_memory(args: argparse.Namespace, num_blocks: int) -> dict[str, torch.Tensor]:
    """Layer name -> bf16 [blocks, KV heads, slots, K and V], as vLLM's FlashAttention lays it out on one GPU."""
    shape = (num_blocks, args.kv_heads, BLOCK_TOKENS, 2 * args.head_size)
    return {
        f"layer.{i}": torch.full(shape, float(i), dtype=torch.bfloat16, device=args.device) for i in range(args.layers)
    }


def synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def poller_of(pipe: Connection) -> zmq.Poller:
    poller = zmq.Poller()
    poller.register(pipe.fileno(), zmq.POLLIN)
    return poller


def patience_ms(args: argparse.Namespace) -> int:
    """With a GPU these loops only look; without one they would take the cores from those who copy."""
    return 1 if args.device == "cpu" else 0


def share_the_interpreter() -> None:
    """As the connector's agent does: these loops poll, and the waiters' threads want a word too."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def receive(args: argparse.Namespace, transport: Transport, num_blocks: int, pipe: Connection) -> None:
    """D's process: reads what lies in slots, or nothing at all."""
    share_the_interpreter()
    if args.device != "cpu":
        torch.cuda.set_device(0)
    kv, poller = kv_memory(args, num_blocks), poller_of(pipe)
    receivers = receivers_for(layout_of(kv, num_blocks), ConnectorSettings(transport=transport), lambda: None, poller)
    channel = receivers.open()
    pipe.send((os.getpid(), channel.offers))
    chosen, pid = pipe.recv()
    channel.attach(chosen, pid)
    pipe.send("attached")
    reads: list[Any] = []
    while True:
        poller.poll(patience_ms(args))
        receivers.poll()
        for ticket in [one for one in reads if one.done]:
            reads.remove(ticket)
            pipe.send(ticket.slot)
        if pipe.poll(0):
            message = pipe.recv()
            if message is None:
                return
            reads.append(channel.read(*message))


class Sender:
    """P's process: pushes whole prompts and waits until they have landed."""

    def __init__(self, args: argparse.Namespace, transport: Transport, num_blocks: int, pipe: Connection) -> None:
        self._args = args
        self._pipe = pipe
        self._poller = poller_of(pipe)
        self._kv = kv_memory(args, num_blocks)
        settings = ConnectorSettings(transport=transport)
        self._senders = senders_for(layout_of(self._kv, num_blocks), settings, lambda: None, self._poller)
        pid, offers = pipe.recv()
        self._channel, chosen = self._senders.open(offers, pid, host_identity())
        pipe.send((chosen, os.getpid()))
        assert pipe.recv() == "attached"

    def push(self, sources: list[int], targets: list[int]) -> float:
        """Seconds from the call to the last byte in D's blocks."""
        synchronize(self._args)
        started_s = time.perf_counter()
        fence, cursor = self._senders.fence(), Cursor(self._args.layers)
        flying: list[tuple[Ticket, Items]] = []
        reading = 0
        while (left := len(sources) - cursor.block) or flying or reading:
            if left and (extent := self._channel.room(cursor.num_open or left, cursor.layer, fence)):
                part = Part(cursor.block, *extent)
                flying.append((self._channel.push(part.of(sources), part.of(targets), fence), part.of(targets)))
                cursor.pass_by(part)
            elif not flying:
                self._poller.poll(patience_ms(self._args))
            self._senders.poll()
            while flying and flying[0][0].done:
                ticket, wanted = flying.pop(0)
                assert not ticket.error, ticket.error
                if ticket.slot is not None:
                    self._pipe.send((ticket.slot, wanted))
                    reading += 1
            while self._pipe.poll(0):
                self._channel.release(self._pipe.recv())
                reading -= 1
        return time.perf_counter() - started_s


def apart(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One transport's report, from a process of its own: NCCL reads its environment once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(args, name, theirs))
    child.start()
    theirs.close()
    report: dict[str, Any] = {"transport": name, "error": f"no result within {args.limit_s:g} s"}
    try:
        if ours.poll(args.limit_s):
            report = ours.recv()
    except EOFError:
        report["error"] = "its process ended without a result"
    if "error" in report:
        print(f"{name}: {report['error']}")
        child.kill()
    child.join()
    return report


def measure(args: argparse.Namespace, name: str, result: Connection) -> None:
    """In the sending process. `name`: of the transport, with what is added to the environment."""
    share_the_interpreter()
    transport, *pairs = name.split("@")
    os.environ.update({key: value for key, _, value in (pair.partition("=") for pair in pairs)})
    lengths = [int(text) for text in args.tokens.split(",")]
    num_blocks = 2 * max(lengths) // BLOCK_TOKENS
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ["CUDA_VISIBLE_DEVICES"] = args.target_gpu
    child = context.Process(target=receive, args=(args, transport, num_blocks, theirs), daemon=True)
    child.start()
    os.environ["CUDA_VISIBLE_DEVICES"] = args.source_gpu
    report: dict[str, Any] = {"transport": name, "device": args.device, "pushes": []}
    if args.device != "cpu":
        torch.cuda.set_device(0)
        report["gpu"] = torch.cuda.get_device_name(0)
        if transport == "shm":
            report["pinned GB/s"] = pinned_copies()
            print("pinned copies alone, GB/s:", {name: round(rate, 1) for name, rate in report["pinned GB/s"].items()})
    sender = Sender(args, transport, num_blocks, ours)  # type: ignore[arg-type]
    shuffle = random.Random(1)
    for programs in kernel_programs(args):
        rows = []
        for length in lengths:
            row = {"transport": name, **programs, **timed_pushes(args, sender, shuffle, num_blocks, length)}
            if transport == "cuda_ipc":
                again = partial(timed_pushes, args, sender, shuffle, num_blocks, length)
                row["running GB/s"] = row["MB"] / median_kernel_ms(again)
            rows.append(row)
        if transport != "cuda_ipc" and len(rows) > 1:
            rows[-1]["running GB/s"] = (rows[-1]["MB"] - rows[0]["MB"]) / (rows[-1]["ms"] - rows[0]["ms"])
        for row in rows:
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
        report["pushes"] += rows
    ours.send(None)
    child.join(10)
    result.send(report)


def kernel_programs(args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Each number of programs that is to be tried, set while it is the current one."""
    if args.device == "cpu":
        yield {}
        return
    from twolane.connector.transport.cuda import kernel  # noqa: PLC0415 - after the GPU was chosen

    for programs in [int(text) for text in args.programs.split(",") if text] or [kernel.NUM_PROGRAMS]:
        kernel.NUM_PROGRAMS = programs
        yield {"programs": programs}


def timed_pushes(
    args: argparse.Namespace, sender: Sender, shuffle: random.Random, num_blocks: int, length: int
) -> dict[str, Any]:
    blocks = length // BLOCK_TOKENS
    times = []
    for index in range(args.pushes + 3):
        sources, targets = (shuffle.sample(range(num_blocks), blocks) for _ in range(2))
        took_s = sender.push(sources, targets)
        times += [took_s] if index >= 3 else []
    size = blocks * BLOCK_TOKENS * args.layers * args.kv_heads * 2 * args.head_size * 2
    low, median, high = statistics.quantiles(times, n=4)
    row = {"tokens": length, "MB": size / 1e6, "ms": median * 1e3}
    return row | {"quartiles ms": [low * 1e3, high * 1e3], "GB/s": size / median / 1e9}


def main() -> None:
    args = parse_args()
    if args.sweep:
        from benchmarks.transport_sweep import sweep  # noqa: PLC0415 - needs Triton

        report: Any = sweep(args)
    else:
        reports = [apart(args, name) for name in args.transport.split(",")]
        report = reports if len(reports) > 1 else reports[0]
    if args.out:
        args.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
