"""P's half of the conversation: offers the KV of its requests, pushes each finished chunk to the D that asked.

Decides what each transfer comes to; `Offers` has the transfers, `DecodePeers` the connections. No socket, no thread, no
clock: messages, deaths and the time come in as calls; messages go out through `Links`. The caller holds the agent's
lock.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from twolane.connector.agent import logger
from twolane.connector.decode_peers import DecodePeer, DecodePeers, Links
from twolane.connector.messages import (
    Abort,
    Announce,
    Cancel,
    Credit,
    Hello,
    Identity,
    KVFormat,
    Ping,
    Pong,
    Push,
    Soon,
    ToPrefill,
)
from twolane.connector.offers import Offers
from twolane.connector.outgoing import Computing, Outgoing
from twolane.connector.parts import Part
from twolane.connector.plan import Advance, Offer, StepPlan
from twolane.connector.settings import ConnectorSettings
from twolane.connector.stats import Cause, Counters
from twolane.connector.story import Story
from twolane.connector.transport.base import Opening, SendTransports, Ticket
from twolane.errors import TransferError

SOON_CHANGES_S = 0.0005  # a forecast that differs by less isn't told again
FALSE_BY_S = 3.0  # the fault `false_soon`: what was due comes so much later, if anybody still wants it


@dataclass(frozen=True)
class Flight:
    """A push that was begun."""

    outgoing: Outgoing
    part: Part
    ticket: Ticket


class PrefillSide:
    """Mutable state: pushes in flight, and Aborts that wait for them. The offers and the peers own theirs."""

    def __init__(
        self,
        settings: ConnectorSettings,
        me: Identity,
        kv_format: KVFormat,
        transports: SendTransports,
        links: Links,
        story: Story,
    ) -> None:
        self._counters = Counters()
        self._settings = settings
        self._transports = transports
        self._story = story
        self._offers = Offers(kv_format.block_size, len(kv_format.regions), settings.lease_s)
        self._peers = DecodePeers(me, kv_format, transports, links)
        self._flights: list[Flight] = []
        self._farewells: list[tuple[Outgoing, bytes, str]] = []  # (transfer, peer, reason): Abort once nothing flies
        self._turn = 0

    # -- what the engine says

    def begin_step(self, plan: StepPlan, now_s: float) -> None:
        """Before the forward pass. After it no block of a preempted request is read any more."""
        for offer in plan.offer:
            self._offer(offer, now_s)
        for advance in plan.advance:
            if scheduled := self._offers.of_request(advance.req_id):
                before = 0 if advance.replace else scheduled.num_valid_tokens
                scheduled.computing = Computing(self._transports.num_passes, before, advance.num_valid_tokens)
                if not scheduled.computed_at_s:
                    self._story.note(scheduled, "scheduled", now_s)
        if plan.advance:
            self._transports.begin_pass((plan.num_tokens, sum(one.num_valid_tokens for one in plan.advance)))
        for req_id in plan.preempted:
            if preempted := self._offers.of_request(req_id):
                if preempted.in_flight:
                    self._transports.quiesce()
                preempted.retract()
        for finish in plan.finish:
            if finished := self._offers.of_request(finish.req_id):
                if finish.ok:
                    finished.computed(now_s)
                else:
                    self._give_up(finished, Cause.ENDED_EARLY, "the prefill request ended early")

    def _offer(self, offer: Offer, now_s: float) -> None:
        outgoing, early = self._offers.add(offer)
        self._story.note(outgoing, "offered", now_s)
        if early is not None:
            self._story.note(outgoing, "announced", early.came_at_s)
        if outgoing.ended is not None:  # at once: the id is another's, or D has cancelled it
            is_first = self._offers.of_transfer(offer.transfer_id) is outgoing
            self._counters.send_failed(Cause.CANCELLED if is_first else Cause.DUPLICATE)
        elif early is not None:
            self._accept(outgoing, early.announce, early.peer)

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

    def take_counters(self) -> Counters:
        self._counters.kv_refused_frames += self._transports.take_refused()
        return self._counters.take()

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
        elif known := self._peers.hear(peer, message, now_s):
            match message:
                case Announce():
                    self._on_announce(peer, known, message, now_s)
                case Credit(slot):
                    known.credit(slot)
                case Cancel(transfer_id, reason):
                    self._on_cancel(peer, transfer_id, reason, now_s)
                case Ping(waiting):
                    self._on_ping(peer, waiting)

    def _on_hello(self, peer: bytes, hello: Hello, now_s: float) -> None:
        if self._peers.get(peer) is not None:
            return  # came twice
        for old in self._peers.of_epoch(hello.me.epoch):
            self._drop_peer(old, Cause.ABORTED, "the decode worker connected anew")
        if mismatch := self._peers.meet(peer, hello, now_s):
            self._counters.kv_refused_peers += 1
            logger.error("no KV can go to a decode instance: %s", mismatch)

    def _on_announce(self, peer: bytes, known: DecodePeer, announce: Announce, now_s: float) -> None:
        if known.channel is None:  # sent before D knew
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
            self._peers.say(peer, Abort(announce.transfer_id, why))
        else:
            self._offers.announce_early(announce, peer, now_s)

    def _on_cancel(self, peer: bytes, transfer_id: str, reason: str, now_s: float) -> None:
        reason = f"cancelled by the decode instance: {reason}"
        wanted = self._offers.of_transfer(transfer_id)
        if wanted is not None and wanted.ended is None:
            self._counters.send_failed(Cause.CANCELLED)
        outgoing = self._offers.cancel(transfer_id, reason, now_s)
        if outgoing is None or outgoing.peer not in (None, peer):
            self._peers.say(peer, Abort(transfer_id, reason))
        else:
            self._farewell(outgoing, peer, reason)

    def _on_ping(self, peer: bytes, waiting: list[str]) -> None:
        """Messages come in order, so what was sent before this answer has arrived or never will."""
        for transfer_id in waiting:
            if why := self._offers.why_not(transfer_id, peer):
                self._peers.say(peer, Abort(transfer_id, why))
        self._peers.say(peer, Pong())

    def on_peer_death(self, peer: bytes) -> None:
        self._drop_peer(peer, Cause.PEER_DIED, "the decode instance died")

    def _drop_peer(self, peer: bytes, cause: Cause, reason: str) -> None:
        self._peers.drop(peer)
        for outgoing in self._offers.forget_peer(peer):
            self._give_up(outgoing, cause, reason)

    # -- what time and the transports bring

    def foretell(self, now_s: float) -> None:
        """Says to D when the pass that is being computed will be through, again where that has changed."""
        if self._settings.fault == "false_soon":
            self._foretell_falsely(now_s)
        for forecast, outgoing in itertools.product(self._transports.forecasts, self._offers.all()):
            if outgoing.ends_with(forecast.number) and abs(forecast.at_s - outgoing.told_soon_s) > SOON_CHANGES_S:
                outgoing.told_soon_s = forecast.at_s
                self._peers.say(outgoing.peer, Soon(outgoing.transfer_id, forecast.at_s))

    def _foretell_falsely(self, now_s: float) -> None:
        for outgoing in self._offers.all():
            if outgoing.peer is not None and outgoing.ended is None and not outgoing.told_soon_s:
                outgoing.told_soon_s = now_s
                self._peers.say(outgoing.peer, Soon(outgoing.transfer_id, now_s))

    def tick(self, now_s: float) -> None:
        """Deadlines."""
        for early in self._offers.expire(now_s):
            self._peers.say(early.peer, Abort(early.announce.transfer_id, "the prefill request never arrived"))
        for outgoing in self._offers.all():
            known = self._peers.get(outgoing.peer)
            if outgoing.lease_over(now_s, known.last_word_s if known else 0.0, self._settings.lease_s):
                self._counters.kv_leases_expired += 1
                self._give_up(outgoing, Cause.LEASE_EXPIRED, f"lease of {self._settings.lease_s:g} s ran out")
        for peer, reason in self._peers.unusable(now_s, self._settings.peer_timeout_s):
            self._peers.refuse(peer, f"{reason}: connect anew")
            self._drop_peer(peer, Cause.PROTOCOL, reason)

    def push_next(self, now_s: float) -> bool:
        """Begins one push, of the transfer that waited longest: a long prompt doesn't hold up a short one. False when
        there is nothing to send or no room for it."""
        ready = [one for one in self._offers.all() if one.is_ready]
        if self._settings.fault == "false_soon":
            ready = [one for one in ready if now_s > one.told_soon_s + FALSE_BY_S]
        for outgoing in sorted(ready, key=lambda one: one.turn):
            known = self._peers.get(outgoing.peer)
            if known is not None and (extent := known.room(*outgoing.next_size(), outgoing.push_fence)):
                self._push(outgoing, known, outgoing.next_part(extent), now_s)
                return True
        return False

    def _push(self, outgoing: Outgoing, known: DecodePeer, part: Part, now_s: float) -> None:
        items = outgoing.sources(part), outgoing.targets(part)
        ticket = known.push(*items, outgoing.push_fence, now_s, self._opening(outgoing, part))
        self._turn += 1
        outgoing.turn = self._turn
        outgoing.begun(part)
        self._flights.append(Flight(outgoing, part, ticket))

    def _opening(self, outgoing: Outgoing, part: Part) -> Opening | None:
        gate = outgoing.announce.gate if outgoing.announce is not None else None
        if gate is None or not outgoing.is_last(part):
            return None
        return Opening(gate, [flight.ticket for flight in self._flights if flight.outgoing is outgoing])

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
            else:
                self._peers.say(peer, Abort(outgoing.transfer_id, reason))

    def _arrived(self, flight: Flight, now_s: float) -> None:
        outgoing, part, ticket = flight.outgoing, flight.part, flight.ticket
        computed_at_s = ticket.ready_at_s or outgoing.computed_at_s
        if ticket.error or self._peers.get(outgoing.peer) is None:
            self._give_up(outgoing, Cause.ABORTED, ticket.error or "the decode instance is gone")
        else:
            self._counters.kv_sent_bytes += ticket.size_bytes
            push = Push(outgoing.transfer_id, *part.on_the_wire, ticket.slot, computed_at_s)
            self._peers.say(outgoing.peer, push)
        was_open = outgoing.ended is None
        outgoing.done()
        if was_open and outgoing.ended == "":
            if ticket.ready_at_s is not None:
                self._story.note(outgoing, "computed", ticket.ready_at_s)
            self._story.note(outgoing, "pushed", ticket.done_at_s)
            self._counters.kv_sent_transfers += 1
            self._counters.kv_sent_tokens += outgoing.num_tokens
            self._counters.kv_computed_to_sent_seconds.append((ticket.done_at_s or now_s) - computed_at_s)

    def close(self) -> None:
        self._peers.close()
        self._transports.close()
        self._story.close()
