"""The P workers that D is connected to: the handshake, words both ways, copies out of their slots, silence, the end.

Owner: DecodeSide, under its agent's lock. What is received from them is in `arrivals`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from twolane.connector.agent import logger
from twolane.connector.incoming import Incoming, IncomingState
from twolane.connector.messages import Cancel, Hello, Identity, KVFormat, Ping, Push, ToDecode, ToPrefill, Welcome
from twolane.connector.numbering import Numbering
from twolane.connector.parts import Part
from twolane.connector.transport.base import ReceiveChannel, ReceiveTransports, Ticket
from twolane.errors import TransferError

PING_EVERY_S = 1.0


class Links(Protocol):
    """How messages reach P workers, and how the death of one is found out."""

    def connect(self, address: str) -> None:
        """Doesn't wait for the other side. Raises TransferError if that is no address."""
        ...

    def send(self, address: str, message: ToPrefill) -> None:
        """Sends soon; never blocks, and says nothing if nobody is there."""
        ...

    def disconnect(self, address: str) -> None: ...

    def watch(self, address: str, pid: int, host: str) -> None:
        """From now on the death of this process is told. Raises ProcessLookupError if it is dead."""
        ...


@dataclass(frozen=True)
class Read:
    """A copy from a slot that was begun. The slot is given back once it is through, also where it goes nowhere."""

    incoming: Incoming | None  # None: thrown away
    part: Part
    ticket: Ticket
    computed_at_s: float  # see messages.Push


@dataclass(eq=False)
class PrefillPeer:
    """From the first message until P is dead, silent or not to be understood; then revoked, until nothing that it may
    have written to is left."""

    address: str
    channel: ReceiveChannel
    last_word_s: float
    last_ping_s: float
    transfers: dict[str, Incoming] = field(default_factory=dict)  # announced to this P and not over
    reads: list[Read] = field(default_factory=list)  # not answered yet, oldest first
    numbering: Numbering = field(default_factory=Numbering)
    mismatch: str = ""  # why no KV can come from it
    is_same_host: bool = False  # P's CLOCK_MONOTONIC is ours
    revoked_at_s: float = 0.0  # when it can't write any more, once it was dropped

    def begin_read(self, push: Push, layer_bytes: list[int]) -> None:
        """Of a push that nobody waits for the bytes are thrown away. Raises TransferError where messages were lost, or
        this one can't be. `layer_bytes`: of one block, layer by layer."""
        part, incoming = Part.from_wire(push, len(layer_bytes)), self.transfers.get(push.transfer_id)
        ticket = Ticket(0, slot=push.slot, done=True)
        if incoming is None or incoming.state is not IncomingState.WAITING:
            incoming = None
            if push.slot is not None:
                ticket = self.channel.discard(push.slot, part.size_bytes(layer_bytes))
        else:
            targets = incoming.targets(part)
            if push.slot is not None:
                ticket = self.channel.read(push.slot, targets)
            incoming.begun(part)
        self.reads.append(Read(incoming, part, ticket, push.computed_at_s))

    def take_reads(self) -> list[Read]:
        """Those that are done. Pushes are answered in the order they came, since a Credit gives back the slots before
        it too: what is thrown away waits for the reads before it."""
        done = []
        while self.reads and self.reads[0].ticket.done:
            done.append(self.reads.pop(0))
        return done

    def why_lost(self, now_s: float, timeout_s: float) -> str:
        """It owes a word for `timeout_s`; empty: it doesn't."""
        if not self.transfers:
            self.last_word_s = now_s  # nobody waits for it
        if now_s - self.last_word_s > timeout_s:
            return f"prefill instance {self.address} silent for {timeout_s:g} s"
        if any(one.stuck(now_s, timeout_s) for one in self.transfers.values()):
            return f"prefill instance {self.address} doesn't answer a cancel"
        return ""

    def ping(self, now_s: float) -> list[ToPrefill]:
        """What to say to a P that others wait for, once a second: so that a busy P has something to answer, and what
        was lost on the way is found out."""
        if not self.transfers or now_s - self.last_ping_s < PING_EVERY_S:
            return []
        self.last_ping_s = now_s
        quiet = [one for one in self.transfers.values() if now_s - one.progress_at_s >= PING_EVERY_S]
        cancels = [Cancel(one.transfer_id, one.reason) for one in quiet if one.state is IncomingState.ENDING]
        return [*cancels, Ping([one.transfer_id for one in quiet if one.state is IncomingState.WAITING])]


