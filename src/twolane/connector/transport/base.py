"""The contract of a transport: it moves items (one layer of one block) from P's KV memory to D's.

An agent decides what moves and when; a transport only moves bytes. Both halves are used by the agent's one thread and
under its lock, so that whoever holds the lock knows that no byte is being read or written.
"""

from __future__ import annotations

from typing import Any, Protocol

Items = list[tuple[int, int]]  # (block id, layer) in the order of the wire


class Sender(Protocol):
    """P's half: a staging arena of slots that peers read."""

    def describe(self) -> dict[str, Any]:
        """What a Receiver needs to attach; travels in Welcome."""
        ...

    def acquire(self, peer: bytes) -> int | None:
        """A free slot for this peer, or None: all taken, or the peer's share is used up. The caller owns it until it
        sends it (then the peer owns it until `release`)."""
        ...

    def release(self, slot: int, peer: bytes) -> None:
        """The peer gave the slot back (Credit). Ignored for a slot that isn't the peer's.

        Peers answer in order: what the peer was sent before and hasn't given back was lost on the way, and is free too.
        """
        ...

    def release_peer(self, peer: bytes) -> None:
        """The peer is gone for good and can't read any more: all its slots are free."""
        ...

    def capacity(self, first_item: int) -> int:
        """How many items from `first_item` on fit into a slot."""
        ...

    def fence(self) -> None:
        """Called by the engine's thread after it launched a forward pass: later writes read what that pass computes."""
        ...

    def write(self, slot: int, items: Items) -> int:
        """Copies the items' bytes from P's KV memory into the slot, one after the other; returns bytes written.
        When it returns, the KV memory has been read and may be reused. Blocks the calling thread only."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """D's half: one for each P it is connected to."""

    def read(self, slot: int, items: Items) -> int:
        """Copies the slot's bytes into D's KV memory; returns bytes read. When it returns, they have landed."""
        ...

    def close(self) -> None: ...
