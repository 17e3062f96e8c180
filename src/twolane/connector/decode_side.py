"""D's half of the conversation: announces waiting blocks to P, and sees to it that what P sends lands in them.

No socket, no thread, no clock: messages, deaths and the time come in as calls; messages go out through `Links`. The
caller holds the agent's lock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from twolane.connector.agent import logger
from twolane.connector.head_start import OVERDUE_S, PER_TOKEN_S, POOR_FOR_S, POOR_WAIT_S
from twolane.connector.peer import Peer
from twolane.connector.plan import Drop, Ended, Receive, StepPlan
from twolane.connector.settings import ConnectorSettings
from twolane.connector.stats import Cause, Counters
from twolane.connector.story import Story
from twolane.connector.transfer import Incoming, IncomingState, ItemRange
from twolane.connector.transport.base import ReceiveTransports, Ticket, select_items
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
    Pong,
    Push,
    Refused,
    Soon,
    ToDecode,
    ToPrefill,
    Welcome,
    rank_address,
)


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
class Finished:
    """For vLLM's scheduler: requests that no longer wait, and the blocks of theirs that hold nothing."""

    req_ids: set[str]
    invalid_block_ids: set[int]


@dataclass(frozen=True)
class Gate:
    """A transfer that is announced once the forward passes launched before it are through."""

    incoming: Incoming
    passed: Ticket


@dataclass(frozen=True)
class Read:
    """A copy from a slot that was begun. Pushes are answered in the order they came, since a Credit gives back the
    slots before it too: what is thrown away waits for the reads before it."""

    incoming: Incoming | None  # None: thrown away
    peer: Peer
    items: ItemRange
    ticket: Ticket
    computed_at_s: float  # see protocol.Push


