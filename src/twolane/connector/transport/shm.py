"""Transport `shm`: staging slots in shared host memory, for the CPU engine and as the GPU fallback.

P owns an arena without a name (memfd): it is gone when the last process that maps it is gone, however it died, so
nothing can be left behind in /dev/shm. D opens it through /proc/PID/fd, which the kernel allows to processes of the
same user. P copies blocks into a slot, D copies them out and gives the slot back. D alone writes to D's KV memory: a
transfer that D has dropped can't land in blocks that belong to someone else by then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from typing import Any

import msgspec

from twolane.connector.layout import KVLayout
from twolane.connector.transport.base import Items
from twolane.connector.transport.copier import Copier
from twolane.errors import TransferError

_HEADER_BYTES = 4096  # one page, so that slots are page-aligned; holds the nonce
_NONCE_BYTES = 16


class Arena(msgspec.Struct, frozen=True):
    """How D finds P's arena: a descriptor of P's process, and what must be found behind it."""

    fd: int
    size_bytes: int
    slot_bytes: int
    nonce: bytes


class ShmSender:
    """P's half. Mutable state: which peer holds each slot (`_owner`), and in which order they were taken (`_taken`)."""

    def __init__(
        self, layout: KVLayout, copier: Copier, *, slot_bytes: int, num_slots: int, zero: bool = False
    ) -> None:
        page = mmap.PAGESIZE
        self._layout = layout
        self._copier = copier
        self._zero = zero
        self._slot_bytes = -(-max(slot_bytes, layout.max_item_bytes) // page) * page
        self._owner: list[bytes | None] = [None] * num_slots
        self._taken = [0] * num_slots
        self._num_taken = 0
        self._peer_share = max(1, num_slots // 2)  # one hung D can't take the arena from the others
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._size = _HEADER_BYTES + num_slots * self._slot_bytes
        self._fd = os.memfd_create("twolane-kv", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self._size)
        self._map = mmap.mmap(self._fd, self._size)
        self._map[:_NONCE_BYTES] = self._nonce
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def describe(self) -> dict[str, Any]:
        return msgspec.structs.asdict(Arena(self._fd, self._size, self._slot_bytes, self._nonce))

    def acquire(self, peer: bytes) -> int | None:
        if self._owner.count(peer) >= self._peer_share or None not in self._owner:
            return None
        slot = self._owner.index(None)
        self._owner[slot] = peer
        self._num_taken += 1
        self._taken[slot] = self._num_taken
        return slot

    def release(self, slot: int, peer: bytes) -> None:
        if 0 <= slot < len(self._owner) and self._owner[slot] == peer:
            last = self._taken[slot]
            for index, owner in enumerate(self._owner):
                if owner == peer and self._taken[index] <= last:
                    self._owner[index] = None

    def release_peer(self, peer: bytes) -> None:
        self._owner = [None if owner == peer else owner for owner in self._owner]

    @property
    def free_slots(self) -> int:
        return self._owner.count(None)

    def capacity(self, first_item: int) -> int:
        regions = self._layout.regions
        used, items = 0, 0
        while True:
            used += regions[(first_item + items) % len(regions)].item_bytes
            if used > self._slot_bytes:
                return items
            items += 1

    def fence(self) -> None:
        self._copier.fence()

    def write(self, slot: int, items: Items) -> int:
        address = self._base + _HEADER_BYTES + slot * self._slot_bytes
        size = self._copier.gather(address, items)
        if self._zero:
            ctypes.memset(address, 0, size)
        return size

    def close(self) -> None:
        """Unmaps the arena here; a D that still maps it keeps its own view."""
        self._base = 0
        self._map.close()
        os.close(self._fd)


class ShmReceiver:
    """D's half: maps the arena of one P.

    Raises TransferError, with cause and remedy, where the arena can't be opened or isn't the one P spoke of.
    """

    def __init__(self, layout: KVLayout, copier: Copier, pid: int, description: dict[str, Any]) -> None:
        self._layout = layout
        self._copier = copier
        try:
            arena = msgspec.convert(description, Arena)
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's description of its arena is not understood: {error}") from error
        self._slot_bytes = arena.slot_bytes
        self._size = arena.size_bytes
        path = f"/proc/{pid}/fd/{arena.fd}"
        try:
            self._map = _map_file(path, self._size)
        except OSError as error:
            raise TransferError(
                f"can't map the prefill worker's shared memory {path}: {error.strerror}. Run both instances as the "
                "same user, in the same PID namespace."
            ) from error
        except ValueError as error:
            raise TransferError(f"{path} is not the prefill worker's arena: {error}") from error
        if self._map[:_NONCE_BYTES] != arena.nonce:
            raise TransferError(f"{path} is not the prefill worker's arena: its nonce differs")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def read(self, slot: int, items: Items) -> int:
        offset = _HEADER_BYTES + slot * self._slot_bytes
        if slot < 0 or offset + self._slot_bytes > self._size:
            raise TransferError(f"slot {slot} lies outside the arena")
        if sum(self._layout.regions[layer].item_bytes for _, layer in items) > self._slot_bytes:
            raise TransferError(f"a push of {len(items)} items is larger than its slot")
        return self._copier.scatter(self._base + offset, items)

    def close(self) -> None:
        """Unmaps the arena; idempotent. `read` must not be called afterwards."""
        self._base = 0
        # from_buffer's export ended with the temporary object, so the map can go at once.
        self._map.close()


def _map_file(path: str, size_bytes: int) -> mmap.mmap:
    """Maps the whole file. Raises OSError, or ValueError if its size differs."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # D never writes; ctypes takes the address of writable maps only
    try:
        if os.fstat(fd).st_size != size_bytes:
            raise ValueError("its size differs")
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
