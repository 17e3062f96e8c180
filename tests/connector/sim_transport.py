"""KV memory and transports of the simulated world (sim_world.py). Nothing moves by itself: every movement is an Op that
the world begins and lands when it likes, as a GPU's streams would.

The staged ways are the real ones (`transport/shm.py` over shared memory, `transport/tcp.py` over sim_network.py) with a
copier that takes its time. The direct way
stands for `cuda_ipc`: a kernel looks at D's permission when it begins, and its bytes land up to GRACE_S later.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from twolane.connector.layout import KVLayout, Region
from twolane.connector.transport.base import Extent, Fence, Items, Opening, Ticket
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay, SendWay
from twolane.connector.transport.pace import Forecast, PassSize
from twolane.connector.transport.shm import ShmReceive, ShmReceiveHalf, ShmSend, ShmSendChannel
from twolane.errors import TransferError

LAYERS = 2
BLOCK_SIZE = 2
NUM_BLOCKS = 8
ITEM_BYTES = 8
SLOT_ITEMS = 3  # one block, or one layer of three
GRACE_S = 0.25

Content = tuple[str, int, int]  # whose KV: (prompt, block of it, how many slots of the block hold it)
NOTHING: Content = ("nothing", 0, 0)
_ENGINE = object()  # owner of the engine's forward passes

LAYOUT = KVLayout(
    "cpu", NUM_BLOCKS, tuple(Region(f"layer.{i}", 0, (0,), ITEM_BYTES, ITEM_BYTES) for i in range(LAYERS))
)


class StillComputing(Fence):
    def is_over(self) -> bool:
        return False


class Codes:
    """Content as 8 bytes in shared memory."""

    def __init__(self) -> None:
        self._contents: list[Content] = [NOTHING]

    def put(self, address: int, contents: list[Content]) -> None:
        for content in contents:
            if content not in self._contents:
                self._contents.append(content)
        numbers = (ctypes.c_uint64 * len(contents))(*map(self._contents.index, contents))
        ctypes.memmove(address, numbers, len(contents) * ITEM_BYTES)

    def get(self, address: int, count: int) -> list[Content]:
        return [self._contents[number] for number in (ctypes.c_uint64 * count).from_address(address)]


class Memory:
    """(block, layer) -> content. `may_write` is asked before a transfer's bytes land in a block."""

    def __init__(self, may_write: Callable[[int], None]) -> None:
        self.items: dict[tuple[int, int], Content] = {}
        self.may_write = may_write

    def fill(self, block: int, content: Content) -> None:
        """All layers, by the engine."""
        self.items |= {(block, layer): content for layer in range(LAYERS)}

    def read(self, items: Items) -> list[Content]:
        return [self.items.get(item, NOTHING) for item in items]

    def land(self, items: Items, contents: list[Content]) -> None:
        for item, content in zip(items, contents, strict=True):
            self.may_write(item[0])
            self.items[item] = content


@dataclass(eq=False)
class Op:
    """A movement. `begin` may say that nothing moves; `land` moves the bytes; `capture` reads them ahead of that."""

    ticket: Ticket
    owner: object
    begin: Callable[[], bool]
    land: Callable[[], None]
    capture: Callable[[], None] = lambda: None
    touches: range = range(0)  # addresses in shared memory
    begun_at_s: float | None = None
    through: bool = False

    def advance(self, now_s: float) -> None:
        """One step of two."""
        if self.begun_at_s is None:
            self.begun_at_s = now_s
            self.through = not self.begin()
        elif not self.through:
            self.land()
            self.through = True


