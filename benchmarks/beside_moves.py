"""The KV that benchmarks.beside moves from one GPU's paged memory to another's, and the ways of moving it."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from functools import cache

import torch

from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.planes import Plane, PlaneTable

SAMPLE = 16  # blocks compared
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_COMPUTE = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE


@dataclass(frozen=True)
class Sizes:
    """Of the pass and of its KV; Qwen3-4B's, but that keys and values are expanded to all heads."""

    layers: int = 36
    tokens: int = 8192
    hidden: int = 2560
    heads: int = 32
    qkv: int = 6144
    head_size: int = 128
    inner: int = 9728
    blocks: int = 512  # that move
    memory_blocks: int = 1024
    piece_bytes: int = 32 << 10


@dataclass(frozen=True)
class Mode:
    """How the KV moves beside the pass. `kind`: none; kernel (so many programs); short (a program for each piece);
    batch (copy engines, all pieces of a group in one call); planes (copy engines, blocks in a row: a call a plane)."""

    name: str
    kind: str
    programs: int = 0
    priority: int = 0
    warps: int = 8
    words: int = 2048  # a turn and program


NONE = Mode("none", "none")


def _kernel(programs: int, priority: int, warps: int = 8, words: int = 2048) -> Mode:
    name = f"kernel {programs} prio {priority} warps {warps} words {words}"
    return Mode(name, "kernel", programs, priority, warps, words)


# What is asked first comes first: where the time is up, the rest is left out.
MODES = (
    NONE,
    _kernel(16, -1),
    _kernel(16, 0),
    Mode("short prio 0 warps 8 words 2048", "short"),
    Mode("copy engine, a call a plane", "planes"),
    Mode("copy engine, batch", "batch"),
    _kernel(64, -1),
    _kernel(64, 0),
    _kernel(8, -1),
    _kernel(4, -1),
    _kernel(32, -1),
    _kernel(16, -1, warps=4),
    _kernel(16, -1, warps=4, words=512),
    _kernel(64, -1, warps=1, words=512),
    Mode("short prio 0 warps 4 words 512", "short", warps=4, words=512),
    _kernel(2, -1),
)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes_v1 of cuda.h."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("target_location", _Location),
        ("flags", ctypes.c_uint),
    )


class Batch:
    """Pieces of one size that one call moves by copy engines; nothing says in which order."""

    def __init__(self, sources: list[int], targets: list[int], size_bytes: int) -> None:
        words = ctypes.c_uint64 * len(sources)
        self._sources, self._targets = words(*sources), words(*targets)
        self._sizes = words(*[size_bytes] * len(sources))
        self._attributes = _Attributes(source_access_order=_IN_STREAM_ORDER, flags=_BESIDE_COMPUTE)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """By the entry of CUDA 12.8, which newer drivers keep under its name. AttributeError: an older driver."""
        driver._call(
            "cuMemcpyBatchAsync",
            self._targets,
            self._sources,
            self._sizes,
            ctypes.c_size_t(len(self._sources)),
            ctypes.byref(self._attributes),
            ctypes.byref(ctypes.c_size_t(0)),  # the attributes hold from this copy on
            ctypes.c_size_t(1),
            ctypes.byref(ctypes.c_size_t(0)),  # takes the index of what failed
            ctypes.c_void_p(stream.cuda_stream),
        )


class Memories:
    """Paged KV of both GPUs, a plane for K and one for V of each layer, and the ways of moving blocks of it.

    Everything here runs in the copying thread, on its current stream, but for `equal` and `clear`."""

    def __init__(self, sizes: Sizes, here: torch.device, there: torch.device) -> None:
        self.sizes, self.here = sizes, here
        shape = (2 * sizes.layers, sizes.memory_blocks, sizes.piece_bytes // 8)
        self.source = torch.empty(shape, dtype=torch.int64, device=here).random_()
        self.target = torch.zeros(shape, dtype=torch.int64, device=there)
        shuffle = random.Random(1)
        self.ids = [shuffle.sample(range(sizes.memory_blocks), sizes.blocks) for _ in range(2)]
        self.block_ids = torch.tensor(self.ids, dtype=torch.int32, device=here)
        self.planes = [self._planes(memory) for memory in (self.source, self.target)]
        self.tables = [PlaneTable(planes, here).tensor for planes in self.planes]
        self.permit = torch.zeros(2, dtype=torch.int64, device=here)  # always
        self._batch = cache(self._batch_of)  # a call takes milliseconds of Python, which aren't the question
        self.total_bytes = 2 * sizes.layers * sizes.blocks * sizes.piece_bytes

    def _planes(self, memory: torch.Tensor) -> list[Plane]:
        size = self.sizes.piece_bytes
        return [Plane(memory[index].data_ptr(), size, size) for index in range(memory.shape[0])]

    def launch(self, mode: Mode, layers: range, stream: torch.cuda.Stream, *, hurry: bool) -> None:
        """`hurry`: nothing else computes any more."""
        if mode.kind == "batch":
            self._batch(layers).launch(stream)
        elif mode.kind == "planes":
            self._copy_planes(layers, stream)
        else:
            self._copy_by_kernel(mode, layers, hurry=hurry)

    def _copy_by_kernel(self, mode: Mode, layers: range, *, hurry: bool) -> None:
        from twolane.connector.transport.cuda import kernel  # noqa: PLC0415 - needs Triton

        work = 2 * len(layers) * self.sizes.blocks
        programs = max(mode.programs, kernel.NUM_PROGRAMS) if hurry else mode.programs
        kernel._copy[(work if mode.kind == "short" else min(work, programs),)](
            *self.tables,
            self.block_ids,
            self.sizes.blocks,
            2 * layers.start,
            2 * len(layers),
            self.permit,
            tile_words=mode.words,
            num_warps=mode.warps,
        )

    def _batch_of(self, layers: range) -> Batch:
        sources: list[int] = []
        targets: list[int] = []
        for plane in range(2 * layers.start, 2 * layers.stop):
            source, target = (planes[plane] for planes in self.planes)
            sources += [source.base + block * source.stride_bytes for block in self.ids[0]]
            targets += [target.base + block * target.stride_bytes for block in self.ids[1]]
        return Batch(sources, targets, self.sizes.piece_bytes)

    def _copy_planes(self, layers: range, stream: torch.cuda.Stream) -> None:
        for plane in range(2 * layers.start, 2 * layers.stop):
            driver._call(
                "cuMemcpyAsync",
                ctypes.c_uint64(self.planes[1][plane].base),
                ctypes.c_uint64(self.planes[0][plane].base),
                ctypes.c_size_t(self.sizes.blocks * self.sizes.piece_bytes),
                ctypes.c_void_p(stream.cuda_stream),
            )

    def clear(self) -> None:
        self.target.zero_()
        torch.cuda.synchronize(self.target.device)

    def equal(self, mode: Mode) -> bool:
        """Whether a sample of the blocks, in all planes, is where it belongs."""
        torch.cuda.synchronize(self.here)
        step = max(1, self.sizes.blocks // SAMPLE)
        ids = [list(range(self.sizes.blocks))] * 2 if mode.kind == "planes" else self.ids
        found = self.target[:, ids[1][::step]].to(self.here)
        return bool(torch.equal(found, self.source[:, ids[0][::step]]))
