"""How fast a transport moves KV from one process to another, without an engine.

The physics: a push of a chunk reads P's blocks and writes D's once; over NVLink the link's bandwidth is the limit (a
contiguous copy between two H200s: 396 GB/s), on one GPU its memory's (read and write). Pinned host memory costs two
trips over PCIe, which overlap but for the first and the last slot; so `shm` is measured against the slower of the two
pinned copies alone. `tcp` copies into a slot, into a socket, out of one, into D's slot and out of it, on the cores that
there are. Every figure is the median of some pushes of the same size into shuffled blocks, with quartiles.

    python -m benchmarks.transport --transport cuda_ipc --target-gpu 1     two GPUs, each process seeing its own
    python -m benchmarks.transport --transport shm --target-gpu 0          one GPU, both processes
    python -m benchmarks.transport --transport shm,tcp --device cpu        no GPU, one after the other

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
from multiprocessing.connection import Connection
from typing import Any

import torch
import zmq

from twolane.connector.agent import SWITCH_INTERVAL_S
from twolane.connector.host import host_identity
from twolane.connector.layout import layout_of
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import select_items
from twolane.connector.transport.select import receivers_for, senders_for
from twolane.protocol import Transport

BLOCK_TOKENS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="cuda_ipc", help="cuda_ipc, shm, nccl, tcp; several with commas")
    parser.add_argument("--device", default="cuda:0", choices=["cuda:0", "cpu"])
    parser.add_argument("--source-gpu", default="0", help="CUDA_VISIBLE_DEVICES of the sending process")
    parser.add_argument("--target-gpu", default="0", help="CUDA_VISIBLE_DEVICES of the receiving process")
    parser.add_argument("--tokens", default="1024,8192", help="lengths of the prompts, with commas")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--programs", default="", help="numbers of kernel programs to try, with commas")
    parser.add_argument("--pushes", type=int, default=15, help="measured pushes a size")
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
        self._layers = args.layers

    def push(self, sources: list[int], targets: list[int]) -> float:
        """Seconds from the call to the last byte in D's blocks."""
        synchronize(self._args)
        started_s = time.perf_counter()
        fence, total, first = self._senders.fence(), len(sources) * self._layers, 0
        flying: list[tuple[Any, Any]] = []
        reading = 0
        while first < total or flying or reading:
            if first < total and (room := self._channel.room(first)):
                count = min(room, total - first)
                wanted = select_items(targets, first, count, self._layers)
                own = select_items(sources, first, count, self._layers)
                flying.append((self._channel.push(own, wanted, fence), wanted))
                first += count
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


def pinned_copies() -> dict[str, float]:
    """GB/s of one large pinned copy each way, alone."""
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    rates = {}
    for name, source, target in (("to host", device, host), ("to device", host, device)):
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started_s)
        rates[name] = (1 << 30) / statistics.median(times) / 1e9
    return rates


def measure(args: argparse.Namespace, transport: Transport) -> dict[str, Any]:
    """One transport's report."""
    lengths = [int(text) for text in args.tokens.split(",")]
    num_blocks = 2 * max(lengths) // BLOCK_TOKENS
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ["CUDA_VISIBLE_DEVICES"] = args.target_gpu
    child = context.Process(target=receive, args=(args, transport, num_blocks, theirs), daemon=True)
    child.start()
    os.environ["CUDA_VISIBLE_DEVICES"] = args.source_gpu
    report: dict[str, Any] = {"transport": transport, "device": args.device, "pushes": []}
    if args.device != "cpu":
        torch.cuda.set_device(0)
        report["gpu"] = torch.cuda.get_device_name(0)
        if transport == "shm":
            report["pinned GB/s"] = pinned_copies()
            print("pinned copies alone, GB/s:", {name: round(rate, 1) for name, rate in report["pinned GB/s"].items()})
    sender = Sender(args, transport, num_blocks, ours)
    shuffle = random.Random(1)
    for programs in kernel_programs(args):
        for length in lengths:
            row = {"transport": transport, **programs, **timed_pushes(args, sender, shuffle, num_blocks, length)}
            report["pushes"].append(row)
            print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    ours.send(None)
    child.join(10)
    return report


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
    share_the_interpreter()
    reports = [measure(args, transport) for transport in args.transport.split(",")]
    print(json.dumps(reports if len(reports) > 1 else reports[0]))


if __name__ == "__main__":
    main()
