"""P's worker: offers the KV of its requests, and pushes each finished chunk to the D that announced itself."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import msgspec
import zmq

from twolane.connector.agent import Agent, logger
from twolane.connector.host import host_identity, open_pidfd
from twolane.connector.offers import Offers
from twolane.connector.plan import Advance, Finish, StepPlan
from twolane.connector.register import Registrar
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transfer import Outgoing
from twolane.connector.transport.base import Sender
from twolane.errors import TransferError
from twolane.protocol import (
    Abort,
    Announce,
    Cancel,
    Credit,
    Hello,
    KVFormat,
    Ping,
    Pong,
    Push,
    Refused,
    ToDecode,
    Welcome,
    decode_to_prefill,
    encode,
)


@dataclass
class DecodePeer:
    """A D worker that said Hello. `last_word_s` renews the lease of everything it announced."""

    epoch: str
    last_word_s: float


class PrefillAgent(Agent):
    """State, guarded by `lock`: the offers, the peers, the transport's slots, messages to send."""

    def __init__(
        self,
        settings: ConnectorSettings,
        kv_format: KVFormat,
        sender: Sender,
        *,
        bind_address: str,
        epoch: str,
        pid: int,
        registrar: Registrar | None,
        items_per_block: int,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        super().__init__("twolane-prefill", registrar, context)
        self._settings = settings
        self._format = kv_format
        self._sender = sender
        self._identity = (epoch, pid, host_identity())
        self._offers = Offers(kv_format.block_size, items_per_block, settings.lease_s)
        self._peers: dict[bytes, DecodePeer] = {}
        self._outbox: list[tuple[bytes, ToDecode]] = []
        self._num_messages = 0  # that were to be sent, for the fault `drop_tenth`
        self._socket = self.context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"tcp://{bind_address}")
        self.poller.register(self._socket, zmq.POLLIN)

    # -- engine thread

    def begin_step(self, plan: StepPlan) -> None:
        """Before the forward pass. After it no block of a preempted or ended request is read any more."""
        now_s = time.monotonic()
        with self.lock:
            for offer in plan.offer:
                outgoing, early = self._offers.add(offer)
                if early is not None and outgoing.ended is None:
                    self._accept(outgoing, early.announce, early.peer)
            for req_id in plan.preempted:
                if preempted := self._offers.of_request(req_id):
                    preempted.retract()
            for finish in plan.finish:
                self._finish(finish, now_s)
        if plan.offer or plan.finish:
            self.wake()

    def end_step(self, advances: list[Advance]) -> None:
        """After the forward pass (or its launch): the KV of these tokens is in P's blocks once the fence is passed."""
        with self.lock:
            self._sender.fence()
            for advance in advances:
                if outgoing := self._offers.of_request(advance.req_id):
                    outgoing.advance(
                        advance.block_ids, replace=advance.replace, num_valid_tokens=advance.num_valid_tokens
                    )
        if advances:
            self.wake()

    def take_finished(self, finished_req_ids: set[str]) -> set[str]:
        """Requests whose blocks nobody reads any more; each once, and only after vLLM named it as finished."""
        with self.lock:
            return self._offers.take_finished(finished_req_ids, time.monotonic())

    @property
    def is_idle(self) -> bool:
        """No transfer is open."""
        with self.lock:
            return self._offers.is_empty

    # -- under the lock

    def _finish(self, finish: Finish, now_s: float) -> None:
        outgoing = self._offers.of_request(finish.req_id)
        if outgoing is None:
            return
        if finish.ok:
            outgoing.computed(now_s)
        else:
            self._give_up(outgoing, "the prefill request ended early")

    def _accept(self, outgoing: Outgoing, announce: Announce, peer: bytes) -> None:
        try:
            outgoing.accept(announce, peer)
        except TransferError as error:
            self._outbox.append((peer, Abort(announce.transfer_id, str(error))))
            self._give_up(outgoing, str(error))

    def _give_up(self, outgoing: Outgoing, reason: str) -> None:
        """Ends the transfer without success, and tells D if D waits for it."""
        if outgoing.ended is not None:
            return
        outgoing.end(reason)
        self.counters.kv_send_failures += 1
        logger.warning("transfer given up transfer_id=%s reason=%r", outgoing.transfer_id, reason)
        if outgoing.peer is not None and outgoing.peer in self._peers:
            self._outbox.append((outgoing.peer, Abort(outgoing.transfer_id, reason)))

    # -- agent thread

    def on_readable(self, ready: dict[object, int]) -> None:
        if self._socket not in ready:
            return
        while True:
            try:
                peer, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                continue  # not our framing: a stranger
            with self.lock:
                self._on_frame(peer, frame)

    def _on_frame(self, peer: bytes, frame: bytes) -> None:
        try:
            message = decode_to_prefill(frame)
        except msgspec.MsgspecError as error:
            self._outbox.append((peer, Refused(f"not understood: {error}")))
            return
        if isinstance(message, Hello):
            self._on_hello(peer, message)
        elif peer not in self._peers:
            self._outbox.append((peer, Refused("say hello first: this prefill instance doesn't know you")))
        else:
            self._peers[peer].last_word_s = time.monotonic()
            self._on_message(peer, message)

    def _on_message(self, peer: bytes, message: Announce | Credit | Cancel | Ping) -> None:
        match message:
            case Announce():
                self._on_announce(peer, message)
            case Credit(slot):
                self._sender.release(slot, peer)
            case Cancel(transfer_id, reason):
                self._on_cancel(transfer_id, reason)
            case Ping():
                self._outbox.append((peer, Pong()))

    def _on_hello(self, peer: bytes, hello: Hello) -> None:
        if difference := hello.format.difference_from(self._format):
            logger.error("decode instance refused: %s", difference)
            self._outbox.append((peer, Refused(difference)))
            return
        for old in [known for known, state in self._peers.items() if state.epoch == hello.epoch]:
            self._drop_peer(old, "the decode worker connected anew")
        try:
            self.watch_process(open_pidfd(hello.pid, hello.host), peer)
        except ProcessLookupError:
            return
        self._peers[peer] = DecodePeer(hello.epoch, time.monotonic())
        self._outbox.append((peer, Welcome(*self._identity, transport=self._sender.describe())))

    def _on_announce(self, peer: bytes, announce: Announce) -> None:
        outgoing = self._offers.of_transfer(announce.transfer_id)
        if outgoing is not None and outgoing.ended is None:
            self._accept(outgoing, announce, peer)
            return
        why = outgoing.ended if outgoing is not None else self._offers.why_gone(announce.transfer_id)
        if why is None:
            self._offers.announce_early(announce, peer, time.monotonic())
        else:
            self._outbox.append((peer, Abort(announce.transfer_id, why or "already sent")))

    def _on_cancel(self, transfer_id: str, reason: str) -> None:
        self._offers.cancel(transfer_id, f"cancelled by the decode instance: {reason}", time.monotonic())

    def on_peer_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, bytes)
        with self.lock:
            self._drop_peer(peer, "the decode instance died")

    def _drop_peer(self, peer: bytes, reason: str) -> None:
        """The peer can't read its slots any more."""
        if self._peers.pop(peer, None) is None:
            return
        self.unwatch_process(peer)
        self._sender.release_peer(peer)
        for outgoing in self._offers.forget_peer(peer):
            self._give_up(outgoing, reason)

    def on_tick(self, now_s: float) -> None:
        with self.lock:
            self._expire(now_s)
            ready = [outgoing for outgoing in self._offers.all() if outgoing.next_push(1)]
        # One slot a transfer and turn, so that a long prompt doesn't hold up a short one.
        while ready:
            ready = [outgoing for outgoing in ready if self._push_one(outgoing)]
        self._flush()

    def _push_one(self, outgoing: Outgoing) -> bool:
        """Sends one slot's worth; False when there is nothing (more) to send or no slot to be had."""
        with self.lock:
            if outgoing.peer is None or outgoing.next_push(1) is None:
                return False
            slot = self._sender.acquire(outgoing.peer)
            if slot is None:
                return False
            push = outgoing.next_push(self._sender.capacity(outgoing.next_item))
            assert push is not None
            self.counters.kv_sent_bytes += self._sender.write(slot, outgoing.source_blocks(push))
            outgoing.sent(push)
            if outgoing.ended == "":
                self.counters.kv_sent_transfers += 1
                self.counters.kv_sent_tokens += outgoing.num_tokens
            self._outbox.append((outgoing.peer, Push(outgoing.transfer_id, push.first, push.count, slot)))
        self._flush()
        return True

    def _expire(self, now_s: float) -> None:
        for early in self._offers.expire(now_s):
            self._outbox.append((early.peer, Abort(early.announce.transfer_id, "the prefill request never arrived")))
        for outgoing in self._offers.all():
            peer = self._peers.get(outgoing.peer) if outgoing.peer else None
            if outgoing.lease_over(now_s, peer.last_word_s if peer else 0.0, self._settings.lease_s):
                self.counters.kv_leases_expired += 1
                self._give_up(outgoing, f"lease of {self._settings.lease_s:g} s ran out")

    def _flush(self) -> None:
        with self.lock:
            outbox, self._outbox = self._without_dropped(self._outbox), []
        for peer, message in outbox:
            # A peer that is gone is found out by its pidfd or its lease; its messages go nowhere.
            with contextlib.suppress(zmq.Again, zmq.ZMQError):
                self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)

    def _without_dropped(self, outbox: list[tuple[bytes, ToDecode]]) -> list[tuple[bytes, ToDecode]]:
        """The fault `drop_tenth`. Under the lock."""
        if self._settings.fault != "drop_tenth":
            return outbox
        first, self._num_messages = self._num_messages + 1, self._num_messages + len(outbox)
        kept = [entry for number, entry in enumerate(outbox, first) if number % 10]
        self.counters.kv_dropped_messages += len(outbox) - len(kept)
        return kept

    def close(self) -> None:
        self._socket.close()
        self._sender.close()
