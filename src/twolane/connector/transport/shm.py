"""Transport `shm`: staging slots in shared host memory, for the CPU engine and as the GPU fallback.

P owns an arena without a name (memfd): it is gone when the last process that maps it is gone, however it died, so
nothing can be left behind in /dev/shm. D opens it through /proc/PID/fd, which the kernel allows to processes of the
same user. P copies blocks into a slot, D copies them out and gives the slot back. D alone writes to D's KV memory: a
transfer that D has dropped can't land in blocks that belong to someone else by then.

A slot goes by the number of its loan, which is never used again and stands in the arena's header while the slot holds
its bytes. D looks there before it reads and again when it has: P doesn't wait for ever for a D that hangs, and such a D
may go on where it was when its slot holds somebody else's KV.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from typing import Any

import msgspec

from twolane.connector.host import host_identity
from twolane.connector.layout import KVLayout
from twolane.connector.transport.base import NO_ROOM, Extent, Fence, Items, Opening, Ticket, extent_of_slot
from twolane.connector.transport.copier import Copier
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay, SendWay
from twolane.connector.transport.slots import Slots, page_aligned
from twolane.errors import ConfigError, TransferError

_HEADER_BYTES = 4096  # one page, so that slots are page-aligned; holds the nonce, then the loan of each slot
_NONCE_BYTES = 16
_MAX_SLOTS = (_HEADER_BYTES - _NONCE_BYTES) // 8


def _loan_word(base: int, slot: int) -> ctypes.c_int64:
    """Where the header says which loan the slot is."""
    return ctypes.c_int64.from_address(base + _NONCE_BYTES + 8 * slot)


class Arena(msgspec.Struct, frozen=True):
    """How D finds P's arena: a descriptor of P's process, and what must be found behind it."""

    fd: int
    size_bytes: int
    slot_bytes: int
    nonce: bytes


class ShmSend(SendWay):
    """P's half. Mutable state: the slots."""

    name = "shm"

    def __init__(
        self, layout: KVLayout, copier: Copier, *, slot_bytes: int, num_slots: int, zero: bool = False
    ) -> None:
        self._copier = copier
        self._zero = zero
        self._to_zero: list[tuple[Ticket, int]] = []  # copies in flight, and to where
        self.layer_bytes = layout.layer_bytes
        self.room_bytes = max(slot_bytes or copier.slot_bytes, layout.max_item_bytes)
        self._slot_bytes = page_aligned(self.room_bytes)
        if num_slots > _MAX_SLOTS:
            raise ConfigError(f"num_slots {num_slots}: at most {_MAX_SLOTS} can be. Raise slot_bytes instead.")
        self.slots = Slots(num_slots)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._size = _HEADER_BYTES + num_slots * self._slot_bytes
        self._fd = os.memfd_create("twolane-kv", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self._size)
        self._map = mmap.mmap(self._fd, self._size)
        self._map[:_NONCE_BYTES] = self._nonce
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        copier.pin(self._base, self._size)

    def open(
        self,
        data: dict[str, Any],  # noqa: ARG002 - D has nothing to say
        pid: int,  # noqa: ARG002 - D finds the arena, not the other way round
        host: str,
    ) -> tuple[ShmSendChannel, dict[str, Any]]:
        if host != host_identity():
            raise TransferError("the decode worker is on another host, or in another container")
        self._copier.bind()
        arena = Arena(self._fd, self._size, self._slot_bytes, self._nonce)
        return ShmSendChannel(self), msgspec.structs.asdict(arena)

    # -- of the channels

    @property
    def free_slots(self) -> int:
        return self.slots.num_free

    def lend(self, index: int, channel: ShmSendChannel, items: Items, fence: Fence) -> Ticket:
        """Begins to copy into the slot."""
        loan = self.slots.lend(index, channel)
        _loan_word(self._base, index).value = loan  # before the first byte of it
        address = self._base + _HEADER_BYTES + index * self._slot_bytes
        ticket = self._copier.gather(address, items, fence)
        self.slots.occupy(index, lambda: not ticket.done)
        ticket.slot = loan
        if self._zero:
            self._to_zero.append((ticket, address))
            self.poll()
        return ticket

    def poll(self) -> None:
        """The fault `zero_kv`: zeros over what was copied, behind the copy and before anybody is told of it."""
        done = [one for one in self._to_zero if one[0].done]
        self._to_zero = [one for one in self._to_zero if not one[0].done]
        for ticket, address in done:
            ctypes.memset(address, 0, ticket.size_bytes)

    def close(self) -> None:
        """Unmaps the arena here; a D that still maps it keeps its own view."""
        if self._base:
            self._copier.unpin(self._base)
            self._base = 0
            self._map.close()
            os.close(self._fd)


