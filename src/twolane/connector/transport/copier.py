"""What moves bytes between KV memory and a staging slot in host memory, and knows when a forward pass is through."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Protocol

from twolane.connector.layout import KVLayout
from twolane.connector.transport.base import Fence, Items, Ticket, Wake
from twolane.connector.transport.pace import Forecast, Pace, PassSize, marks_every


class Copier(Protocol):
    """`begin_pass`, `layer_done`, `fence`, `quiesce`: engine's thread, as in base.SendTransports; `passes` too, as in
    ReceiveTransports.fence. The rest: agent's thread. Slots begin at `address` in this process."""

    slot_bytes: int  # what suits this memory, where nothing else is asked for

    @property
    def num_passes(self) -> int: ...  # see base.SendTransports

    @property
    def forecasts(self) -> Sequence[Forecast]: ...

    def begin_pass(self, size: PassSize) -> None: ...

    def layer_done(self, layer_name: str) -> None: ...

    def fence(self) -> Fence: ...

    def quiesce(self) -> None: ...

    def passes(self) -> Ticket: ...

    def bind(self) -> None:
        """Makes the device current in the calling thread, so that a fence can be asked there."""
        ...

    def pin(self, address: int, size_bytes: int) -> None:
        """Announces memory of slots that the device may read and write; until `unpin`."""
        ...

    def unpin(self, address: int) -> None: ...

    def gather(self, address: int, items: Items, fence: Fence) -> Ticket:
        """From KV memory into the slot, behind the fence."""
        ...

    def scatter(self, address: int, items: Items) -> Ticket:
        """From the slot into KV memory."""
        ...

    def poll(self) -> None: ...

    def close(self) -> None: ...


class HostCopier:
    """KV in host memory (vLLM's CPU engine): one memmove a piece, which ctypes runs without the GIL.

    A forward pass on the CPU is over when it returns, and a copy is over when it returns: nothing is ever in flight.
    """

    slot_bytes = 8 << 20

    def __init__(self, layout: KVLayout, wake: Wake) -> None:
        self._regions = layout.regions
        self._num_blocks = layout.num_blocks
        self._layer_index = {region.name: index for index, region in enumerate(layout.regions)}
        self._marks_every = marks_every(len(layout.regions))
        self._pace = Pace()
        self._wake = wake
        self.num_passes = 0

    @property
    def forecasts(self) -> Sequence[Forecast]:
        return [self._pace.forecast] if self._pace.forecast else []

    def begin_pass(self, size: PassSize) -> None:
        """Passes are long here: their layers tell early enough."""

    def layer_done(self, layer_name: str) -> None:
        index = self._layer_index.get(layer_name)
        if index is None or (index + 1) % self._marks_every:
            return
        if self._pace.mark(self.num_passes, (index + 1) / len(self._layer_index), time.monotonic()):
            self._wake()

    def fence(self) -> Fence:
        self.num_passes += 1
        return Fence()

    def quiesce(self) -> None: ...

    def passes(self) -> Ticket:
        return Ticket(0, done=True)

    def bind(self) -> None: ...

    def pin(self, address: int, size_bytes: int) -> None: ...

    def unpin(self, address: int) -> None: ...

    def gather(self, address: int, items: Items, fence: Fence) -> Ticket:  # noqa: ARG002 - the pass is over
        return self._copy(address, items, to_staging=True)

    def scatter(self, address: int, items: Items) -> Ticket:
        return self._copy(address, items, to_staging=False)

    def _copy(self, address: int, items: Items, *, to_staging: bool) -> Ticket:
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
        return Ticket(cursor - address, done=True)

    def poll(self) -> None: ...

    def close(self) -> None: ...
