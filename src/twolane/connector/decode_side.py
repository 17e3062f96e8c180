"""D's half of the conversation: announces waiting blocks to P, and sees to it that what P sends lands in them.

Decides what each transfer comes to; `Arrivals` has the transfers, `PrefillPeers` the connections. No socket, no thread,
no clock: messages, deaths and the time come in as calls; messages go out through `Links`. The caller holds the agent's
lock.
"""

from __future__ import annotations

import msgspec

from twolane.addresses import rank_address
from twolane.connector.agent import logger
from twolane.connector.arrivals import Arrivals
from twolane.connector.incoming import Incoming, IncomingState
from twolane.connector.messages import (
    Abort,
    Cancel,
    Credit,
    Identity,
    KVFormat,
    Mismatch,
    Pong,
    Push,
    Refused,
    Soon,
    ToDecode,
    Welcome,
)
from twolane.connector.plan import Drop, StepPlan
from twolane.connector.prefill_peers import Links, PrefillPeer, PrefillPeers, Read
from twolane.connector.settings import ConnectorSettings
from twolane.connector.stats import Cause, Counters
from twolane.connector.story import Story
from twolane.connector.transport.base import ReceiveTransports, Ticket
from twolane.errors import TransferError


class DecodeSide:
    """Mutable state: which transfers aren't announced yet. The arrivals, which the engine's thread asks too, and the
    peers own theirs."""

    def __init__(
        self,
        settings: ConnectorSettings,
        me: Identity,
        kv_format: KVFormat,
        rank: int,
        transports: ReceiveTransports,
        links: Links,
        story: Story,
    ) -> None:
        self._counters = Counters()
        self._settings = settings
        self._layer_bytes = [pieces * size_bytes for pieces, size_bytes in kv_format.regions]
        self._rank = rank
        self._transports = transports
        self._story = story
        self.arrivals = Arrivals(
            kv_format.block_size, len(kv_format.regions), settings.head_start_ms / 1e3, self._counters, story
        )
        self._peers = PrefillPeers(me, kv_format, transports, links)
        self._gates: list[tuple[Incoming, Ticket]] = []  # announced once the passes launched before it are through

    # -- what the engine says

    def fence(self) -> Ticket:
        """Engine's thread, before the forward pass of a step that has a plan; comes back with that plan."""
        return self._transports.fence()

    def begin_step(self, plan: StepPlan, gate: Ticket, now_s: float) -> None:
        """A dropped transfer is reported as finished once nothing writes to its blocks."""
        for drop in plan.drop:
            self._drop(drop, now_s)
        for receive in plan.receive:
            address = rank_address(receive.prefill_address, self._rank)
            if incoming := self.arrivals.add(receive, address, now_s):
                self._gates.append((incoming, gate))

    def take_counters(self) -> Counters:
        self._counters.kv_refused_frames += self._transports.take_refused()
        return self._counters.take()

    def give_up(self, early: list[Incoming], now_s: float) -> None:
        """A step waits for these and must not wait any longer: their P may write no more."""
        for address in {one.address for one in early if not one.is_over}:
            reason = f"prefill instance {address} let a step wait for its last bytes"
            self._drop_peer(address, Cause.PEER_SILENT, reason, now_s)

    def _drop(self, drop: Drop, now_s: float) -> None:
        incoming = self.arrivals.get(drop.transfer_id)
        if incoming is not None:
            self._end(incoming, Cause.CANCELLED, drop.reason, now_s, dropped=True)
        elif peer := self._peers.meet(rank_address(drop.prefill_address, self._rank), now_s):
            self._peers.say(peer, Cancel(drop.transfer_id, drop.reason))

    # -- the end of a transfer

    def _end(self, incoming: Incoming, cause: Cause, reason: str, now_s: float, *, dropped: bool = False) -> None:
        """Nobody wants it any more, or it can't be had. P is told; where P might still write, its answer is awaited."""
        incoming.fail(cause, reason, now_s, dropped=dropped)
        if peer := self._peers.meet(incoming.address, now_s):
            if incoming.transfer_id in peer.transfers and not peer.channel.direct:
                incoming.fence()
            self._peers.say(peer, Cancel(incoming.transfer_id, reason))
        self._close_if_over(incoming)

    def _fail_fenced(self, incoming: Incoming, cause: Cause, reason: str, now_s: float) -> None:
        """P has no way to write (any more)."""
        incoming.fail(cause, reason, now_s)
        incoming.fence()
        self._close_if_over(incoming)

    def _close_if_over(self, incoming: Incoming) -> None:
        if self.arrivals.close_if_over(incoming):
            self._peers.forget(incoming.transfer_id)

    # -- the end of a connection

    def _drop_peer(self, address: str, cause: Cause, reason: str, now_s: float) -> None:
        """Fails what waited for it; the next announce to this address connects anew."""
        for incoming in self._peers.revoke(address, now_s):
            incoming.fail(cause, reason, now_s)
        self._finish_revoked(now_s)

    def _finish_revoked(self, now_s: float) -> None:
        """Peers that can't write any more: what they might have written to is free."""
        for incoming in self._peers.freed(now_s):
            incoming.fence()
            self._close_if_over(incoming)

    def on_locked_out(self, address: str, reason: str, now_s: float) -> None:
        """P doesn't take D for one of its own, or D not P."""
        self._counters.kv_refused_peers += 1
        self._drop_peer(address, Cause.UNREACHABLE, reason, now_s)

    def on_peer_death(self, address: str, now_s: float) -> None:
        self._peers.forget_unusable(address)
        self._drop_peer(address, Cause.PEER_DIED, f"prefill instance {address} died", now_s)

    # -- what P workers say

    def on_garbage(self, address: str, error: Exception, now_s: float) -> None:
        """A frame that is none of our messages."""
        self._drop_peer(address, Cause.PROTOCOL, f"prefill instance {address} not understood: {error}", now_s)

    def on_message(self, address: str, message: ToDecode, now_s: float) -> None:
        peer = self._peers.hear(address, message, now_s)
        if peer is None:
            return
        match message:
            case Push():
                self._on_push(peer, message, now_s)
            case Soon(transfer_id, at_s):
                if peer.is_same_host and (incoming := peer.transfers.get(transfer_id)):
                    self.arrivals.expect(incoming, at_s, now_s)
            case Abort(transfer_id, reason):
                if incoming := peer.transfers.get(transfer_id):
                    self._fail_fenced(incoming, Cause.ABORTED, f"prefill instance: {reason}", now_s)
            case Welcome():
                self._on_welcome(peer, message, now_s)
            case Mismatch():
                self._on_mismatch(peer, message, now_s)
            case Refused(reason):
                self._drop_peer(address, Cause.PROTOCOL, f"prefill instance {address} refused: {reason}", now_s)
            case Pong():
                pass

    def _on_welcome(self, peer: PrefillPeer, welcome: Welcome, now_s: float) -> None:
        try:
            self._peers.attach(peer, welcome)
        except TransferError as error:
            logger.error("no %s to prefill instance %s: %s", welcome.transport.name, peer.address, error)
            for transfer_id in peer.transfers:
                self._peers.say(peer, Cancel(transfer_id, str(error)))
            self._drop_peer(peer.address, Cause.UNREACHABLE, str(error), now_s)
        else:
            self._watch(peer, welcome.me, now_s)

    def _on_mismatch(self, peer: PrefillPeer, mismatch: Mismatch, now_s: float) -> None:
        """Said once, here; requests that name this P are computed without a word from now on, while it lives."""
        peer.mismatch = f"prefill instance {peer.address}: {mismatch.reason}"
        self._counters.kv_refused_peers += 1
        logger.error("no KV can come from %s", peer.mismatch)
        for incoming in list(peer.transfers.values()):
            self._fail_fenced(incoming, Cause.MISMATCH, peer.mismatch, now_s)
        self._watch(peer, mismatch.me, now_s)

    def _watch(self, peer: PrefillPeer, them: Identity, now_s: float) -> None:
        try:
            self._peers.watch(peer, them)
        except ProcessLookupError:
            self._drop_peer(peer.address, Cause.PEER_DIED, f"prefill instance {peer.address} died", now_s)

    def _on_push(self, peer: PrefillPeer, push: Push, now_s: float) -> None:
        try:
            peer.begin_read(push, self._layer_bytes)
        except TransferError as error:
            # Messages were lost: what else is missing on this connection isn't known.
            self._drop_peer(peer.address, Cause.PROTOCOL, str(error), now_s)
        else:
            self.settle(now_s)

    # -- what time and the transports bring

    def settle(self, now_s: float) -> None:
        """Announces what may be announced, gives back the slots that were read, ends what is over."""
        self._transports.poll()
        gates, self._gates = self._gates, []
        for incoming, passed in gates:
            if passed.done:
                self._announce(incoming, now_s)
            else:
                self._gates.append((incoming, passed))
        for peer in self._peers.all_and_revoked():
            for read in peer.take_reads():
                self._on_read(peer, read, now_s)
        self._finish_revoked(now_s)

    def _announce(self, incoming: Incoming, now_s: float) -> None:
        if incoming.state is not IncomingState.ALLOCATED:
            return  # dropped meanwhile
        peer = self._peers.meet(incoming.address, now_s)
        if peer is None:
            reason = f"{incoming.address} is no address of a prefill instance"
            self._fail_fenced(incoming, Cause.UNREACHABLE, reason, now_s)
        elif peer.mismatch:
            self._peers.say(peer, Cancel(incoming.transfer_id, "the KV caches don't match"))
            self._fail_fenced(incoming, Cause.MISMATCH, peer.mismatch, now_s)
        else:
            incoming.announced(now_s)
            peer.transfers[incoming.transfer_id] = incoming
            incoming.gate = peer.channel.gate()
            word = incoming.gate.word if incoming.gate is not None else None
            self._peers.say(peer, msgspec.structs.replace(incoming.announce, gate=word))
            self._story.note(incoming, "announce_sent")

    def _on_read(self, peer: PrefillPeer, read: Read, now_s: float) -> None:
        if read.incoming is not None:
            self._end_read(peer, read, read.incoming, now_s)
        if read.ticket.slot is not None:
            self._peers.say(peer, Credit(read.ticket.slot))

    def _end_read(self, peer: PrefillPeer, read: Read, incoming: Incoming, now_s: float) -> None:
        lost = "the connection was lost, or the slot given to others, while it was read"
        error = read.ticket.error or ("" if read.ticket.is_intact() else lost)
        if error:
            incoming.broken()
            self._end(incoming, Cause.PROTOCOL, error, now_s)
            return
        self._counters.kv_received_bytes += read.part.size_bytes(self._layer_bytes)
        incoming.has_landed(read.part, now_s)
        if read.part.is_first:
            self._counters.kv_first_block_seconds.append(now_s - incoming.announced_at_s)
        if incoming.state is IncomingState.LANDED and peer.is_same_host and read.computed_at_s:
            self._counters.kv_computed_to_landed_seconds.append(now_s - read.computed_at_s)
        self._close_if_over(incoming)

    def tick(self, now_s: float) -> None:
        """Deadlines, and words to those who are silent."""
        self._finish_revoked(now_s)
        for peer in self._peers.all():
            if reason := peer.why_lost(now_s, self._settings.peer_timeout_s):
                self._drop_peer(peer.address, Cause.PEER_SILENT, reason, now_s)
            else:
                for message in peer.ping(now_s):
                    self._peers.say(peer, message)
        for incoming in self.arrivals.all():
            if incoming.overdue(now_s, self._settings.transfer_timeout_s):
                reason = f"no block came for {self._settings.transfer_timeout_s:g} s"
                self._end(incoming, Cause.TIMED_OUT, reason, now_s)

    @property
    def problem(self) -> str:
        """Why no KV comes from some P, in words; empty: no trouble known."""
        return next((peer.mismatch for peer in self._peers.all() if peer.mismatch), "")

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` must be called at the latest, if sooner than usual."""
        return self._peers.next_freed_s

    def close(self) -> None:
        self._peers.close()
        self._transports.close()
        self._story.close()