class ShmSendChannel:
    """The slots that one D worker holds."""

    error = ""

    def __init__(self, arena: ShmSend) -> None:
        self._arena = arena

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        if self._arena.slots.next_free(self) is None:
            return NO_ROOM
        sizes = self._arena.layer_bytes, self._arena.room_bytes
        return extent_of_slot(*sizes, num_blocks, first_layer, fence)

    def push(
        self,
        sources: Items,
        targets: Items,  # noqa: ARG002 - D knows its targets
        fence: Fence,
        opening: Opening | None = None,  # noqa: ARG002 - D scatters by itself
    ) -> Ticket:
        slot = self._arena.slots.next_free(self)
        assert slot is not None, "room said so"
        return self._arena.lend(slot, self, sources, fence)

    def release(self, slot: int) -> None:
        self._arena.slots.release(slot, self)

    def close(self) -> None:
        self._arena.slots.release_all(self)


class ShmReceive(ReceiveWay):
    """D's half: a ShmReceiveHalf for each P."""

    name = "shm"

    def __init__(self, layout: KVLayout, copier: Copier) -> None:
        self._layout = layout
        self._copier = copier

    def open(self) -> ShmReceiveHalf:
        return ShmReceiveHalf(self._layout, self._copier)

    def close(self) -> None: ...


class ShmReceiveHalf(ReceiveHalf):
    """Maps the arena of one P."""

    name = "shm"
    direct = False

    def __init__(self, layout: KVLayout, copier: Copier) -> None:
        self._layout = layout
        self._copier = copier
        self._map: mmap.mmap | None = None
        self._base = 0
        self._num_slots = 0
        self._slot_bytes = 0

    def offer(self) -> dict[str, Any]:
        return {}

    def attach(self, data: dict[str, Any], pid: int) -> None:
        """Raises TransferError, with cause and remedy, where the arena can't be opened or isn't the one P spoke of."""
        try:
            arena = msgspec.convert(data, Arena)
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's description of its arena is not understood: {error}") from error
        path = f"/proc/{pid}/fd/{arena.fd}"
        try:
            mapped = _map_file(path, arena.size_bytes)
        except OSError as error:
            raise TransferError(
                f"can't map the prefill worker's shared memory {path}: {error.strerror}. Run both instances as the "
                "same user, in the same PID namespace."
            ) from error
        except ValueError as error:
            raise TransferError(f"{path} is not the prefill worker's arena: {error}") from error
        if mapped[:_NONCE_BYTES] != arena.nonce:
            mapped.close()
            raise TransferError(f"{path} is not the prefill worker's arena: its nonce differs")
        self._map, self._slot_bytes = mapped, arena.slot_bytes
        self._num_slots = (arena.size_bytes - _HEADER_BYTES) // arena.slot_bytes
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._copier.pin(self._base, arena.size_bytes)

    def read(self, slot: int, items: Items) -> Ticket:
        if not self._is_lent(slot):
            raise TransferError(f"slot {slot} isn't lent to us (any more)")
        if items.size_bytes(self._layout.layer_bytes) > self._slot_bytes:
            raise TransferError(f"a push of {items.count} items is larger than its slot")
        index = slot % self._num_slots
        ticket = self._copier.scatter(self._base + _HEADER_BYTES + index * self._slot_bytes, items)
        ticket.slot, ticket.is_intact = slot, lambda: self._is_lent(slot)
        return ticket

    def _is_lent(self, loan: int) -> bool:
        return bool(self._num_slots) and _loan_word(self._base, loan % self._num_slots).value == loan

    def revoke(self) -> float:
        return 0.0  # only D writes to D's memory

    def close(self) -> None:
        """Unmaps the arena; idempotent. No read may be in flight."""
        if self._map is not None:
            self._copier.unpin(self._base)
            self._base = self._num_slots = 0
            # from_buffer's export ended with the temporary object, so the map can go at once.
            self._map.close()
            self._map = None


def _map_file(path: str, size_bytes: int) -> mmap.mmap:
    """Maps the whole file. Raises OSError, or ValueError if its size differs."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # D never writes; ctypes takes the address of writable maps only
    try:
        if os.fstat(fd).st_size != size_bytes:
            raise ValueError("its size differs")
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
