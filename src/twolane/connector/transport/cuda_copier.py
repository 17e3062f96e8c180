"""Copies items between GPU memory and a staging buffer in host memory, through a device buffer of one slot.

The plain way: one device-side copy an item, one copy over PCIe a slot. It makes transport `shm` work on GPUs; direct
GPU-to-GPU transports are what a GPU machine should run on.
"""

from __future__ import annotations

import ctypes

import torch

from twolane.connector.layout import KVLayout, Region
from twolane.connector.transport.base import Items


def _block_views(region: Region, tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """One uint8 view [num_blocks, piece_bytes] a piece, over the tensor's own memory."""
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    return [
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            storage, start + offset, (num_blocks, region.piece_bytes), (region.stride_bytes, 1)
        )
        for offset in region.piece_offsets
    ]


def _host_bytes(address: int, size_bytes: int) -> torch.Tensor:
    """A uint8 view of host memory; valid as long as the caller keeps that memory mapped."""
    return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)


class CudaCopier:
    """Owns a stream, an event and a device buffer that grows to the largest slot seen."""

    def __init__(self, layout: KVLayout, kv_caches: dict[str, torch.Tensor]) -> None:
        self._device = torch.device(layout.device)
        self._views = [_block_views(region, kv_caches[region.name], layout.num_blocks) for region in layout.regions]
        self._item_bytes = [region.item_bytes for region in layout.regions]
        self._stream = torch.cuda.Stream(self._device)
        self._computed = torch.cuda.Event()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)

    def fence(self) -> None:
        self._computed.record(torch.cuda.current_stream(self._device))

    def gather(self, address: int, items: Items) -> int:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._computed)
            size = self._device_copies(items, to_buffer=True)
            _host_bytes(address, size).copy_(self._buffer[:size], non_blocking=True)
            self._stream.synchronize()
        return size

    def scatter(self, address: int, items: Items) -> int:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            size = self._reserve(items)
            self._buffer[:size].copy_(_host_bytes(address, size), non_blocking=True)
            self._device_copies(items, to_buffer=False)
            self._stream.synchronize()
        return size

    def _reserve(self, items: Items) -> int:
        size = sum(self._item_bytes[layer] for _, layer in items)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return size

    def _device_copies(self, items: Items, *, to_buffer: bool) -> int:
        size, cursor = self._reserve(items), 0
        for block, layer in items:
            for view in self._views[layer]:
                piece = self._buffer[cursor : cursor + view.shape[1]]
                if to_buffer:
                    piece.copy_(view[block], non_blocking=True)
                else:
                    view[block].copy_(piece, non_blocking=True)
                cursor += view.shape[1]
        return size