class DecodeSide:
    """Mutable state: open transfers, what is over but not reported, peers, gates, reads, peers being revoked, and which
    transports don't work with some P."""

    def __init__(
        self,
        settings: ConnectorSettings,
        me: Identity,
        kv_format: KVFormat,
        items_per_block: int,
        rank: int,
        transports: ReceiveTransports,
        links: Links,
        story: Story,
    ) -> None:
        self._counters = Counters()
        self._settings = settings
        self._me = me
        self._format = kv_format
        self._items_per_block = items_per_block
        self._layer_bytes = [pieces * size_bytes for pieces, size_bytes in kv_format.regions]
        self._rank = rank
        self._transports = transports
        self._links = links
        self._story = story
        self._open: dict[str, Incoming] = {}
        self._finished = Finished(set(), set())
        self._peers: dict[str, Peer] = {}
        self._gates: list[Gate] = []
        self._reads: list[Read] = []
        self._revoked: list[Peer] = []
        self._late_until_s: dict[str, float] = {}  # address -> until when its forecasts count for nothing
        self._unusable: dict[str, set[str]] = {}  # address -> transports that P chose and D can't attach
        self._landed: list[Incoming] = []  # not reported yet
        self._stepping: list[Incoming] = []  # reported, not computed with yet

    # -- what the engine says

    def fence(self) -> Ticket:
        """Engine's thread, before the forward pass of a step that has a plan; comes back with that plan."""
        return self._transports.fence()

    def begin_step(self, plan: StepPlan, gate: Ticket, now_s: float) -> None:
        """A dropped transfer is reported as finished once nothing writes to its blocks."""
        for drop in plan.drop:
            self._drop(drop, now_s)
        for receive in plan.receive:
            self._receive(receive, gate, now_s)

    def take_counters(self) -> Counters:
        self._counters.kv_refused_frames += self._transports.take_refused()
        taken, self._counters = self._counters, Counters()
        return taken

    def take_finished(self) -> Finished:
        """What is over since the last call: each announced request exactly once, also a dropped one."""
        finished, self._finished = self._finished, Finished(set(), set())
        self._hand_over()
        return finished

    def _hand_over(self) -> None:
        for incoming in self._landed:
            self._story.note(incoming, "reported")
        self._stepping, self._landed = self._stepping + self._landed, []

    def take_due(self, now_s: float) -> list[str]:
        """Requests whose last byte is due, for an engine that has nothing else to do; each once (head_start.py)."""
        due = [
            one
            for one in self._open.values()
            if not one.told_soon and one.is_due(now_s, self._head_start_s(one), OVERDUE_S)
        ]
        for incoming in due:
            incoming.told_soon = True
        return [incoming.req_id for incoming in due]

    def next_due_s(self, now_s: float) -> float:
        """When `take_due` will have something, as things look now; infinite if nothing is in sight."""
        waiting = (one for one in self._open.values() if one.expected_at_s and not one.told_soon)
        dues = (one.expected_at_s - self._head_start_s(one) for one in waiting)
        return min((due_s for due_s in dues if due_s > now_s), default=math.inf)

    def _head_start_s(self, incoming: Incoming) -> float:
        return self._settings.head_start_ms / 1e3 + incoming.announce.num_tokens * PER_TOKEN_S

    def open_of(self, req_ids: Container[str]) -> list[Incoming]:
        """Those of these requests to whose blocks something may still be written."""
        return [one for one in self._open.values() if one.req_id in req_ids]

    def started_early(self, early: list[Incoming], waited_s: float, now_s: float) -> None:
        """A step waited so long for these, and computes now. A P that was far too late gives no head start for a
        while."""
        self._counters.kv_head_starts += len(early)
        if waited_s > POOR_WAIT_S:
            self._late_until_s |= {incoming.address: now_s + POOR_FOR_S for incoming in early}
        self._hand_over()

    def give_up(self, early: list[Incoming], now_s: float) -> None:
        """A step waits for these and must not wait any longer: their P may write no more."""
        for address in {one.address for one in early if not one.is_over}:
            reason = f"prefill instance {address} let a step wait for its last bytes"
            self._drop_peer(address, Cause.PEER_SILENT, reason, now_s)

    @property
    def is_stepping(self) -> bool:
        """`end_step` has something to note. Filled and emptied by the engine's thread alone: needs no lock."""
        return bool(self._stepping)

    def end_step(self) -> None:
        """A forward pass was launched: for the story alone."""
        for incoming in self._stepping:
            self._story.note(incoming, "stepped")
        self._stepping = []

    def note_ended(self, ended: list[Ended]) -> None:
        for one in ended:
            self._story.note(one, "ended", one.at_s)

    def _receive(self, receive: Receive, gate: Ticket, now_s: float) -> None:
        announce = Announce(
            receive.transfer_id, receive.num_tokens, receive.first_block, receive.block_ids, receive.digest
        )
        address = rank_address(receive.prefill_address, self._rank)
        sizes = (self._items_per_block, self._format.block_size)
        incoming = Incoming(receive.req_id, announce, address, *sizes, progress_at_s=now_s, story=receive.story)
        self._story.note(incoming, "allocated")
        if receive.transfer_id in self._open:
            incoming.fail(Cause.DUPLICATE, "transfer_id used twice", now_s)
            self._report(incoming)
            return
        self._open[receive.transfer_id] = incoming
        self._gates.append(Gate(incoming, gate))

    def _drop(self, drop: Drop, now_s: float) -> None:
        incoming = self._open.get(drop.transfer_id)
        if incoming is not None:
            self._end(incoming, Cause.CANCELLED, drop.reason, now_s, dropped=True)
            return
        address = rank_address(drop.prefill_address, self._rank)
        if self._peer(address, now_s) is not None:
            self._say(address, Cancel(drop.transfer_id, drop.reason))

    # -- the end of a transfer

    def _end(self, incoming: Incoming, cause: Cause, reason: str, now_s: float, *, dropped: bool = False) -> None:
        """Nobody wants it any more, or it can't be had. P is told; where P might still write, its answer is awaited."""
        incoming.fail(cause, reason, now_s, dropped=dropped)
        announced_to = self._peers.get(incoming.address)
        if announced_to and incoming.transfer_id in announced_to.transfers and not announced_to.channel.direct:
            incoming.fence()
        if self._peer(incoming.address, now_s) is not None:
            self._say(incoming.address, Cancel(incoming.transfer_id, reason))
        self._close_if_over(incoming)

    def _close_if_over(self, incoming: Incoming) -> None:
        if not incoming.is_over or self._open.get(incoming.transfer_id) is not incoming:
            return
        del self._open[incoming.transfer_id]
        for peer in (*self._peers.values(), *self._revoked):
            peer.transfers.discard(incoming.transfer_id)
        self._report(incoming)

    def _report(self, incoming: Incoming) -> None:
        """To the engine: nothing writes to these blocks any more."""
        self._finished.req_ids.add(incoming.req_id)
        if incoming.state is IncomingState.LANDED:
            self._counters.kv_received_transfers += 1
            self._counters.kv_wait_seconds.append(incoming.progress_at_s - incoming.announced_at_s)
            self._story.note(incoming, "landed")
            self._landed.append(incoming)
        elif incoming.is_dropped:
            self._counters.receive_failed(Cause.CANCELLED)
        else:
            assert incoming.cause is not None
            self._finished.invalid_block_ids.update(incoming.invalid_blocks())
            self._counters.receive_failed(incoming.cause)
            self._counters.kv_recomputed_tokens += incoming.num_tokens - incoming.landed_tokens
            logger.log(
                logging.DEBUG if incoming.cause is Cause.MISMATCH else logging.WARNING,
                "transfer failed, the prompt is computed here transfer_id=%s cause=%s landed_tokens=%d of=%d reason=%r",
                incoming.transfer_id,
                incoming.cause,
                incoming.landed_tokens,
                incoming.num_tokens,
                incoming.reason,
            )
        self._counters.kv_received_tokens += incoming.landed_tokens

    # -- peers

    def _peer(self, address: str, now_s: float) -> Peer | None:
        """The P at this address, connected if it wasn't; None if that can't be an address."""
        if address not in self._peers:
            try:
                self._links.connect(address)
            except TransferError as error:
                logger.error("no way to prefill instance: %s", error)
                return None
            channel = self._transports.open(without=self._unusable.get(address, ()))
            self._peers[address] = Peer(address, channel, now_s, now_s)
            self._say(address, Hello(self._me, self._format, channel.offers))
        return self._peers[address]

    def _drop_peer(self, address: str, cause: Cause, reason: str, now_s: float) -> None:
        """Fails what waited for it; the next announce to this address connects anew."""
        peer = self._peers.pop(address, None)
        if peer is None:
            return
        self._links.disconnect(address)
        peer.revoked_at_s = now_s + peer.channel.revoke()
        self._revoked.append(peer)
        for transfer_id in peer.transfers:
            self._open[transfer_id].fail(cause, reason, now_s)
        self._finish_revoked(now_s)

    def _finish_revoked(self, now_s: float) -> None:
        """Peers that can't write any more: what they might have written to is free."""
        for peer in [one for one in self._revoked if one.revoked_at_s <= now_s]:
            for transfer_id in list(peer.transfers):
                incoming = self._open[transfer_id]
                incoming.fence()
                self._close_if_over(incoming)
            if not peer.transfers and not any(read.peer is peer for read in self._reads):
                self._revoked.remove(peer)
                peer.channel.close()

    def on_locked_out(self, address: str, reason: str, now_s: float) -> None:
        """P doesn't take D for one of its own, or D not P."""
        self._counters.kv_refused_peers += 1
        self._drop_peer(address, Cause.UNREACHABLE, reason, now_s)

    def on_peer_death(self, address: str, now_s: float) -> None:
        self._unusable.pop(address, None)  # the next one there may be another
        self._drop_peer(address, Cause.PEER_DIED, f"prefill instance {address} died", now_s)

    def _say(self, address: str, message: ToPrefill) -> None:
        self._links.send(address, self._peers[address].numbering.stamp(message))

    # -- what P workers say

    def on_garbage(self, address: str, error: Exception, now_s: float) -> None:
        """A frame that is none of our messages."""
        self._drop_peer(address, Cause.PROTOCOL, f"prefill instance {address} not understood: {error}", now_s)

    def on_message(self, address: str, message: ToDecode, now_s: float) -> None:
        peer = self._peers.get(address)
        if peer is None or not peer.numbering.is_news(message):
            return
        peer.last_word_s = now_s
        match message:
            case Push():
                self._on_push(peer, message, now_s)
            case Soon(transfer_id, at_s):
                self._on_soon(peer, transfer_id, at_s, now_s)
            case Abort(transfer_id, reason):
                self._on_abort(peer, transfer_id, reason, now_s)
            case Welcome():
                self._on_welcome(peer, message, now_s)
            case Mismatch():
                self._on_mismatch(peer, message, now_s)
            case Refused(reason):
                self._drop_peer(address, Cause.PROTOCOL, f"prefill instance {address} refused: {reason}", now_s)
            case Pong():
                pass

    def _on_welcome(self, peer: Peer, welcome: Welcome, now_s: float) -> None:
        peer.is_same_host = welcome.me.host == self._me.host
        try:
            peer.channel.attach(welcome.transport, welcome.me.pid)
            self._links.watch(peer.address, welcome.me.pid, welcome.me.host)
        except ProcessLookupError:
            self._drop_peer(peer.address, Cause.PEER_DIED, f"prefill instance {peer.address} died", now_s)
        except TransferError as error:
            logger.error("no %s to prefill instance %s: %s", welcome.transport.name, peer.address, error)
            self._unusable.setdefault(peer.address, set()).add(welcome.transport.name)
            for transfer_id in peer.transfers:
                self._say(peer.address, Cancel(transfer_id, str(error)))
            self._drop_peer(peer.address, Cause.UNREACHABLE, str(error), now_s)

    def _on_mismatch(self, peer: Peer, mismatch: Mismatch, now_s: float) -> None:
        """Said once, here; requests that name this P are computed without a word from now on, while it lives."""
        peer.mismatch = f"prefill instance {peer.address}: {mismatch.reason}"
        self._counters.kv_refused_peers += 1
        logger.error("no KV can come from %s", peer.mismatch)
        for transfer_id in list(peer.transfers):
            self._fail_fenced(self._open[transfer_id], Cause.MISMATCH, peer.mismatch, now_s)
        try:
            self._links.watch(peer.address, mismatch.me.pid, mismatch.me.host)
        except ProcessLookupError:
            self._drop_peer(peer.address, Cause.PEER_DIED, f"prefill instance {peer.address} died", now_s)

    def _fail_fenced(self, incoming: Incoming, cause: Cause, reason: str, now_s: float) -> None:
        """P has no way to write (any more)."""
        incoming.fail(cause, reason, now_s)
        incoming.fence()
        self._close_if_over(incoming)

    def _on_abort(self, peer: Peer, transfer_id: str, reason: str, now_s: float) -> None:
        incoming = self._open.get(transfer_id) if transfer_id in peer.transfers else None
        if incoming is None:
            return
        self._fail_fenced(incoming, Cause.ABORTED, f"prefill instance: {reason}", now_s)

    def _on_soon(self, peer: Peer, transfer_id: str, at_s: float, now_s: float) -> None:
        incoming = self._open.get(transfer_id) if transfer_id in peer.transfers else None
        if incoming is not None and peer.is_same_host and now_s >= self._late_until_s.get(peer.address, 0):
            incoming.expected_at_s = at_s

    def _on_push(self, peer: Peer, push: Push, now_s: float) -> None:
        incoming = self._open.get(push.transfer_id) if push.transfer_id in peer.transfers else None
        if incoming is not None and incoming.state is not IncomingState.WAITING:
            incoming = None
        try:
            self._reads.append(self._begin_read(peer, incoming, push))
        except TransferError as error:
            # Messages were lost: what else is missing on this connection isn't known.
            self._drop_peer(peer.address, Cause.PROTOCOL, str(error), now_s)
        else:
            self.settle(now_s)

    @staticmethod
    def _begin_read(peer: Peer, incoming: Incoming | None, push: Push) -> Read:
        items = ItemRange(push.first_item, push.num_items)
        if incoming is None:
            if push.slot is not None:
                peer.channel.discard(push.slot)
            return Read(None, peer, items, Ticket(0, slot=push.slot, done=True), push.computed_at_s)
        targets = incoming.targets(items)
        ticket = Ticket(0, done=True) if push.slot is None else peer.channel.read(push.slot, targets)
        incoming.begun(items)
        return Read(incoming, peer, items, ticket, push.computed_at_s)

    # -- what time and the transports bring

    def settle(self, now_s: float) -> None:
        """Announces what may be announced, gives back the slots that were read, ends what is over."""
        self._transports.poll()
        gates, self._gates = self._gates, []
        for gate in gates:
            if gate.passed.done:
                self._announce(gate.incoming, now_s)
            else:
                self._gates.append(gate)
        reads, self._reads = self._reads, []
        for read in reads:
            if read.ticket.done and not any(before.peer is read.peer for before in self._reads):
                self._on_read(read, now_s)
            else:
                self._reads.append(read)
        self._finish_revoked(now_s)

    def _announce(self, incoming: Incoming, now_s: float) -> None:
        if incoming.state is not IncomingState.ALLOCATED:
            return  # dropped meanwhile
        peer = self._peer(incoming.address, now_s)
        if peer is None:
            reason = f"{incoming.address} is no address of a prefill instance"
            incoming.fail(Cause.UNREACHABLE, reason, now_s)
            self._close_if_over(incoming)
            return
        if peer.mismatch:
            self._say(incoming.address, Cancel(incoming.transfer_id, "the KV caches don't match"))
            self._fail_fenced(incoming, Cause.MISMATCH, peer.mismatch, now_s)
            return
        incoming.announced(now_s)
        peer.transfers.add(incoming.transfer_id)
        self._say(incoming.address, incoming.announce)
        self._story.note(incoming, "announce_sent")

    def _on_read(self, read: Read, now_s: float) -> None:
        if read.incoming is not None:
            self._end_read(read, read.incoming, now_s)
        if read.ticket.slot is not None and self._peers.get(read.peer.address) is read.peer:
            self._say(read.peer.address, Credit(read.ticket.slot))
        if read.incoming is not None:
            self._close_if_over(read.incoming)

    def _end_read(self, read: Read, incoming: Incoming, now_s: float) -> None:
        error = read.ticket.error or ("" if read.ticket.is_intact() else "the slot was given to others meanwhile")
        if error:
            incoming.broken()
            self._end(incoming, Cause.PROTOCOL, error, now_s)
            return
        self._counters.kv_received_bytes += self._size_bytes(read)
        incoming.landed(read.items, now_s)
        if read.items.first == 0:
            self._counters.kv_first_block_seconds.append(now_s - incoming.announced_at_s)
        is_last = incoming.state is IncomingState.LANDED
        if is_last and read.peer.is_same_host and read.computed_at_s:
            self._counters.kv_computed_to_landed_seconds.append(now_s - read.computed_at_s)

    def _size_bytes(self, read: Read) -> int:
        return select_items([], read.items.first, read.items.count, self._items_per_block).size_bytes(self._layer_bytes)

    def tick(self, now_s: float) -> None:
        """Deadlines, and words to those who are silent."""
        self._finish_revoked(now_s)
        for peer in list(self._peers.values()):
            waiting = [self._open[transfer_id] for transfer_id in peer.transfers]
            if peer.is_silent(now_s, self._settings.peer_timeout_s):
                reason = f"prefill instance {peer.address} silent for {self._settings.peer_timeout_s:g} s"
                self._drop_peer(peer.address, Cause.PEER_SILENT, reason, now_s)
            elif any(one.stuck(now_s, self._settings.peer_timeout_s) for one in waiting):
                reason = f"prefill instance {peer.address} doesn't answer a cancel"
                self._drop_peer(peer.address, Cause.PEER_SILENT, reason, now_s)
            elif ping := peer.ping(now_s, waiting):
                for message in ping:
                    self._say(peer.address, message)
        for incoming in list(self._open.values()):
            if incoming.overdue(now_s, self._settings.transfer_timeout_s):
                reason = f"no block came for {self._settings.transfer_timeout_s:g} s"
                self._end(incoming, Cause.TIMED_OUT, reason, now_s)

    @property
    def problem(self) -> str:
        """Why no KV comes from some P, in words; empty: no trouble known."""
        return next((peer.mismatch for peer in self._peers.values() if peer.mismatch), "")

    def has_finished(self) -> bool:
        """`take_finished` has something."""
        return bool(self._finished.req_ids)

    @property
    def is_waiting(self) -> bool:
        """Some request waits for KV."""
        return bool(self._open)

    @property
    def is_idle(self) -> bool:
        """No transfer is open."""
        return not self._open and not self._revoked and not any(peer.transfers for peer in self._peers.values())

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` must be called at the latest, if sooner than usual."""
        return min((peer.revoked_at_s for peer in self._revoked), default=None)

    def close(self) -> None:
        for peer in (*self._peers.values(), *self._revoked):
            peer.channel.close()
        self._transports.close()
        self._story.close()
