"""Where a block's bytes are: vLLM's KV tensors reduced to addresses, by shape and stride alone.

The layouts differ by vLLM release and attention backend: (B, 2, N, H, D), (2, B, N, H, D), (B, H, N, 2D), MLA's
(B, N, D), in any stride order. All that a transfer needs is which dimension counts blocks and that what lies inside a
block is dense; nothing else is assumed, and the bytes stay opaque.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twolane.errors import ConfigError


@dataclass(frozen=True)
class Region:
    """One layer's KV. Piece p of block b is the `piece_bytes` bytes at `base + piece_offsets[p] + b * stride_bytes`."""

    name: str
    base: int
    piece_offsets: tuple[int, ...]
    stride_bytes: int
    piece_bytes: int

    @property
    def item_bytes(self) -> int:
        """One block of this layer, all pieces."""
        return len(self.piece_offsets) * self.piece_bytes


@dataclass(frozen=True)
class KVLayout:
    """The KV memory of one worker. `device` as torch names it, `cpu` or `cuda:0`."""

    device: str
    num_blocks: int
    regions: tuple[Region, ...]

    @property
    def layer_bytes(self) -> list[int]:
        """Of one block, layer by layer."""
        return [region.item_bytes for region in self.regions]

    @property
    def max_item_bytes(self) -> int:
        return max(self.layer_bytes)

    def signature(self) -> list[tuple[int, int]]:
        """What the other side must have too: per layer (pieces a block, bytes a piece)."""
        return [(len(region.piece_offsets), region.piece_bytes) for region in self.regions]


def find_region(
    name: str, base: int, shape: Sequence[int], strides: Sequence[int], *, itemsize: int, num_blocks: int
) -> Region:
    """One tensor's Region. `strides` in elements, as torch gives them.

    A backend may split one of the manager's blocks in several kernel blocks; then the dimension is a multiple of
    `num_blocks`. Raises ConfigError where there is no block dimension or a block is not dense.
    """
    described = f"KV cache of {name}: shape {tuple(shape)}, strides {tuple(strides)}, {num_blocks} blocks"
    dim = next((d for d in range(min(2, len(shape))) if shape[d] and shape[d] % num_blocks == 0), None)
    if dim is None:
        raise ConfigError(f"{described}: no block dimension found; TwoLane can't move this layout.")
    stride = strides[dim]
    inner = [d for d in range(len(shape)) if d != dim and strides[d] < stride]
    outer = [d for d in range(len(shape)) if d != dim and strides[d] >= stride and shape[d] > 1]
    if math.prod(shape[d] for d in inner) != stride:
        raise ConfigError(f"{described}: a block is not dense in memory; TwoLane can't move this layout.")
    offsets = tuple(
        itemsize * sum(index * strides[d] for index, d in zip(indices, outer, strict=True))
        for indices in itertools.product(*(range(shape[d]) for d in outer))
    )
    block_bytes = stride * itemsize * (shape[dim] // num_blocks)
    return Region(name, base, offsets, block_bytes, block_bytes)


def layout_of(kv_caches: Mapping[str, Any], num_blocks: int) -> KVLayout:
    """The layout of vLLM's `register_kv_caches` argument (layer name -> tensor), in its order.

    Layers that share one tensor (cross-layer KV sharing) are moved once.
    """
    regions: list[Region] = []
    seen: set[int] = set()
    devices: set[str] = set()
    for name, tensor in kv_caches.items():
        if not hasattr(tensor, "data_ptr"):
            raise ConfigError(f"KV cache of {name} is no single tensor (state-space layer?); TwoLane can't move it.")
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        devices.add(str(tensor.device))
        regions.append(
            find_region(
                name,
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
                itemsize=tensor.element_size(),
                num_blocks=num_blocks,
            )
        )
    if len(devices) != 1:
        raise ConfigError(f"KV caches lie on {sorted(devices) or 'no device'}; TwoLane needs them on one device.")
    return KVLayout(devices.pop(), num_blocks, tuple(regions))
