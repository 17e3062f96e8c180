"""Paged memory as the kernel sees it: a table of planes.

A plane is one piece of one layer: block b of it lies at `base + b * stride`, in one run of `size` bytes. A dense buffer
is such a memory too: its blocks are numbered from 0 and `stride` apart.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass
from typing import Self

import torch

from twolane.connector.layout import KVLayout


@dataclass(frozen=True)
class Plane:
    base: int
    stride_bytes: int
    size_bytes: int


class PlaneTable:
    """Planes in device memory: int64 [planes, 3] of (base, stride in bytes, run in 16-byte units)."""

    def __init__(self, planes: list[Plane], device: torch.device) -> None:
        """Raises ValueError if a plane is not aligned to 16 bytes."""
        self.planes = planes
        self.tensor = _rows(planes).to(device)

    @classmethod
    def on_stream(cls, planes: list[Plane], device: torch.device) -> Self:
        """There once the current stream has come so far; doesn't wait for that."""
        table = cls(planes, torch.device("cpu"))
        table.tensor = table.tensor.pin_memory().to(device, non_blocking=True)
        return table


def _rows(planes: list[Plane]) -> torch.Tensor:
    numbers = array("q")  # a tensor of a list takes three times as long, and a push makes one
    for plane in planes:
        if plane.base % 16 or plane.stride_bytes % 16 or plane.size_bytes % 16:
            raise ValueError(f"KV memory is not aligned to 16 bytes: {plane}")
        numbers.extend((plane.base, plane.stride_bytes, plane.size_bytes // 16))
    return torch.frombuffer(numbers, dtype=torch.int64).view(-1, 3)


def planes_of(layout: KVLayout) -> list[Plane]:
    """Layer by layer, the pieces of a layer in order."""
    return [
        Plane(region.base + offset, region.stride_bytes, region.piece_bytes)
        for region in layout.regions
        for offset in region.piece_offsets
    ]


def dense_planes(planes: list[Plane], first: int, end: int, base: int) -> list[Plane]:
    """Planes [first, end) in a buffer at `base`, block after block, under their own numbers: the others are empty."""
    inside = planes[first:end]
    stride_bytes = sum(plane.size_bytes for plane in inside)
    starts = itertools.accumulate((plane.size_bytes for plane in inside), initial=base)
    dense = [Plane(start, stride_bytes, plane.size_bytes) for start, plane in zip(starts, inside, strict=False)]
    nowhere = Plane(0, 0, 0)
    return [nowhere] * first + dense + [nowhere] * (len(planes) - end)
