"""Which bytes lie in which of D's slots (transport `tcp`). Pure: no socket, no memory.

A loan's bytes and the Push that names it come on two connections, each in the order of the loans' numbers; between the
two there is no order. A slot is taken by the first byte of a loan that may still be wanted, and is free again when it
was read or nobody wants it. P has as many loans out as D has slots, and takes one back when D says Credit, which D
says only then: so there is always a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from twolane.connector.transport.frames import FrameError, Head


@dataclass(frozen=True)
class Size:
    """What a loan holds. Head and Push must say the same."""

    total: int
    num_items: int
    first_layer: int


@dataclass
class Loan:
    size: Size
    slot: int
    received: int = 0


class Inbox:
    """Mutable state: loans that have a slot, loans that are wanted, and up to which number Pushes have come."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._free = list(range(num_slots))
        self._loans: dict[int, Loan] = {}
        self._wanted: dict[int, Size] = {}
        self._next = 0  # no Push that comes now names an older loan

    # -- bytes

    def place(self, head: Head) -> int | None:
        """The slot these bytes go to; None: nobody wants them. Raises FrameError."""
        loan = self._loans.get(head.loan)
        if loan is None and head.loan < self._next and head.loan not in self._wanted:
            return None
        if loan is None:
            loan = self._begin(head)
        if Size(head.total, head.num_items, head.first_layer) != loan.size:
            raise FrameError(f"loan {head.loan} has another size than before")
        if head.offset != loan.received or head.offset + head.size > head.total:
            raise FrameError(f"bytes {head.offset}+{head.size} of {head.total} came where {loan.received} were due")
        return loan.slot

    def _begin(self, head: Head) -> Loan:
        size = Size(head.total, head.num_items, head.first_layer)
        if size.total > self._slot_bytes:
            raise FrameError(f"a loan of {size.total} bytes, where a slot has {self._slot_bytes}")
        if self._wanted.get(head.loan, size) != size:
            raise FrameError(f"loan {head.loan} isn't what its push says")
        if not self._free:
            raise FrameError("more loans than there are slots")
        made = self._loans[head.loan] = Loan(size, self._free.pop())
        return made

    def arrived(self, head: Head) -> None:
        """These bytes lie in the slot that `place` named."""
        self._loans[head.loan].received += head.size

    # -- pushes

    def want(self, number: int, size: Size) -> None:
        """A Push came. Raises FrameError where it can't be this loan's."""
        if number < self._next:
            raise FrameError(f"slot {number} isn't lent to us (any more)")
        if number in self._loans and self._loans[number].size != size:
            raise FrameError(f"loan {number} isn't what its push says")
        self._forget_before(number)
        self._wanted[number] = size

    def discard(self, number: int) -> None:
        """A Push came of which nobody wants the bytes."""
        if number >= self._next:
            self._forget_before(number)
            self.done(number)

    def _forget_before(self, number: int) -> None:
        """Pushes come in order: those of older loans were lost."""
        for older in [one for one in self._loans if one < number and one not in self._wanted]:
            self.done(older)
        self._next = number + 1

    def whole(self, number: int) -> int | None:
        """The slot where all bytes of the loan lie; None: they don't yet."""
        loan = self._loans.get(number)
        return loan.slot if loan is not None and loan.received == loan.size.total else None

    def done(self, number: int) -> None:
        """Its slot is free."""
        self._wanted.pop(number, None)
        if loan := self._loans.pop(number, None):
            self._free.append(loan.slot)
