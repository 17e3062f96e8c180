"""D's worker: announces waiting blocks to P, and copies what P pushes into them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from twolane.connector.agent import Agent, logger
from twolane.connector.connection import Connection
from twolane.connector.host import host_identity, open_pidfd
from twolane.connector.plan import Drop, Receive, StepPlan
from twolane.connector.register import Registrar
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transfer import Incoming, IncomingState, ItemRange
from twolane.connector.transport.base import Receiver
from twolane.errors import TransferError
from twolane.protocol import (
    Abort,
    Announce,
    Cancel,
    Credit,
    Hello,
    KVFormat,
    Mismatch,
    Pong,
    Push,
    Refused,
    ToPrefill,
    Welcome,
    decode_to_decode,
    rank_address,
)

MakeReceiver = Callable[[int, dict[str, object]], Receiver]  # (P's pid, Welcome.transport)


@dataclass(frozen=True)
class Finished:
    """For vLLM's scheduler: requests that no longer wait, and the blocks of theirs that hold nothing."""

    req_ids: set[str]
    invalid_block_ids: set[int]


class DecodeAgent(Agent):
    """State, guarded by `lock`: open transfers, what ended but wasn't reported yet, connections, messages to send."""

    def __init__(
        self,
        settings: ConnectorSettings,
        kv_format: KVFormat,
        make_receiver: MakeReceiver,
        *,
        epoch: str,
        pid: int,
        rank: int,
        registrar: Registrar | None,
        items_per_block: int,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        super().__init__("twolane-decode", registrar, context)
        self._settings = settings
        self._make_receiver = make_receiver
        self._rank = rank
        self._items_per_block = items_per_block
        self._block_size = kv_format.block_size
        self._hello = Hello(epoch, pid, host_identity(), kv_format)
        self._open: dict[str, Incoming] = {}
        self._finished = Finished(set(), set())
        self._outbox: list[tuple[str, ToPrefill]] = []  # (P's address, message)
        self._peers: dict[str, Connection] = {}

    # -- engine thread

    def begin_step(self, plan: StepPlan) -> None:
        """Before the forward pass. After it nothing is written for a dropped transfer any more."""
        now_s = time.monotonic()
        with self.lock:
            for drop in plan.drop:
                self._drop(drop)
            for receive in plan.receive:
                self._receive(receive, now_s)
        if plan.drop or plan.receive:
            self.wake()

    def take_finished(self) -> Finished:
        """What ended since the last call: each announced request exactly once, also a dropped one."""
        with self.lock:
            finished, self._finished = self._finished, Finished(set(), set())
        return finished

    # -- under the lock

    def _receive(self, receive: Receive, now_s: float) -> None:
        incoming = Incoming(
            receive.req_id,
            receive.transfer_id,
            receive.num_tokens,
            receive.first_block,
            receive.block_ids,
            self._items_per_block,
            self._block_size,
            announced_at_s=now_s,
            progress_at_s=now_s,
        )
        if receive.transfer_id in self._open:
            incoming.fail("transfer_id used twice")
            self._report(incoming)
            return
        self._open[receive.transfer_id] = incoming
        announce = Announce(
            receive.transfer_id, receive.num_tokens, receive.first_block, receive.block_ids, receive.digest
        )
        self._outbox.append((self._address(receive.prefill_address), announce))

    def _drop(self, drop: Drop) -> None:
        if incoming := self._open.pop(drop.transfer_id, None):
            self._finished.req_ids.add(incoming.req_id)
        self._outbox.append((self._address(drop.prefill_address), Cancel(drop.transfer_id, drop.reason)))

    def _address(self, rank_0_address: str) -> str:
        return rank_address(rank_0_address, self._rank)

    def _end(self, incoming: Incoming, level: int = logging.WARNING) -> None:
        del self._open[incoming.transfer_id]
        self._report(incoming, level)

    def _report(self, incoming: Incoming, level: int = logging.WARNING) -> None:
        """To the engine. The caller has made sure that nothing writes to these blocks any more."""
        self._finished.req_ids.add(incoming.req_id)
        if incoming.state is IncomingState.LANDED:
            self.counters.kv_received_transfers += 1
        else:
            self._finished.invalid_block_ids.update(incoming.invalid_blocks())
            self.counters.kv_receive_failures += 1
            wanted = incoming.num_tokens - incoming.first_block * self._block_size
            self.counters.kv_recomputed_tokens += wanted - incoming.landed_tokens
            logger.log(
                level,
                "transfer failed, the prompt is computed here transfer_id=%s landed_tokens=%d of=%d reason=%r",
                incoming.transfer_id,
                incoming.landed_tokens,
                wanted,
                incoming.reason,
            )
        self.counters.kv_received_tokens += incoming.landed_tokens

    def _fail(self, incoming: Incoming, reason: str, level: int = logging.WARNING) -> None:
        incoming.fail(reason)
        self._end(incoming, level)

    # -- agent thread

    def on_tick(self, now_s: float) -> None:
        with self.lock:
            self.tell_proxy(next((peer.mismatch for peer in self._peers.values() if peer.mismatch), ""))
            outbox, self._outbox = self._outbox, []
            for address, message in outbox:
                self._post(address, message, now_s)
            for peer in list(self._peers.values()):
                if peer.is_silent(now_s, self._settings.peer_timeout_s):
                    reason = f"prefill instance {peer.address} silent for {self._settings.peer_timeout_s:g} s"
                    self._drop_peer(peer.address, reason)
            for incoming in list(self._open.values()):
                if incoming.overdue(now_s, self._settings.transfer_timeout_s):
                    timeout_s = self._settings.transfer_timeout_s
                    self._fail_and_tell(incoming, f"no block came for {timeout_s:g} s")

    def _post(self, address: str, message: ToPrefill, now_s: float) -> None:
        if isinstance(message, Announce) and message.transfer_id not in self._open:
            return  # dropped before it was sent; its Cancel follows
        try:
            peer = self._peers.get(address) or self._connect(address, now_s)
        except zmq.ZMQError as error:
            if isinstance(message, Announce):
                self._fail(self._open[message.transfer_id], f"can't connect to {address}: {error.strerror}")
            return
        if isinstance(message, Announce) and peer.mismatch:
            self._fail(self._open[message.transfer_id], peer.mismatch, logging.DEBUG)
            message = Cancel(message.transfer_id, "the KV caches don't match")
        elif isinstance(message, Announce):
            peer.transfers.add(message.transfer_id)
        elif isinstance(message, Cancel):
            peer.transfers.discard(message.transfer_id)
        peer.send(message)

    def _connect(self, address: str, now_s: float) -> Connection:
        peer = self._peers[address] = Connection.open(self.context, address, self._hello, now_s)
        self.poller.register(peer.socket, zmq.POLLIN)
        return peer

    def on_readable(self, ready: dict[object, int]) -> None:
        for address, peer in list(self._peers.items()):
            while peer.socket in ready and address in self._peers:
                try:
                    frame = peer.socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                with self.lock:
                    self._on_frame(address, peer, frame)

    def _on_frame(self, address: str, peer: Connection, frame: bytes) -> None:
        peer.last_word_s = time.monotonic()
        try:
            message = decode_to_decode(frame)
        except msgspec.MsgspecError as error:
            self._drop_peer(address, f"prefill instance {address} not understood: {error}")
            return
        match message:
            case Push():
                self._on_push(peer, message)
            case Abort(transfer_id, reason):
                peer.transfers.discard(transfer_id)
                if incoming := self._open.get(transfer_id):
                    self._fail(incoming, f"prefill instance: {reason}")
            case Welcome():
                self._on_welcome(address, peer, message)
            case Mismatch():
                self._on_mismatch(address, peer, message)
            case Refused(reason):
                self._drop_peer(address, f"prefill instance {address} refused: {reason}")
            case Pong():
                pass

    def _on_welcome(self, address: str, peer: Connection, welcome: Welcome) -> None:
        try:
            self.watch_process(open_pidfd(welcome.pid, welcome.host), address)
            peer.receiver = self._make_receiver(welcome.pid, welcome.transport)
        except ProcessLookupError:
            self._drop_peer(address, f"prefill instance {address} died")
        except TransferError as error:
            logger.error("no transport to prefill instance %s: %s", address, error)
            for transfer_id in peer.transfers:
                peer.send(Cancel(transfer_id, str(error)))
            self._drop_peer(address, str(error))

    def _on_mismatch(self, address: str, peer: Connection, mismatch: Mismatch) -> None:
        """Said once, here; requests that name this P are computed without a word from now on, while it lives."""
        peer.mismatch = f"prefill instance {address}: {mismatch.reason}"
        self.counters.kv_refused_peers += 1
        logger.error("no KV can come from %s", peer.mismatch)
        for transfer_id in peer.transfers:
            if incoming := self._open.get(transfer_id):
                self._fail(incoming, peer.mismatch, logging.DEBUG)
        peer.transfers.clear()
        try:
            self.watch_process(open_pidfd(mismatch.pid, mismatch.host), address)
        except ProcessLookupError:
            self._drop_peer(address, f"prefill instance {address} died")

    def _on_push(self, peer: Connection, push: Push) -> None:
        incoming = self._open.get(push.transfer_id)
        if incoming is not None and push.transfer_id in peer.transfers:
            try:
                self._land(peer, incoming, push)
            except TransferError as error:
                self._fail_and_tell(incoming, str(error))
        peer.send(Credit(push.slot))

    def _land(self, peer: Connection, incoming: Incoming, push: Push) -> None:
        items = ItemRange(push.first_item, push.num_items)
        targets = incoming.target_blocks(items)
        if peer.receiver is None:
            raise TransferError("a push came before the handshake")
        self.counters.kv_received_bytes += peer.receiver.read(push.slot, targets)
        incoming.landed(items, time.monotonic())
        if incoming.state is IncomingState.LANDED:
            peer.transfers.discard(push.transfer_id)
            self._end(incoming)

    def _fail_and_tell(self, incoming: Incoming, reason: str) -> None:
        for peer in self._peers.values():
            if incoming.transfer_id in peer.transfers:
                peer.transfers.discard(incoming.transfer_id)
                peer.send(Cancel(incoming.transfer_id, reason))
        self._fail(incoming, reason)

    def on_peer_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, str)
        with self.lock:
            self._drop_peer(peer, f"prefill instance {peer} died")

    def _drop_peer(self, address: str, reason: str) -> None:
        """Fails what waited for it; the next announce to this address connects anew."""
        peer = self._peers.pop(address, None)
        if peer is None:
            return
        self.unwatch_process(address)
        self.poller.unregister(peer.socket)
        peer.close()
        for transfer_id in peer.transfers:
            if incoming := self._open.get(transfer_id):
                self._fail(incoming, reason)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
