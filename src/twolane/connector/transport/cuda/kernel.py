"""The kernels of the GPU transports. One copies blocks between two paged memories, layer by layer, in one launch;
source and target are tables of planes, see planes.py. The other tells the target's GPU that all are there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from twolane.connector.transport.cuda.planes import PlaneTable

# Enough programs to fill an NVLink (measured, docs/GPU.md), few enough to leave most of the GPU to the forward pass.
NUM_PROGRAMS = 64
FOLLOWING_PROGRAMS = 16  # 311 of the 360 GB/s that 64 make, for a quarter of the GPU's time
_TILE_WORDS = 2048  # 16 KiB a turn and program
_NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_blocks", "first_plane", "num_planes"])  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    sources,  # int64 [planes, 3]
    targets,  # int64 [planes, 3]
    block_ids,  # int32 [2, num_blocks]: of the source, of the target
    num_blocks,
    first_plane,
    num_planes,
    permit,  # int64 [2]: address of a word, 0 for none; and what it must hold
    tile_words: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    word, value = tl.load(permit), tl.load(permit + 1)
    found = value
    if word != 0:
        found = tl.load(word.to(tl.pointer_type(tl.int64)), volatile=True)
    if found == value:
        for work in range(program, num_blocks * num_planes, num_programs):
            row = (first_plane + work // num_blocks) * 3
            block = work % num_blocks
            source_block = tl.load(block_ids + block).to(tl.int64)
            target_block = tl.load(block_ids + num_blocks + block).to(tl.int64)
            source = tl.load(sources + row) + source_block * tl.load(sources + row + 1)
            target = tl.load(targets + row) + target_block * tl.load(targets + row + 1)
            # Told of the pointers: of the integers it is lost in the cast, and words are moved one by one.
            source_words = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
            target_words = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
            num_words = tl.load(sources + row + 2) * 2
            for start in range(0, num_words, tile_words):
                offsets = start + tl.arange(0, tile_words)
                mask = offsets < num_words
                tl.store(target_words + offsets, tl.load(source_words + offsets, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["address", "value"])
def _open(  # type: ignore[no-untyped-def]
    address,
    value,
    permit,  # as above
    scratch,  # int64 [1]
):
    word, allowed = tl.load(permit), tl.load(permit + 1)
    found = allowed
    if word != 0:
        found = tl.load(word.to(tl.pointer_type(tl.int64)), volatile=True)
    # A fence between the bytes of the kernels before and the word. On memory of our own: not every link has atomics.
    tl.atomic_add(scratch, 1, sem="acq_rel", scope="sys")
    if found == allowed:
        tl.store(address.to(tl.pointer_type(tl.int64)), value)


_FIRST_VALUE = 1 << 40  # Triton compiles anew for an integer that fits into 32 bits


def open_gate(address: int, value: int, permit: torch.Tensor, scratch: torch.Tensor) -> None:
    """Enqueued on the current stream: the 64-bit word at the address, on whichever GPU, becomes `gate_value(value)`
    once the copies before are there. `permit` as in copy_blocks; `scratch`: a word of this GPU that nobody reads."""
    _open[(1,)](address, gate_value(value), permit, scratch, num_warps=1)


def gate_value(value: int) -> int:
    """What stands for it in a word."""
    return _FIRST_VALUE + value


def permit_of(address: int, value: int, device: torch.device) -> torch.Tensor:
    """For copy_blocks: the copy is allowed while the 64-bit word at `address` holds `value`; address 0: always."""
    return torch.tensor([address, value], dtype=torch.int64, device=device)


def copy_blocks(
    sources: PlaneTable,
    targets: PlaneTable,
    block_ids: torch.Tensor,  # int32 [2, num_blocks], device memory: source ids, target ids
    *,
    first_plane: int,
    num_planes: int,
    permit: torch.Tensor,
    num_programs: int | None = None,
) -> None:
    """Enqueued on the current stream. `permit` (see permit_of): nothing is written unless the word at that address
    holds the value when the kernel begins."""
    num_blocks = block_ids.shape[1]
    work = max(1, num_blocks * num_planes)
    _copy[(min(work, num_programs or NUM_PROGRAMS),)](
        sources.tensor,
        targets.tensor,
        block_ids,
        num_blocks,
        first_plane,
        num_planes,
        permit,
        tile_words=_TILE_WORDS,
        num_warps=_NUM_WARPS,
    )
