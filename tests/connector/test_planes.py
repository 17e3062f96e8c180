"""Tables of planes, read as the kernel reads them, but on the CPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from twolane.connector.layout import KVLayout, layout_of
from twolane.connector.transport.cuda.planes import Plane, PlaneTable, dense_planes, planes_of

CPU = torch.device("cpu")
NUM_BLOCKS = 6
LAYERS = 3


def memory(shape: tuple[int, ...], *, fill: bool) -> dict[str, torch.Tensor]:
    """Layers of different sizes, so that a confusion shows."""
    shapes = [(*shape[:-1], shape[-1] * (layer + 1)) for layer in range(LAYERS)]
    return {f"layer.{i}": torch.randn(*one) if fill else torch.zeros(*one) for i, one in enumerate(shapes)}


def copy(sources: PlaneTable, targets: PlaneTable, ids: list[tuple[int, int]], planes: range) -> None:
    """What kernel.copy_blocks does."""
    for plane in planes:
        source_base, source_stride, size = map(int, sources.tensor[plane])
        target_base, target_stride, _ = map(int, targets.tensor[plane])
        for source, target in ids:
            ctypes.memmove(target_base + target * target_stride, source_base + source * source_stride, size * 16)


def planes_before(layout: KVLayout) -> list[int]:
    return list(itertools.accumulate((len(region.piece_offsets) for region in layout.regions), initial=0))


@pytest.mark.parametrize("shape", [(NUM_BLOCKS, 2, 4, 8), (2, NUM_BLOCKS, 4, 8)], ids=["one piece", "two pieces"])
@pytest.mark.parametrize(("first", "end"), list(itertools.combinations(range(LAYERS + 1), 2)))
def test_some_layers_go_through_a_dense_buffer_of_their_size(shape: tuple[int, ...], first: int, end: int) -> None:
    source, target = memory(shape, fill=True), memory(shape, fill=False)
    paged = [planes_of(layout_of(kv, NUM_BLOCKS)) for kv in (source, target)]
    layout = layout_of(source, NUM_BLOCKS)
    starts = planes_before(layout)
    own, wanted = [4, 1, 3], [0, 5, 2]
    size_bytes = len(own) * sum(layout.layer_bytes[first:end])
    buffer = torch.full((size_bytes + 64,), 7, dtype=torch.uint8)
    dense = PlaneTable(dense_planes(paged[0], starts[first], starts[end], buffer.data_ptr()), CPU)
    moved = range(starts[first], starts[end])
    copy(PlaneTable(paged[0], CPU), dense, [(block, i) for i, block in enumerate(own)], moved)
    assert bool((buffer[size_bytes:] == 7).all()), "nothing behind the buffer"
    copy(dense, PlaneTable(paged[1], CPU), list(enumerate(wanted)), moved)
    for index, name in enumerate(source):
        mine, theirs = (kv[name].movedim(shape.index(NUM_BLOCKS), 0) for kv in (source, target))
        expected = torch.zeros_like(theirs)
        if first <= index < end:
            expected[wanted] = mine[own]
        assert torch.equal(theirs, expected)


def test_planes_outside_are_empty() -> None:
    planes = planes_of(layout_of(memory((NUM_BLOCKS, 4, 8), fill=True), NUM_BLOCKS))
    assert dense_planes(planes, 1, 2, 4096) == [
        Plane(0, 0, 0),
        Plane(4096, planes[1].size_bytes, planes[1].size_bytes),
        Plane(0, 0, 0),
    ]


def test_memory_that_is_not_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        PlaneTable([Plane(8, 32, 32)], CPU)
