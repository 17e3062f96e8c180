"""The D workers that P is connected to: the handshake, words both ways, slots that are lent, the end.

Owner: PrefillSide, under its agent's lock. What is sent to them is in `offers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from twolane.connector.messages import Hello, Identity, KVFormat, Mismatch, Refused, ToDecode, ToPrefill, Welcome
from twolane.connector.numbering import Numbering
from twolane.connector.transport.base import NO_ROOM, Extent, Fence, Items, Opening, SendChannel, SendTransports, Ticket
from twolane.errors import TransferError


class Links(Protocol):
    """How messages reach D workers, and how the death of one is found out."""

    def send(self, peer: bytes, message: ToDecode) -> None:
        """Sends soon; never blocks, and says nothing if the peer is gone."""
        ...

    def watch(self, peer: bytes, pid: int, host: str) -> None:
        """From now on the death of this process is told. Raises ProcessLookupError if it is dead."""
        ...

    def unwatch(self, peer: bytes) -> None: ...


@dataclass(eq=False)
class DecodePeer:
    """A D worker that said Hello. `last_word_s` renews the lease of everything it announced."""

    epoch: str
    last_word_s: float
    channel: SendChannel | None = None  # None: no KV can go to it
    lent: dict[int, float] = field(default_factory=dict)  # slot -> since when, oldest first
    numbering: Numbering = field(default_factory=Numbering)

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        """See SendChannel."""
        return self.channel.room(num_blocks, first_layer, fence) if self.channel is not None else NO_ROOM

    def push(self, sources: Items, targets: Items, fence: Fence, now_s: float, opening: Opening | None) -> Ticket:
        """Where there is room. A slot is lent until D gives it back."""
        assert self.channel is not None
        ticket = self.channel.push(sources, targets, fence, opening)
        if ticket.slot is not None:
            self.lent[ticket.slot] = now_s
        return ticket

    def credit(self, slot: int) -> None:
        """Peers answer in order: a slot that was lent before and hasn't come back was lost on the way."""
        if self.channel is None or slot not in self.lent:
            return
        for lent in list(self.lent):
            del self.lent[lent]
            self.channel.release(lent)
            if lent == slot:
                break

    def why_unusable(self, now_s: float, timeout_s: float) -> str:
        """Empty: it isn't."""
        if self.lent and now_s - min(self.lent.values()) > timeout_s:
            return f"a slot was not given back for {timeout_s:g} s"
        return self.channel.error if self.channel is not None else ""


class DecodePeers:
    """Mutable state: the peers, by the name of their connection."""

    def __init__(self, me: Identity, kv_format: KVFormat, transports: SendTransports, links: Links) -> None:
        self._me = me
        self._format = kv_format
        self._transports = transports
        self._links = links
        self._by_name: dict[bytes, DecodePeer] = {}

    def get(self, name: bytes | None) -> DecodePeer | None:
        return self._by_name.get(name) if name else None

    def of_epoch(self, epoch: str) -> list[bytes]:
        return [name for name, peer in self._by_name.items() if peer.epoch == epoch]

    def unusable(self, now_s: float, timeout_s: float) -> list[tuple[bytes, str]]:
        """To whom nothing can be sent until they have connected anew, and why."""
        reasons = [(name, peer.why_unusable(now_s, timeout_s)) for name, peer in self._by_name.items()]
        return [(name, reason) for name, reason in reasons if reason]

    def meet(self, name: bytes, hello: Hello, now_s: float) -> str:
        """Answers. Returns why no KV can go there; empty if it can, or if the process is dead already."""
        try:
            self._links.watch(name, hello.me.pid, hello.me.host)
        except ProcessLookupError:
            return ""
        peer = self._by_name[name] = DecodePeer(hello.me.epoch, now_s)
        mismatch = hello.format.difference_from(self._format)
        try:
            if not mismatch:
                peer.channel, chosen = self._transports.open(hello.transports, hello.me.pid, hello.me.host)
                self.say(name, Welcome(self._me, chosen))
                return ""
        except TransferError as error:
            mismatch = str(error)
        self.say(name, Mismatch(self._me, mismatch))
        return mismatch

    def hear(self, name: bytes, message: ToPrefill, now_s: float) -> DecodePeer | None:
        """Who says this; None if it counts for nothing: said by a stranger, late, or twice."""
        peer = self._by_name.get(name)
        if peer is None:
            self.refuse(name, "say hello first: this prefill instance doesn't know you")
        elif peer.numbering.is_news(message):
            peer.last_word_s = now_s
            return peer
        return None

    def say(self, name: bytes | None, message: ToDecode) -> None:
        """Nothing to one that is gone."""
        if name and (peer := self._by_name.get(name)):
            self._links.send(name, peer.numbering.stamp(message))

    def refuse(self, name: bytes, reason: str) -> None:
        """Heard whatever was lost before it: it has no number."""
        self._links.send(name, Refused(reason))

    def drop(self, name: bytes) -> None:
        """The peer is told nothing more, and can't read its slots any more."""
        if peer := self._by_name.pop(name, None):
            self._links.unwatch(name)
            if peer.channel is not None:
                peer.channel.close()

    def close(self) -> None:
        for name in list(self._by_name):
            self.drop(name)