class SimCopier:
    """transport.copier.Copier."""

    slot_bytes = SLOT_ITEMS * ITEM_BYTES

    def __init__(self, memory: Memory, codes: Codes) -> None:
        self.memory = memory
        self.ops: list[Op] = []
        self.num_passes = 0
        self.forecasts: list[Forecast] = []
        self._codes = codes

    def begin_pass(self, size: PassSize) -> None: ...

    def layer_done(self, layer_name: str) -> None: ...

    def fence(self) -> Fence:
        """Every other pass goes on computing."""
        self.num_passes += 1
        return Fence() if self.num_passes % 2 else StillComputing()

    def quiesce(self) -> None:
        for op in self.ops:
            op.capture()

    def launch(self, land: Callable[[], None]) -> None:
        """A forward pass of D's engine."""
        self.ops.append(Op(Ticket(0), _ENGINE, lambda: True, land))

    def passes(self) -> Ticket:
        ticket = Ticket(0, done=not any(op.owner is _ENGINE for op in self.ops))
        if not ticket.done:
            self.ops.append(Op(ticket, _ENGINE, lambda: False, lambda: None))
        return ticket

    def bind(self) -> None: ...

    def pin(self, address: int, size_bytes: int) -> None: ...

    def unpin(self, address: int) -> None:
        assert not any(address <= op.touches.start < address + (1 << 20) for op in self.ops), "unmapped in mid-copy"

    def gather(self, address: int, items: Items, fence: Fence) -> Ticket:
        return self.send(items, lambda contents: self._codes.put(address, contents), lambda: True, self, address)

    def send(
        self,
        items: Items,
        sink: Callable[[list[Content]], None],
        begin: Callable[[], bool],
        owner: object,
        address: int = 0,
    ) -> Ticket:
        captured: list[Content] = []
        ticket = Ticket(items.count * ITEM_BYTES)

        def capture() -> None:
            if not captured:
                captured.extend(self.memory.read(items))

        def land() -> None:
            capture()
            sink(captured)

        touches = range(address, address + items.count * ITEM_BYTES)
        self.ops.append(Op(ticket, owner, begin, land, capture, touches))
        return ticket

    def scatter(self, address: int, items: Items) -> Ticket:
        ticket = Ticket(items.count * ITEM_BYTES)

        def land() -> None:
            self.memory.land(items, self._codes.get(address, items.count))

        touches = range(address, address + items.count * ITEM_BYTES)
        self.ops.append(Op(ticket, self, lambda: True, land, touches=touches))
        return ticket

    def throw_away(self, slot: int) -> Ticket:
        ticket = Ticket(0, slot)
        self.ops.append(Op(ticket, self, lambda: True, lambda: None))
        return ticket

    def poll(self) -> None:
        """Tickets of one owner become done in the order they were begun."""
        blocked: set[int] = set()
        waiting = []
        for op in self.ops:
            if op.through and id(op.owner) not in blocked:
                op.ticket.done = True
            else:
                blocked.add(id(op.owner))
                waiting.append(op)
        self.ops = waiting

    def close(self) -> None: ...


class SimShmSend(ShmSend):
    """Remembers what each loan holds."""

    sizes: ClassVar[dict[int, int]] = {}

    def lend(self, index: int, channel: ShmSendChannel, items: Items, fence: Fence) -> Ticket:
        ticket = super().lend(index, channel, items, fence)
        assert ticket.slot is not None
        self.sizes[ticket.slot] = ticket.size_bytes
        return ticket


class SimShmReceive(ShmReceive):
    """The world's pids aren't real: all arenas are this process's."""

    def open(self) -> ShmReceiveHalf:
        return SimShmReceiveHalf(self._layout, self._copier)


class SimShmReceiveHalf(ShmReceiveHalf):
    def attach(self, data: dict[str, Any], pid: int) -> None:
        super().attach(data, os.getpid())

    def discard(self, slot: int, size_bytes: int) -> Ticket:
        """Of every other slot at once, as `shm`'s; else it takes its time, as `nccl`'s."""
        assert size_bytes == SimShmSend.sizes[slot], "as much is thrown away as P has sent"
        if slot % 2:
            return Ticket(0, slot, done=True)
        assert isinstance(self._copier, SimCopier)
        return self._copier.throw_away(slot)


class DirectReceive(ReceiveWay):
    """hub.ReceiveWay. Who may write is what `permits` holds."""

    name = "direct"

    targets: ClassVar[dict[int, DirectReceive]] = {}  # by what an offer says; the world empties it

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.permits: set[int] = set()
        self.num_opened = 0
        self.targets[id(self)] = self

    def open(self) -> DirectReceiveHalf:
        self.num_opened += 1
        self.permits.add(self.num_opened)
        return DirectReceiveHalf(self, self.num_opened)

    def close(self) -> None: ...


class DirectReceiveHalf(ReceiveHalf):
    name = "direct"
    direct = True

    def __init__(self, way: DirectReceive, permit: int) -> None:
        self._way = way
        self._permit = permit

    def offer(self) -> dict[str, Any]:
        return {"target": id(self._way), "permit": self._permit}

    def attach(self, data: dict[str, Any], pid: int) -> None: ...

    def read(self, slot: int, items: Items) -> Ticket:
        raise TransferError("there are no slots")

    def revoke(self) -> float:
        self._way.permits.discard(self._permit)
        return GRACE_S

    def close(self) -> None:
        self.revoke()


class DirectSend(SendWay):
    """hub.SendWay."""

    name = "direct"

    def __init__(self, copier: SimCopier) -> None:
        self._copier = copier

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[DirectSendChannel, dict[str, Any]]:
        way = DirectReceive.targets.get(data["target"])
        if way is None:
            raise TransferError("the decode worker is dead")
        return DirectSendChannel(self._copier, way, data["permit"]), {}

    def close(self) -> None: ...


class DirectSendChannel:
    error = ""

    def __init__(self, copier: SimCopier, way: DirectReceive, permit: int) -> None:
        self._copier = copier
        self._way = way
        self._permit = permit

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        return Extent(num_blocks, range(first_layer, LAYERS))

    def push(self, sources: Items, targets: Items, fence: Fence, opening: Opening | None = None) -> Ticket:
        def is_permitted() -> bool:
            return self._permit in self._way.permits

        return self._copier.send(sources, lambda data: self._way.memory.land(targets, data), is_permitted, self)

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...
