"""Copies items between KV memory and a staging buffer in host memory."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from twolane.connector.layout import KVLayout
from twolane.connector.transport.base import Items
from twolane.errors import ConfigError


class Copier(Protocol):
    """`address` is where the staging bytes begin in this process. Both return the bytes copied, and only when done."""

    def fence(self) -> None:
        """Engine's thread: a later gather waits for what the current compute stream holds now."""
        ...

    def gather(self, address: int, items: Items) -> int: ...

    def scatter(self, address: int, items: Items) -> int: ...


class HostCopier:
    """KV in host memory (vLLM's CPU engine): one memmove a piece, which ctypes runs without the GIL."""

    def __init__(self, layout: KVLayout) -> None:
        self._regions = layout.regions
        self._num_blocks = layout.num_blocks

    def fence(self) -> None:
        """The CPU engine's forward pass is over when it returns."""

    def gather(self, address: int, items: Items) -> int:
        return self._copy(address, items, to_staging=True)

    def scatter(self, address: int, items: Items) -> int:
        return self._copy(address, items, to_staging=False)

    def _copy(self, address: int, items: Items, *, to_staging: bool) -> int:
        cursor = address
        for block, layer in items:
            assert 0 <= block < self._num_blocks  # ids come from the scheduler; a stray write would corrupt others
            region = self._regions[layer]
            start = region.base + block * region.stride_bytes
            for offset in region.piece_offsets:
                if to_staging:
                    ctypes.memmove(cursor, start + offset, region.piece_bytes)
                else:
                    ctypes.memmove(start + offset, cursor, region.piece_bytes)
                cursor += region.piece_bytes
        return cursor - address


def copier_for(layout: KVLayout, kv_caches: dict[str, Any]) -> Copier:
    """The copier for the memory the KV lies in. Raises ConfigError where there is none."""
    if layout.device == "cpu":
        return HostCopier(layout)
    if layout.device.startswith("cuda"):
        from twolane.connector.transport.cuda_copier import CudaCopier  # noqa: PLC0415 - needs torch with CUDA

        return CudaCopier(layout, kv_caches)
    raise ConfigError(f"KV caches on {layout.device}: transport shm moves KV of cpu and cuda only.")
