"""The contract of a transport: it moves items (one layer of one block) from P's KV memory to D's.

The two sides decide what moves and when; a transport only moves bytes. There are two ways:

staged   P copies items into a slot, says Push(slot); D copies them out and gives the slot back with Credit. D alone
         writes to D's KV memory.
         Where P's slots aren't D's to look into (`tcp`), the bytes travel apart from Push.
direct   P writes into D's KV memory itself and says Push without a slot once the bytes are there. D must not give its
         blocks away before P has said that it writes no more, or P is dead, or D has revoked P's permission.

Everything here is called by the agent's thread under the agent's lock, except what says "engine's thread". A movement
that was begun is a Ticket; `poll` marks it done. Tickets of one channel become done in the order they were begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from twolane.connector.messages import GateWord, TransportOffer
from twolane.connector.transport.pace import Forecast, PassSize

Wake = Callable[[], None]  # from any thread: some ticket may be done


@dataclass(frozen=True)
class Items:
    """Some layers of some blocks, `blocks` being their ids; in a slot block by block, layers inside a block."""

    blocks: list[int]
    layers: range

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(block id, layer)"""
        for block in self.blocks:
            for layer in self.layers:
                yield block, layer

    @property
    def count(self) -> int:
        return len(self.blocks) * len(self.layers)

    def size_bytes(self, layer_bytes: Sequence[int]) -> int:
        """`layer_bytes`: of one item of each layer."""
        return Extent(len(self.blocks), self.layers).size_bytes(layer_bytes)


class Fence:
    """A forward pass that was launched; a push behind it reads what it computes. Transports that must wait for a
    device make their own; this one stands for a pass that was over when it was launched."""

    def is_over(self) -> bool:
        return True


class Extent(NamedTuple):
    """How many blocks, and which of their layers. False where that is nothing."""

    num_blocks: int
    layers: range

    def __bool__(self) -> bool:
        return self.num_blocks > 0 and len(self.layers) > 0

    def size_bytes(self, layer_bytes: Sequence[int]) -> int:
        """`layer_bytes`: of one block, layer by layer."""
        return self.num_blocks * sum(layer_bytes[self.layers.start : self.layers.stop])


NO_ROOM = Extent(0, range(0))


