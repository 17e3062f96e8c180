"""P's worker: the socket that D workers speak to, and the thread that pushes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec
import zmq

from twolane.connector import sockets
from twolane.connector.agent import Agent, logger
from twolane.connector.messages import Refused, ToDecode, decode_to_prefill
from twolane.connector.plan import Advance, StepPlan
from twolane.connector.prefill_side import PrefillSide
from twolane.connector.register import Registrar
from twolane.connector.stats import Counters
from twolane.curve import LOCKED_OUT, DoorCounts, Keys
from twolane.protocol import encode

COMPLAIN_EVERY_S = 10.0  # about strangers
LOOK_EVERY_S = 1.0  # for those who are counted late


class PrefillAgent(Agent):
    """State, guarded by `lock`: the side, and messages to send."""

    def __init__(
        self,
        make_side: Callable[[PrefillAgent], PrefillSide],
        bind_address: str,
        registrar: Registrar | None,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: Keys | None = None,
        *,
        loses_tenth: bool = False,
    ) -> None:
        """`loses_tenth`: a fault for tests, every tenth message isn't sent. Raises zmq.ZMQError if the address can't be
        bound."""
        super().__init__("twolane-prefill", registrar, context)
        self._outbox: list[tuple[bytes, ToDecode]] = []
        self._loses_tenth = loses_tenth
        self._num_sent = 0
        self._num_lost_messages = self._num_refused_messages = 0
        self._complain_after_s = self._look_s = 0.0
        self._socket, self._door = sockets.listen(self.context, bind_address, keys)
        self._door_told = DoorCounts()
        for socket in (self._socket, *self._door.sockets):
            self.poller.register(socket, zmq.POLLIN)
        self._side = make_side(self)

    # -- engine thread

    def begin_step(self, plan: StepPlan) -> None:
        with self.lock:
            self._side.begin_step(plan, time.monotonic())
        if plan.offer or plan.finish or plan.advance:
            self.wake()

    def end_step(self, advances: list[Advance]) -> None:
        with self.lock:
            self._side.end_step(advances, time.monotonic())
        if advances:
            self.wake()

    def layer_done(self, layer_name: str) -> None:
        self._side.layer_done(layer_name)  # without the lock: it touches what the engine's thread alone writes

    def take_finished(self, finished_req_ids: set[str]) -> set[str]:
        with self.lock:
            return self._side.take_finished(finished_req_ids, time.monotonic())

    def take_counters(self) -> Counters:
        counters, told = self._side.take_counters(), self._door_told
        self._door_told = now = self._door.counts
        counters.kv_refused_connections = now.refused - told.refused
        counters.kv_ended_connections = now.ended - told.ended
        counters.kv_dropped_messages, self._num_lost_messages = self._num_lost_messages, 0
        counters.kv_refused_messages, self._num_refused_messages = self._num_refused_messages, 0
        return counters

    # -- Links, under the lock

    def send(self, peer: bytes, message: ToDecode) -> None:
        self._num_sent += 1
        if self._loses_tenth and self._num_sent % 10 == 0:
            self._num_lost_messages += 1
            return
        self._outbox.append((peer, message))

    def watch(self, peer: bytes, pid: int, host: str) -> None:
        self.watch_process(peer, pid, host)

    def unwatch(self, peer: bytes) -> None:
        self.unwatch_process(peer)

    # -- agent thread

    def on_readable(self, ready: dict[object, int]) -> None:
        if any(socket in ready for socket in self._door.sockets):
            self._look_at_door(time.monotonic())
        if self._socket not in ready:
            return
        while True:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            with self.lock:
                self._on_frames(peer, frames)

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        if len(frames) != 1:
            self._num_refused_messages += 1  # not our framing: a stranger
            return
        try:
            message = decode_to_prefill(frames[0])
        except msgspec.MsgspecError as error:
            self._num_refused_messages += 1
            self.send(peer, Refused(f"not understood: {error}"))
            return
        self._side.on_message(peer, message, time.monotonic())

    def on_peer_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, bytes)
        with self.lock:
            self._side.on_peer_death(peer)

    def on_tick(self, now_s: float) -> None:
        if now_s >= self._look_s:
            self._look_at_door(now_s)
        with self.lock:
            self._side.tick(now_s)
            self._side.foretell(now_s)
        while self._push_next():
            pass

    def _look_at_door(self, now_s: float) -> None:
        self._look_s = now_s + LOOK_EVERY_S
        num_before = self._door.counts.refused
        self._door.look()
        if self._door.counts.refused > num_before and now_s >= self._complain_after_s:
            self._complain_after_s = now_s + COMPLAIN_EVERY_S
            logger.warning(
                "connections refused at the control socket so_far=%d: %s; or a stranger knocks",
                self._door.counts.refused,
                LOCKED_OUT,
            )

    def _push_next(self) -> bool:
        """The lock is free between two pushes, so that the engine waits for one at most."""
        with self.lock:
            now_s = time.monotonic()
            pushed = self._side.push_next(now_s)
            self._side.settle(now_s)
            outbox, self._outbox = self._outbox, []
        for peer, message in outbox:
            # A peer that is gone is found out by its pidfd or its lease; its messages go nowhere.
            with contextlib.suppress(zmq.Again, zmq.ZMQError):
                self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        return pushed

    def close(self) -> None:
        self._door.close()
        self._socket.close()
        self._side.close()
