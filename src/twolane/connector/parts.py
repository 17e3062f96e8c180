"""What one push moves of a transfer, and how far a transfer has come. Pure; both sides use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from twolane.connector.messages import Push
from twolane.connector.transport.base import Extent, Items
from twolane.errors import TransferError


@dataclass(frozen=True)
class Part:
    """Some layers of some blocks of a transfer, which are numbered from the first announced; see messages.Push."""

    first_block: int
    num_blocks: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.first_block == 0 and self.layers.start == 0

    @classmethod
    def from_wire(cls, push: Push, num_layers: int) -> Self:
        """`num_layers`: of the KV. Raises TransferError for numbers that can't be."""
        made = cls(push.first_block, push.num_blocks, range(push.first_layer, push.first_layer + push.num_layers))
        if made.first_block < 0 or made.num_blocks < 1 or not 0 <= made.layers.start < made.layers.stop <= num_layers:
            raise TransferError(f"a push of {made}, where there are {num_layers} layers")
        return made

    @property
    def on_the_wire(self) -> tuple[int, int, int, int]:
        """As in messages.Push."""
        return self.first_block, self.num_blocks, self.layers.start, len(self.layers)

    def size_bytes(self, layer_bytes: list[int]) -> int:
        """`layer_bytes`: of one block, layer by layer."""
        return Extent(self.num_blocks, self.layers).size_bytes(layer_bytes)

    def of(self, block_ids: list[int]) -> Items:
        return Items(block_ids[self.first_block : self.first_block + self.num_blocks], self.layers)


@dataclass
class Cursor:
    """How far a transfer has come: past all layers of the blocks before `block`, and past the layers before `layer` of
    the `num_open` blocks from there on."""

    num_layers: int
    block: int = 0
    num_open: int = 0
    layer: int = 0

    def is_at(self, part: Part) -> bool:
        """Whether that comes next."""
        if (part.first_block, part.layers.start) != (self.block, self.layer):
            return False
        is_right_size = part.num_blocks == self.num_open if self.layer else part.num_blocks > 0
        return is_right_size and self.layer < part.layers.stop <= self.num_layers

    def pass_by(self, part: Part) -> None:
        if part.layers.stop == self.num_layers:
            self.block, self.num_open, self.layer = self.block + part.num_blocks, 0, 0
        else:
            self.num_open, self.layer = part.num_blocks, part.layers.stop
