"""What benchmarks.beside runs on the GPUs: a pass of matmuls, and copies behind its layers, beside it and alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from benchmarks.beside_moves import NONE, Memories, Mode, Sizes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from twolane.connector.transport.cuda import driver

MARK_EVERY = 5  # layers: as CudaCopier groups them
WARM_UP_PASSES = 8
ALONE_RUNS = 3
BUSY_CYCLES = 20_000_000  # about 10 ms, while the copies that run alone are launched


@dataclass
class Timed:
    """One pass, and what it moved."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event | None = None
    launch_ms: float = 0.0  # that a thread of the host spent on launching the copies

    @property
    def pass_ms(self) -> float:
        return float(self.start.elapsed_time(self.end))

    @property
    def tail_ms(self) -> float:
        return 0.0 if self.copied is None else float(self.end.elapsed_time(self.copied))


class Layer:
    """The load of one layer. All layers share its memory: it is four times the L2 cache."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        self.hidden = noise(sizes.tokens, sizes.hidden)
        self.norm = noise(sizes.hidden)
        # [outputs, inputs] and turned for the product, as in a checkpoint: cuBLAS chooses its kernel by that
        self.to_qkv = noise(sizes.qkv, sizes.hidden).mul_(0.02).t()
        self.to_hidden = noise(sizes.hidden, sizes.heads * sizes.head_size).mul_(0.02).t()
        self.to_both = noise(2 * sizes.inner, sizes.hidden).mul_(0.02).t()
        self.from_inner = noise(sizes.hidden, sizes.inner).mul_(0.02).t()
        self.attended = noise(sizes.tokens, sizes.heads * sizes.head_size)
        self.query, self.key, self.value = (noise(1, sizes.heads, sizes.tokens, sizes.head_size) for _ in range(3))
        self.qkv = noise(sizes.tokens, sizes.qkv)
        self.both = noise(sizes.tokens, 2 * sizes.inner)
        self.gate, self.up = self.both[:, : sizes.inner], self.both[:, sizes.inner :]
        self.inner = noise(sizes.tokens, sizes.inner)
        self.outputs = [noise(sizes.tokens, sizes.hidden) for _ in range(2)]

    def launch(self) -> None:
        """On the current stream."""
        normed = rms_norm(self.hidden, (self.hidden.shape[1],), self.norm)
        torch.mm(normed, self.to_qkv, out=self.qkv)
        scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)
        torch.mm(self.attended, self.to_hidden, out=self.outputs[0])
        normed = rms_norm(self.hidden, (self.hidden.shape[1],), self.norm)
        torch.mm(normed, self.to_both, out=self.both)
        torch.mul(self.gate, self.up, out=self.inner)
        torch.mm(self.inner, self.from_inner, out=self.outputs[1])


class Bench:
    """Passes on a stream of this thread, copies on others by a thread of their own."""

    def __init__(self, sizes: Sizes, here: torch.device, there: torch.device) -> None:
        self.sizes = sizes
        torch.cuda.set_device(here)
        self.memories = Memories(sizes, here, there)
        self._layer = Layer(sizes, here)
        self._compute = torch.cuda.Stream(here)
        self._streams = {priority: torch.cuda.Stream(here, priority=priority) for priority in (0, -1)}
        self._thread = ThreadPoolExecutor(1, initializer=driver.bind, initargs=(here,))
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)
        torch.cuda.synchronize(here)

    def warm_up(self) -> float:
        """How long a pass takes, in ms."""
        passes = [self._pass(NONE) for _ in range(WARM_UP_PASSES)]
        passes[-1].end.synchronize()
        return passes[-1].pass_ms

    def groups(self) -> Iterator[range]:
        for first in range(0, self.sizes.layers, MARK_EVERY):
            yield range(first, min(first + MARK_EVERY, self.sizes.layers))

    def moves_right(self, mode: Mode) -> bool:
        self.memories.clear()
        self._alone(mode)
        return self.memories.equal(mode)

    def alone(self, mode: Mode) -> list[float]:
        """GB/s of some runs without a pass."""
        return [self.memories.total_bytes / self._alone(mode) / 1e6 for _ in range(ALONE_RUNS)]

    def _alone(self, mode: Mode) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = self._streams[mode.priority]

        def launch() -> None:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY_CYCLES)
                start.record(stream)
                for layers in self.groups():
                    self.memories.launch(mode, layers, stream, hurry=False)
                end.record(stream)

        self._thread.submit(launch).result()
        end.synchronize()
        return float(start.elapsed_time(end))

    def pairs(self, mode: Mode, count: int) -> list[tuple[Timed, Timed]]:
        """(bare pass, pass beside the copies), back to back; every second pair the other way round."""
        self._pass(NONE)  # after a while without work
        pairs = []
        for index in range(count):
            first, second = (self._pass(each) for each in ((mode, NONE) if index % 2 else (NONE, mode)))
            pairs.append((second, first) if index % 2 else (first, second))
        torch.cuda.synchronize(self.memories.here)
        return pairs

    def _pass(self, mode: Mode) -> Timed:
        """Launched while the one before computes. What it moves ends before the next one begins."""
        if len(self._ends) == 2:
            self._ends[0].synchronize()  # two passes in a queue of the GPU: a full one would stop this thread
        timed = Timed(*(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        copies: list[Future[float]] = []
        with torch.cuda.stream(self._compute), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            timed.start.record(self._compute)
            for layers in self.groups():
                for _ in layers:
                    self._layer.launch()
                mark = torch.cuda.Event()
                mark.record(self._compute)
                if mode.kind != "none":
                    copies.append(self._thread.submit(self._copy, mode, layers, mark))
            timed.end.record(self._compute)
        timed.launch_ms = sum(copy.result() for copy in copies)
        if copies:
            timed.copied = torch.cuda.Event(enable_timing=True)
            timed.copied.record(self._streams[mode.priority])
            self._compute.wait_event(timed.copied)
        self._ends.append(timed.end)
        return timed

    def _copy(self, mode: Mode, layers: range, mark: torch.cuda.Event) -> float:
        """In the copying thread. The last layers' copy hurries, as CudaCopier's: the pass is over then."""
        started_s = time.perf_counter()
        stream = self._streams[mode.priority]
        with torch.cuda.stream(stream):
            stream.wait_event(mark)
            self.memories.launch(mode, layers, stream, hurry=layers.stop == self.sizes.layers)
        return (time.perf_counter() - started_s) * 1e3

    def close(self) -> None:
        self._thread.shutdown()