def extent_of_slot(
    layer_bytes: Sequence[int], slot_bytes: int, num_blocks: int, first_layer: int, fence: Fence
) -> Extent:
    """What a slot holds of `num_blocks` blocks whose layers before `first_layer` have gone.

    Whole blocks, and of a block larger than a slot some layers. While the fence's pass computes: some layers of as many
    blocks as possible instead, so that they can go before the next are computed. What was begun so goes on so.
    """
    if first_layer == 0 and fence.is_over():
        if whole := slot_bytes // sum(layer_bytes):
            return Extent(min(whole, num_blocks), range(len(layer_bytes)))
        num_blocks = 1
    elif first_layer == 0:
        num_blocks = min(num_blocks, slot_bytes // max(layer_bytes))
    ends = itertools.accumulate(layer_bytes[first_layer:])
    num_layers = sum(1 for end in ends if end * num_blocks <= slot_bytes)
    return Extent(num_blocks, range(first_layer, first_layer + num_layers))


@dataclass(eq=False)
class Ticket:
    """A movement of bytes. Until `done`, both the KV memory and the slot belong to the transport.

    `slot`: where D finds the bytes, a number that this connection never uses again; None if they are in D's blocks
    already. `error`: why it failed, when `done`. `is_intact`: asked of a read that is done; whether the slot held P's
    bytes until then. P gives the slots of a D that is gone, or hangs, to others, and D may find that out late.
    `ready_at_s`, `done_at_s`: when the sources were computed and when the bytes had moved, where the transport knows
    better than who polls.
    """

    size_bytes: int
    slot: int | None = None
    done: bool = False
    error: str = ""
    ready_at_s: float | None = None
    done_at_s: float | None = None
    is_intact: Callable[[], bool] = field(default=lambda: True, repr=False)


class Opening(NamedTuple):
    """A transfer's last push sets the gate as soon as it and these of the same transfer, begun before it, are done."""

    gate: GateWord
    after: list[Ticket]


class Gate(Protocol):
    """One transfer's: D's GPU waits there for the last byte, so that D may launch what reads it before it is there."""

    word: GateWord

    @property
    def is_kept(self) -> bool:
        """P has said that it will open it."""
        ...

    def hold(self) -> None:
        """Engine's thread: what is enqueued on the current stream from now on waits until it is open."""
        ...

    def close(self) -> None:
        """The transfer is over, and P can't open it any more: nobody waits any longer, and it may be another's."""
        ...


class SendChannel(Protocol):
    """P's half towards one D worker."""

    @property
    def error(self) -> str:
        """Why nothing can be pushed any more, though D may live; D has to connect anew. Empty: it can."""
        ...

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        """What one push may hold now of `num_blocks` blocks behind the fence, whose layers before `first_layer` have
        gone; see extent_of_slot. NO_ROOM: nothing until a slot comes back."""
        ...

    def push(self, sources: Items, targets: Items, fence: Fence, opening: Opening | None = None) -> Ticket:
        """Begins to move P's `sources` to D's `targets`, as much as `room` said, behind the fence. `opening`: not for
        staged transports."""
        ...

    def release(self, slot: int) -> None:
        """D gave the slot back. Ignored for a slot that isn't this peer's."""
        ...

    def close(self) -> None:
        """The peer is gone for good: its slots are free, its memory is unmapped. Open tickets end with an error."""
        ...


class SendTransports(Protocol):
    """All that one P worker can send with."""

    def open(self, offers: list[TransportOffer], pid: int, host: str) -> tuple[SendChannel, TransportOffer]:
        """The best of what D offers, and what D needs to attach. Raises TransferError, which says why none will do."""
        ...

    def begin_pass(self, size: PassSize) -> None:
        """Engine's thread: a forward pass of that size is about to be launched."""
        ...

    def layer_done(self, layer_name: str) -> None:
        """Engine's thread: the forward pass of this layer was launched."""
        ...

    def fence(self) -> Fence:
        """Engine's thread: a forward pass was launched to its end."""
        ...

    @property
    def num_passes(self) -> int:
        """Engine's thread: forward passes launched to their end; the number of the next one."""
        ...

    @property
    def forecasts(self) -> Sequence[Forecast]:
        """When the latest passes will be through, where that is known: as others of their size were, if that is soon,
        or as their layers are, once enough of them are."""
        ...

    def quiesce(self) -> None:
        """Engine's thread: the forward passes launched from now on overwrite nothing that is still being read."""
        ...

    def poll(self) -> None:
        """Marks tickets that are done."""
        ...

    def take_refused(self) -> int:
        """Frames that belonged to nothing and were thrown away, since the last call."""
        ...

    def close(self) -> None: ...


class ReceiveChannel(Protocol):
    """D's half towards one P worker; made before the handshake."""

    @property
    def offers(self) -> list[TransportOffer]:
        """What D can receive with, best first; travels in Hello."""
        ...

    @property
    def direct(self) -> bool:
        """Whether P may be writing to D's memory. True until `attach` has said otherwise."""
        ...

    def attach(self, chosen: TransportOffer, pid: int) -> None:
        """P's choice. Raises TransferError where it can't be used."""
        ...

    def gate(self) -> Gate | None:
        """For one transfer; the caller closes it. None where there is none."""
        ...

    def read(self, slot: int, items: Items) -> Ticket:
        """Begins to copy the slot's bytes into D's KV memory, once they are there: they and word of them may come in
        either order. Raises TransferError for a slot that can't be. Slots are read or discarded in P's order."""
        ...

    def discard(self, slot: int, size_bytes: int) -> Ticket:
        """Nobody wants the slot's bytes, here already or still on their way. The slot is P's again once it is done.
        Raises TransferError for a slot that can't be."""
        ...

    def revoke(self) -> float:
        """P may write no more, whatever state it is in. Returns after how many seconds no write can land any more."""
        ...

    def close(self) -> None: ...


class ReceiveTransports(Protocol):
    """All that one D worker can receive with."""

    def open(self, without: Container[str] = ()) -> ReceiveChannel:
        """`without`: names of transports that didn't work with this P; heeded while there are others."""
        ...

    def fence(self) -> Ticket:
        """Engine's thread: done when every forward pass launched so far is through. Blocks that the scheduler gives
        to a new request may still be written by such a pass for the request that had them before."""
        ...

    def poll(self) -> None:
        """Marks tickets that are done."""
        ...

    def take_refused(self) -> int:
        """Frames that belonged to nothing and were thrown away, since the last call."""
        ...

    def close(self) -> None: ...
