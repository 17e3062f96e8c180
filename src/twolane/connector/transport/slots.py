"""Slots of staging memory on P: whose each is. And staging memory of this process alone, for either side."""

from __future__ import annotations

import ctypes
import mmap
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from twolane.connector.transport.copier import Copier

_FIRST_LOANS = 1 << 40  # loans begin at random: those of another arena are never taken for ours


def page_aligned(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _is_at_rest() -> bool:
    return False


@dataclass
class Slot:
    """`owner`: which channel holds it. `is_busy`: whether bytes still go in or out, which may outlive the owner."""

    owner: object | None = None
    loan: int = -1
    is_busy: Callable[[], bool] = _is_at_rest

    @property
    def is_free(self) -> bool:
        return self.owner is None and not self.is_busy()


class Slots:
    """Mutable state: who holds which, and how many loans there were. A slot goes by the number of its loan, which grows
    and is never used again."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [Slot() for _ in range(num_slots)]
        self._num_loans = secrets.randbelow(_FIRST_LOANS)
        self.peer_share = max(1, num_slots // 2)  # one hung D can't take all from the others

    def next_free(self, owner: object, share: int | None = None) -> int | None:
        """Or None: all taken, or the owner's share is used up."""
        if sum(slot.owner is owner for slot in self._slots) >= min(self.peer_share, share or self.peer_share):
            return None
        return next((index for index, slot in enumerate(self._slots) if slot.is_free), None)

    def lend(self, index: int, owner: object) -> int:
        """The number of the loan."""
        slot = self._slots[index]
        self._num_loans += 1
        slot.owner, slot.loan = owner, self._num_loans * len(self._slots) + index
        return slot.loan

    def occupy(self, index: int, is_busy: Callable[[], bool]) -> None:
        self._slots[index].is_busy = is_busy

    def release(self, loan: int, owner: object) -> None:
        """Ignored for a slot that isn't this owner's."""
        for slot in self._slots:
            if slot.owner is owner and slot.loan == loan:
                slot.owner = None

    def release_all(self, owner: object) -> None:
        for slot in self._slots:
            if slot.owner is owner:
                slot.owner = None

    @property
    def num_free(self) -> int:
        return sum(slot.is_free for slot in self._slots)


class Staging:
    """Host memory in slots, of this process alone; the system gives it out as it is written."""

    def __init__(self, copier: Copier, num_slots: int, slot_bytes: int) -> None:
        self._copier = copier
        self._slot_bytes = page_aligned(slot_bytes)
        self._map = mmap.mmap(-1, num_slots * self._slot_bytes)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        copier.pin(self._base, len(self._map))

    def address(self, slot: int) -> int:
        return self._base + slot * self._slot_bytes

    def view(self, slot: int, offset: int, size_bytes: int) -> memoryview:
        """To be released before `close`, or the memory lives on until it is."""
        start = slot * self._slot_bytes + offset
        return memoryview(self._map)[start : start + size_bytes]

    def close(self) -> None:
        """Idempotent. Nobody copies to or from it any more."""
        if self._base:
            self._copier.unpin(self._base)
            self._base = 0
            try:
                self._map.close()
            except BufferError:  # a socket hasn't let go of its last message yet
                del self._map