class PrefillPeers:
    """Mutable state: peers, those that are being revoked, and which transports don't work with some P."""

    def __init__(self, me: Identity, kv_format: KVFormat, transports: ReceiveTransports, links: Links) -> None:
        self._me = me
        self._format = kv_format
        self._transports = transports
        self._links = links
        self._by_address: dict[str, PrefillPeer] = {}
        self._revoked: list[PrefillPeer] = []
        self._unusable: dict[str, set[str]] = {}  # address -> transports that P chose and D can't attach

    def all(self) -> list[PrefillPeer]:
        return list(self._by_address.values())

    def all_and_revoked(self) -> list[PrefillPeer]:
        return [*self._by_address.values(), *self._revoked]

    def meet(self, address: str, now_s: float) -> PrefillPeer | None:
        """The P at this address, connected if it wasn't; None if that can't be an address."""
        if address not in self._by_address:
            try:
                self._links.connect(address)
            except TransferError as error:
                logger.error("no way to prefill instance: %s", error)
                return None
            channel = self._transports.open(without=self._unusable.get(address, ()))
            self._by_address[address] = PrefillPeer(address, channel, now_s, now_s)
            self.say(self._by_address[address], Hello(self._me, self._format, channel.offers))
        return self._by_address[address]

    def hear(self, address: str, message: ToDecode, now_s: float) -> PrefillPeer | None:
        """Who says this; None if it counts for nothing: said by nobody that D knows, late, or twice."""
        peer = self._by_address.get(address)
        if peer is None or not peer.numbering.is_news(message):
            return None
        peer.last_word_s = now_s
        return peer

    def say(self, peer: PrefillPeer, message: ToPrefill) -> None:
        """Nothing to one that is being revoked."""
        if self._by_address.get(peer.address) is peer:
            self._links.send(peer.address, peer.numbering.stamp(message))

    def attach(self, peer: PrefillPeer, welcome: Welcome) -> None:
        """P's choice of a transport. Raises TransferError: it won't be offered to this P again."""
        peer.is_same_host = welcome.me.host == self._me.host
        try:
            peer.channel.attach(welcome.transport, welcome.me.pid)
        except TransferError:
            self._unusable.setdefault(peer.address, set()).add(welcome.transport.name)
            raise

    def watch(self, peer: PrefillPeer, them: Identity) -> None:
        """Raises ProcessLookupError if it is dead already."""
        self._links.watch(peer.address, them.pid, them.host)

    def forget_unusable(self, address: str) -> None:
        """The next one there may be another."""
        self._unusable.pop(address, None)

    # -- the end

    def revoke(self, address: str, now_s: float) -> list[Incoming]:
        """It may write no more, and is told nothing more; who meets this address connects anew. Returns what was
        announced to it."""
        peer = self._by_address.pop(address, None)
        if peer is None:
            return []
        self._links.disconnect(address)
        peer.revoked_at_s = now_s + peer.channel.revoke()
        self._revoked.append(peer)
        return list(peer.transfers.values())

    def freed(self, now_s: float) -> Iterator[Incoming]:
        """Whatever revoked peers might have written to that can't write any more: the caller ends it. Closes those that
        have nothing left."""
        for peer in [one for one in self._revoked if one.revoked_at_s <= now_s]:
            yield from list(peer.transfers.values())
            if not peer.transfers and not peer.reads:
                self._revoked.remove(peer)
                peer.channel.close()

    def forget(self, transfer_id: str) -> None:
        """It is over."""
        for peer in self.all_and_revoked():
            peer.transfers.pop(transfer_id, None)

    @property
    def next_freed_s(self) -> float | None:
        """When `freed` has something; None if nobody is being revoked."""
        return min((peer.revoked_at_s for peer in self._revoked), default=None)

    def close(self) -> None:
        for peer in self.all_and_revoked():
            peer.channel.close()
