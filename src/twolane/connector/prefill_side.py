"""P's half of the conversation: offers the KV of its requests, pushes each finished chunk to the D that asked.

No socket, no thread, no clock: messages, deaths and the time come in as calls; messages go out through `Links`. The
caller holds the agent's lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from twolane.connector.agent import logger
from twolane.connector.numbering import Numbering
from twolane.connector.offers import Offers
from twolane.connector.plan import Advance, Finish, StepPlan
from twolane.connector.settings import ConnectorSettings
from twolane.connector.stats import Cause, Counters
from twolane.connector.story import Story
from twolane.connector.transfer import Computing, ItemRange, Outgoing
from twolane.connector.transport.base import SendChannel, SendTransports, Ticket
from twolane.errors import TransferError
from twolane.protocol import (
    Abort,
    Announce,
    Cancel,
    Credit,
    Hello,
    Identity,
    KVFormat,
    Mismatch,
    Ping,
    Pong,
    Push,
    Refused,
    Soon,
    ToDecode,
    ToPrefill,
    Welcome,
)

SOON_CHANGES_S = 0.0005  # a forecast that differs by less isn't told again
FALSE_BY_S = 3.0  # the fault `false_soon`: what was due comes so much later, if anybody still wants it


class Links(Protocol):
    """How messages reach D workers, and how the death of one is found out."""

    def send(self, peer: bytes, message: ToDecode) -> None:
        """Sends soon; never blocks, and says nothing if the peer is gone."""
        ...

    def watch(self, peer: bytes, pid: int, host: str) -> None:
        """From now on the death of this process is told. Raises ProcessLookupError if it is dead."""
        ...

    def unwatch(self, peer: bytes) -> None: ...


@dataclass
class DecodePeer:
    """A D worker that said Hello. `last_word_s` renews the lease of everything it announced."""

    epoch: str
    channel: SendChannel | None  # None: no KV can go to it
    last_word_s: float
    lent: dict[int, float] = field(default_factory=dict)  # slot -> since when, oldest first
    numbering: Numbering = field(default_factory=Numbering)


@dataclass(frozen=True)
class Flight:
    """A push that was begun."""

    outgoing: Outgoing
    peer: bytes
    items: ItemRange
    ticket: Ticket


class PrefillSide:
    """Mutable state: the offers, the peers, pushes in flight, Aborts that wait for them."""

    def __init__(
        self,
        settings: ConnectorSettings,
        me: Identity,
        kv_format: KVFormat,
        items_per_block: int,
        transports: SendTransports,
        links: Links,
        story: Story,
    ) -> None:
        self._counters = Counters()
        self._settings = settings
        self._me = me
        self._format = kv_format
        self._transports = transports
        self._links = links
        self._story = story
        self._offers = Offers(kv_format.block_size, items_per_block, settings.lease_s)
        self._peers: dict[bytes, DecodePeer] = {}
        self._flights: list[Flight] = []
        self._farewells: list[tuple[Outgoing, bytes, str]] = []  # (transfer, peer, reason): Abort once nothing flies
        self._turn = 0

    # -- what the engine says

    def begin_step(self, plan: StepPlan, now_s: float) -> None:
        """Before the forward pass. After it no block of a preempted request is read any more."""
        for offer in plan.offer:
            outgoing, early = self._offers.add(offer)
            self._story.note(outgoing, "offered", now_s)
            if early is not None:
                self._story.note(outgoing, "announced", early.came_at_s)
            if outgoing.ended is not None:  # at once: the id is another's, or D has cancelled it
                is_first = self._offers.of_transfer(offer.transfer_id) is outgoing
                self._counters.send_failed(Cause.CANCELLED if is_first else Cause.DUPLICATE)
            elif early is not None:
                self._accept(outgoing, early.announce, early.peer)
        for advance in plan.advance:
            scheduled = self._offers.of_request(advance.req_id)
            if scheduled is not None:
                before = 0 if advance.replace else scheduled.num_valid_tokens
                scheduled.computing = Computing(self._transports.num_passes, before, advance.num_valid_tokens)
                if not scheduled.computed_at_s:
                    self._story.note(scheduled, "scheduled", now_s)
        for req_id in plan.preempted:
            if preempted := self._offers.of_request(req_id):
                if preempted.in_flight:
                    self._transports.quiesce()
                preempted.retract()
        for finish in plan.finish:
            self._finish(finish, now_s)

    def layer_done(self, layer_name: str) -> None:
        """The forward pass of this layer was launched: its KV can go ahead of the layers behind it."""
        self._transports.layer_done(layer_name)

    def end_step(self, advances: list[Advance], now_s: float) -> None:
        """After the forward pass (or its launch): the KV of these tokens is in P's blocks once the fence is passed."""
        fence = self._transports.fence()
        for advance in advances:
            if outgoing := self._offers.of_request(advance.req_id):
                outgoing.advance(
                    advance.block_ids, fence, replace=advance.replace, num_valid_tokens=advance.num_valid_tokens
                )
                outgoing.computed_at_s = now_s
                self._story.note(outgoing, "launched", now_s)

    def take_finished(self, finished_req_ids: set[str], now_s: float) -> set[str]:
        """Requests whose blocks nobody reads any more; each once, and only after vLLM named it as finished."""
        return self._offers.take_finished(finished_req_ids, now_s)

    def count_lost_message(self) -> None:
        """On purpose, by the fault `drop_tenth`."""
        self._counters.kv_dropped_messages += 1

    def take_counters(self) -> Counters:
        self._counters.kv_refused_frames += self._transports.take_refused()
        taken, self._counters = self._counters, Counters()
        return taken

    @property
    def is_idle(self) -> bool:
        """No transfer is open."""
        return self._offers.is_empty and not self._flights

    def _finish(self, finish: Finish, now_s: float) -> None:
        outgoing = self._offers.of_request(finish.req_id)
        if outgoing is None:
            return
        if finish.ok:
            outgoing.computed(now_s)
        else:
            self._give_up(outgoing, Cause.ENDED_EARLY, "the prefill request ended early")

    def _accept(self, outgoing: Outgoing, announce: Announce, peer: bytes) -> None:
        try:
            outgoing.accept(announce, peer)
        except TransferError as error:
            self._give_up(outgoing, Cause.MISMATCH, str(error))
            self._farewell(outgoing, peer, str(error))

    def _give_up(self, outgoing: Outgoing, cause: Cause, reason: str) -> None:
        """Ends the transfer without success, and tells D if D waits for it."""
        if outgoing.ended is not None:
            return
        outgoing.end(reason)
        self._counters.send_failed(cause)
        logger.warning("transfer given up transfer_id=%s cause=%s reason=%r", outgoing.transfer_id, cause, reason)
        if outgoing.peer is not None:
            self._farewell(outgoing, outgoing.peer, reason)

    def _farewell(self, outgoing: Outgoing, peer: bytes, reason: str) -> None:
        """Says Abort as soon as nothing of the transfer is in flight."""
        self._farewells.append((outgoing, peer, reason))

    # -- what D workers say

    def on_message(self, peer: bytes, message: ToPrefill, now_s: float) -> None:
        if isinstance(message, Hello):
            self._on_hello(peer, message, now_s)
            return
        known = self._peers.get(peer)
        if known is None:
            self._links.send(peer, Refused("say hello first: this prefill instance doesn't know you"))
            return
        if not known.numbering.is_news(message):
            return
        known.last_word_s = now_s
        match message:
            case Announce():
                self._on_announce(peer, message, now_s)
            case Credit(slot):
                self._on_credit(known, slot)
            case Cancel(transfer_id, reason):
                self._on_cancel(peer, transfer_id, reason, now_s)
            case Ping(waiting):
                self._on_ping(peer, waiting)

    @staticmethod
    def _on_credit(peer: DecodePeer, slot: int) -> None:
        """Peers answer in order: a slot that was lent before and hasn't come back was lost on the way."""
        if peer.channel is None or slot not in peer.lent:
            return
        for lent in list(peer.lent):
            del peer.lent[lent]
            peer.channel.release(lent)
            if lent == slot:
                break

    def _say(self, peer: bytes, message: ToDecode) -> None:
        if known := self._peers.get(peer):
            message = known.numbering.stamp(message)
        self._links.send(peer, message)

    def _on_hello(self, peer: bytes, hello: Hello, now_s: float) -> None:
        if peer in self._peers:
            return  # came twice
        for old in [known for known, state in self._peers.items() if state.epoch == hello.me.epoch]:
            self._drop_peer(old, Cause.ABORTED, "the decode worker connected anew")
        try:
            self._links.watch(peer, hello.me.pid, hello.me.host)
        except ProcessLookupError:
            return
        known = self._peers[peer] = DecodePeer(hello.me.epoch, None, now_s)
        mismatch = hello.format.difference_from(self._format)
        try:
            if not mismatch:
                known.channel, chosen = self._transports.open(hello.transports, hello.me.pid, hello.me.host)
                self._say(peer, Welcome(self._me, chosen))
                return
        except TransferError as error:
            mismatch = str(error)
        self._counters.kv_refused_peers += 1
        logger.error("no KV can go to a decode instance: %s", mismatch)
        self._say(peer, Mismatch(self._me, mismatch))

    def _on_announce(self, peer: bytes, announce: Announce, now_s: float) -> None:
        if self._peers[peer].channel is None:  # sent before D knew
            self._on_cancel(peer, announce.transfer_id, "no KV can go there", now_s)
            return
        outgoing = self._offers.of_transfer(announce.transfer_id)
        if outgoing is not None:
            self._story.note(outgoing, "announced", now_s)
        if outgoing is not None and outgoing.ended is None:
            self._accept(outgoing, announce, peer)
        elif outgoing is not None:
            self._farewell(outgoing, peer, outgoing.ended or "already sent")
        elif why := self._offers.why_gone(announce.transfer_id):
            self._say(peer, Abort(announce.transfer_id, why))
        else:
            self._offers.announce_early(announce, peer, now_s)

    def _on_cancel(self, peer: bytes, transfer_id: str, reason: str, now_s: float) -> None:
        reason = f"cancelled by the decode instance: {reason}"
        wanted = self._offers.of_transfer(transfer_id)
        if wanted is not None and wanted.ended is None:
            self._counters.send_failed(Cause.CANCELLED)
        outgoing = self._offers.cancel(transfer_id, reason, now_s)
        if outgoing is None or outgoing.peer not in (None, peer):
            self._say(peer, Abort(transfer_id, reason))
        else:
            self._farewell(outgoing, peer, reason)

    def _on_ping(self, peer: bytes, waiting: list[str]) -> None:
        """Messages come in order, so what was sent before this answer has arrived or never will."""
        for transfer_id in waiting:
            if why := self._offers.why_not(transfer_id, peer):
                self._say(peer, Abort(transfer_id, why))
        self._say(peer, Pong())

    def on_peer_death(self, peer: bytes) -> None:
        self._drop_peer(peer, Cause.PEER_DIED, "the decode instance died")

    def _drop_peer(self, peer: bytes, cause: Cause, reason: str) -> None:
        """The peer is told nothing more, and can't read its slots any more."""
        gone = self._peers.pop(peer, None)
        if gone is None:
            return
        self._links.unwatch(peer)
        for outgoing in self._offers.forget_peer(peer):
            self._give_up(outgoing, cause, reason)
        if gone.channel is not None:
            gone.channel.close()

    # -- what time and the transports bring

    def foretell(self, now_s: float) -> None:
        """Says to D when the pass that is being computed will be through, again where that has changed."""
        if self._settings.fault == "false_soon":
            self._foretell_falsely(now_s)
        if (forecast := self._transports.forecast) is None:
            return
        for outgoing in self._offers.all():
            if outgoing.ends_with(forecast.number) and abs(forecast.at_s - outgoing.told_soon_s) > SOON_CHANGES_S:
                assert outgoing.peer is not None
                outgoing.told_soon_s = forecast.at_s
                self._say(outgoing.peer, Soon(outgoing.transfer_id, forecast.at_s))

    def _foretell_falsely(self, now_s: float) -> None:
        for outgoing in self._offers.all():
            if outgoing.peer is not None and outgoing.ended is None and not outgoing.told_soon_s:
                outgoing.told_soon_s = now_s
                self._say(outgoing.peer, Soon(outgoing.transfer_id, now_s))

    def tick(self, now_s: float) -> None:
        """Deadlines."""
        for early in self._offers.expire(now_s):
            self._say(early.peer, Abort(early.announce.transfer_id, "the prefill request never arrived"))
        for outgoing in self._offers.all():
            peer = self._peers.get(outgoing.peer) if outgoing.peer else None
            if outgoing.lease_over(now_s, peer.last_word_s if peer else 0.0, self._settings.lease_s):
                self._counters.kv_leases_expired += 1
                self._give_up(outgoing, Cause.LEASE_EXPIRED, f"lease of {self._settings.lease_s:g} s ran out")
        for address, peer in list(self._peers.items()):
            if reason := self._why_unusable(peer, now_s):
                self._links.send(address, Refused(f"{reason}: connect anew"))
                self._drop_peer(address, Cause.PROTOCOL, reason)

    def _why_unusable(self, peer: DecodePeer, now_s: float) -> str:
        """Nothing can be sent to it, until it has connected anew."""
        if peer.lent and now_s - min(peer.lent.values()) > self._settings.peer_timeout_s:
            return f"a slot was not given back for {self._settings.peer_timeout_s:g} s"
        return peer.channel.error if peer.channel is not None else ""

    def push_next(self, now_s: float) -> bool:
        """Begins one push, of the transfer that waited longest: a long prompt doesn't hold up a short one. False when
        there is nothing to send or no room for it."""
        ready = [one for one in self._offers.all() if one.peer in self._peers and one.next_push(1)]
        if self._settings.fault == "false_soon":
            ready = [one for one in ready if now_s > one.told_soon_s + FALSE_BY_S]
        for outgoing in sorted(ready, key=lambda one: one.turn):
            assert outgoing.peer is not None
            channel = self._peers[outgoing.peer].channel
            if channel is not None and (room := channel.room(outgoing.next_item)):
                self._push(outgoing, outgoing.peer, channel, room, now_s)
                return True
        return False

    def _push(self, outgoing: Outgoing, peer: bytes, channel: SendChannel, room: int, now_s: float) -> None:
        items = outgoing.next_push(room)
        assert items is not None
        ticket = channel.push(outgoing.sources(items), outgoing.targets(items), outgoing.fence)
        self._turn += 1
        outgoing.turn = self._turn
        outgoing.begun(items)
        if ticket.slot is not None:
            self._peers[peer].lent[ticket.slot] = now_s
        self._flights.append(Flight(outgoing, peer, items, ticket))

    def settle(self, now_s: float) -> None:
        """Tells D of pushes that are done, and of transfers that are over."""
        self._transports.poll()
        flights, self._flights = self._flights, []
        for flight in flights:
            if flight.ticket.done:
                self._arrived(flight, now_s)
            else:
                self._flights.append(flight)
        farewells, self._farewells = self._farewells, []
        for outgoing, peer, reason in farewells:
            if outgoing.in_flight:
                self._farewells.append((outgoing, peer, reason))
            elif peer in self._peers:
                self._say(peer, Abort(outgoing.transfer_id, reason))

    def _arrived(self, flight: Flight, now_s: float) -> None:
        outgoing, items, ticket = flight.outgoing, flight.items, flight.ticket
        failed = bool(ticket.error) or flight.peer not in self._peers
        if failed:
            self._give_up(outgoing, Cause.ABORTED, ticket.error or "the decode instance is gone")
        else:
            self._counters.kv_sent_bytes += ticket.size_bytes
            computed_at_s = ticket.ready_at_s or outgoing.computed_at_s
            push = Push(outgoing.transfer_id, items.first, items.count, ticket.slot, computed_at_s)
            self._say(flight.peer, push)
        was_open = outgoing.ended is None
        outgoing.done()
        if was_open and outgoing.ended == "":
            if ticket.ready_at_s is not None:
                self._story.note(outgoing, "computed", ticket.ready_at_s)
            self._story.note(outgoing, "pushed", ticket.done_at_s)
            self._counters.kv_sent_transfers += 1
            self._counters.kv_sent_tokens += outgoing.num_tokens
            sent_at_s, computed_at_s = ticket.done_at_s or now_s, ticket.ready_at_s or outgoing.computed_at_s
            self._counters.kv_computed_to_sent_seconds.append(sent_at_s - computed_at_s)

    def close(self) -> None:
        for peer in self._peers.values():
            if peer.channel is not None:
                peer.channel.close()
        self._transports.close()
        self._story.close()
