"""KV tensors reduced to addresses: every layout vLLM is known to use, checked against torch's own indexing."""

from __future__ import annotations

import ctypes

import pytest
import torch

from twolane.connector.layout import KVLayout, layout_of
from twolane.errors import ConfigError

NUM_BLOCKS = 6


def block_bytes(layout: KVLayout, layer: int, block: int) -> bytes:
    region = layout.regions[layer]
    start = region.base + block * region.stride_bytes
    return b"".join(ctypes.string_at(start + offset, region.piece_bytes) for offset in region.piece_offsets)


LAYOUTS = {
    "cpu 0.32: (B, H, N, 2D)": (torch.arange(6 * 3 * 16 * 8).view(6, 3, 16, 8), 0),
    "flash attention: (B, 2, N, H, D)": (torch.arange(6 * 2 * 16 * 3 * 4).view(6, 2, 16, 3, 4), 0),
    "older flash attention: (2, B, N, H, D)": (torch.arange(2 * 6 * 16 * 3 * 4).view(2, 6, 16, 3, 4), 1),
    "MLA: (B, N, D)": (torch.arange(6 * 16 * 20).view(6, 16, 20), 0),
    "0.26 on GPUs: logical (B, H, N, 2D), heads inside slots": (
        torch.arange(6 * 16 * 3 * 8).view(6, 16, 3, 8).permute(0, 2, 1, 3),
        0,
    ),
    "two kernel blocks a block": (torch.arange(12 * 3 * 8 * 8).view(12, 3, 8, 8), 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_is_found_whatever_the_layout(name: str) -> None:
    tensor, dim = LAYOUTS[name]
    layout = layout_of({"layer": tensor}, NUM_BLOCKS)
    per_block = tensor.shape[dim] // NUM_BLOCKS
    for block in range(NUM_BLOCKS):
        expected = tensor.narrow(dim, block * per_block, per_block)
        found = torch.frombuffer(bytearray(block_bytes(layout, 0, block)), dtype=tensor.dtype)
        assert sorted(found.tolist()) == sorted(expected.flatten().tolist())


def test_layers_that_share_memory_are_moved_once() -> None:
    tensor = torch.zeros(NUM_BLOCKS, 4)
    assert len(layout_of({"a": tensor, "b": tensor}, NUM_BLOCKS).layer_bytes) == 1


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(7, 5, 16), "no block dimension"),
        (torch.zeros(NUM_BLOCKS, 4, 8)[:, :, :4], "not dense"),
        ([torch.zeros(NUM_BLOCKS, 4)], "no single tensor"),
    ],
)
def test_a_layout_that_cannot_be_moved_is_refused_by_name(tensor: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"KV cache of layer.*{message}"):
        layout_of({"layer": tensor}, NUM_BLOCKS)
