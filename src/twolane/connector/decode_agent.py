"""D's worker: the sockets to P workers, and the thread that sees to it that what they send lands."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from twolane.connector import sockets
from twolane.connector.agent import Agent
from twolane.connector.arrivals import Finished
from twolane.connector.decode_side import DecodeSide
from twolane.connector.head_start import GIVE_UP_S, LIMIT_S
from twolane.connector.incoming import Incoming
from twolane.connector.messages import ToPrefill, decode_to_decode
from twolane.connector.plan import StepPlan
from twolane.connector.register import Registrar
from twolane.connector.sockets import LockedOut
from twolane.connector.stats import Counters
from twolane.connector.transport.base import Ticket
from twolane.curve import Keys, Knock
from twolane.errors import TransferError
from twolane.protocol import encode

# vLLM's engine sleeps 1 ms after a step that computed nothing, and takes up what a step reported in the second step
# after it. Waiting inside such a step finds the last byte sooner than asking after a sleep. New requests wait too,
# which is why it is short.
PATIENCE_S = 0.002

LAST_WORDS_MS = 200  # how long a closed connection may go on sending


@dataclass(frozen=True)
class Awaited:
    """A step computes with these requests, of which some wait for their last bytes."""

    req_ids: list[str]
    early: list[Incoming]
    since_s: float


class DecodeAgent(Agent):
    """State, guarded by `lock`: the side, what the engine's thread said and the agent's hasn't heard yet, what a step
    waits for, messages to send. The sockets belong to the agent's thread alone."""

    def __init__(
        self,
        make_side: Callable[[DecodeAgent], DecodeSide],
        registrar: Registrar | None,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: Keys | None = None,
    ) -> None:
        super().__init__("twolane-decode", registrar, context)
        self._keys = keys
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._knocks: dict[str, Knock] = {}  # beside them
        self._locked_out = LockedOut()
        self._num_refused_messages = 0
        self._outbox: list[tuple[zmq.Socket[bytes], ToPrefill]] = []
        self._leaving: list[zmq.Socket[bytes]] = []  # closed once their last words are sent
        self._steps: list[tuple[StepPlan, Ticket]] = []
        self._landed = threading.Condition(self.lock)
        self._awaited: Awaited | None = None
        self._has_reported = False  # in the last step: the engine is about to compute
        self._side = make_side(self)
        self._arrivals = self._side.arrivals

    # -- engine thread

    def begin_step(self, plan: StepPlan) -> None:
        if plan.ended:
            with self.lock:
                self._arrivals.note_ended(plan.ended)
        if not plan.drop and not plan.receive:
            return
        with self.lock:
            self._steps.append((plan, self._side.fence()))
        self.wake()

    def end_step(self) -> None:
        """After a forward pass was launched. Takes the lock only behind a step that took up a transfer."""
        self.await_started()
        if self._arrivals.is_stepping:
            with self.lock:
                self._arrivals.end_step()

    def hold_started(self, req_ids: list[str]) -> None:
        """Before the forward pass that computes with these. From here on the GPU waits for their last bytes where each
        has a gate, and this thread only once the pass is launched (`end_step`); else it waits here."""
        with self.lock:
            early = self._arrivals.open_of(req_ids)
            self._awaited = Awaited(req_ids, early, time.monotonic())
            self._arrivals.held(early)
            is_gated = bool(early) and all(one.hold() for one in early)
        if not is_gated:
            self.await_started()

    def await_started(self) -> None:
        """Returns when nothing is written any more to the blocks of what was held, whether all has landed or not.
        Raises RuntimeError where that can't be had: a wrong token is worse."""
        awaited = self._awaited
        if awaited is None:
            return

        def is_over() -> bool:
            return not self._arrivals.open_of(awaited.req_ids)

        with self.lock:
            if not self._landed.wait_for(is_over, LIMIT_S):
                self.wake()  # it gives them up
                if not self._landed.wait_for(is_over, GIVE_UP_S):
                    raise RuntimeError(f"a transfer that was given up didn't end within {GIVE_UP_S:g} s")
            self._awaited, now_s = None, time.monotonic()
            self._arrivals.started_early(awaited.early, now_s - awaited.since_s, now_s)

    def take_finished(self, *, patient: bool, may_start_early: bool = False) -> Finished:
        """`patient`: the step computes nothing, so a transfer that lands within `PATIENCE_S` is worth waiting for, or
        one that is due by then, if there are head starts."""
        with self.lock:
            finished = self._arrivals.take_finished()
            if patient and not finished.req_ids and not self._has_reported and not self._arrivals.is_empty:
                self._wait_for_news(may_start_early=may_start_early)
                finished = self._arrivals.take_finished()
            self._has_reported = bool(finished.req_ids)
        return finished

    def _wait_for_news(self, *, may_start_early: bool) -> None:
        """Under the lock. A forecast that comes meanwhile may make something due at once."""
        now_s = time.monotonic()
        end_s = now_s + PATIENCE_S
        while now_s < end_s and not self._arrivals.has_finished():
            due_s = self._arrivals.next_due_s(now_s) if may_start_early else math.inf
            if due_s <= now_s:
                return
            self._landed.wait(min(end_s, due_s) - now_s)
            now_s = time.monotonic()

    def take_due(self) -> list[str]:
        """Requests whose last byte is due; each once. A step that computes nothing asks."""
        with self.lock:
            due = self._arrivals.take_due(time.monotonic())
            self._has_reported |= bool(due)
        return due

    def take_counters(self) -> Counters:
        counters = self._side.take_counters()
        counters.kv_refused_messages, self._num_refused_messages = self._num_refused_messages, 0
        return counters

    # -- Links, under the lock, agent thread

    def connect(self, address: str) -> None:
        try:
            socket, knock = sockets.connect(self.context, address, self._keys)
        except zmq.ZMQError as error:
            raise TransferError(f"can't connect to {address}: {error.strerror}") from error
        self._sockets[address], self._knocks[address] = socket, knock
        for one in (socket, knock.socket):
            self.poller.register(one, zmq.POLLIN)

    def send(self, address: str, message: ToPrefill) -> None:
        if socket := self._sockets.get(address):
            self._outbox.append((socket, message))

    def disconnect(self, address: str) -> None:
        self.unwatch_process(address)
        socket, knock = self._sockets.pop(address), self._knocks.pop(address)
        for one in (socket, knock.socket):
            self.poller.unregister(one)
        knock.close()
        self._leaving.append(socket)

    def watch(self, address: str, pid: int, host: str) -> None:
        self.watch_process(address, pid, host)

    # -- agent thread

    def on_readable(self, ready: dict[object, int]) -> None:
        for address in [address for address, knock in self._knocks.items() if knock.socket in ready]:
            self._on_knock(address, time.monotonic())
        for address, socket in list(self._sockets.items()):
            while socket in ready and self._sockets.get(address) is socket:
                try:
                    frame = socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                with self.lock:
                    self._on_frame(address, frame)
                    self._landed.notify_all()
                self._flush()

    def _on_knock(self, address: str, now_s: float) -> None:
        self._knocks[address].look()
        if self._knocks[address].is_locked_out:
            with self.lock:
                self._side.on_locked_out(address, self._locked_out.note(address, now_s), now_s)
                self._landed.notify_all()
        elif self._knocks[address].is_let_in:
            self._locked_out.clear(address)

    def _on_frame(self, address: str, frame: bytes) -> None:
        now_s = time.monotonic()
        try:
            message = decode_to_decode(frame)
        except msgspec.MsgspecError as error:
            self._num_refused_messages += 1
            self._side.on_garbage(address, error, now_s)
        else:
            self._side.on_message(address, message, now_s)

    def on_peer_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, str)
        with self.lock:
            self._side.on_peer_death(peer, time.monotonic())

    def on_tick(self, now_s: float) -> float | None:
        with self.lock:
            steps, self._steps = self._steps, []
            for plan, gate in steps:
                self._side.begin_step(plan, gate, now_s)
            self._side.settle(now_s)
            if self._awaited is not None and now_s > self._awaited.since_s + LIMIT_S:
                self._side.give_up(self._awaited.early, now_s)
            self._side.tick(now_s)
            self.tell_proxy(self._side.problem or self._locked_out.problem(now_s))
            deadline_s = self._side.next_deadline_s
            self._landed.notify_all()
        self._flush()
        return deadline_s

    def _flush(self) -> None:
        with self.lock:
            outbox, self._outbox = self._outbox, []
            leaving, self._leaving = self._leaving, []
        for socket, message in outbox:
            with contextlib.suppress(zmq.Again):
                socket.send(encode(message), zmq.NOBLOCK)
        for socket in leaving:
            socket.close(linger=LAST_WORDS_MS)

    def close(self) -> None:
        for knock in self._knocks.values():
            knock.close()
        for socket in (*self._sockets.values(), *self._leaving):
            socket.close()
        self._side.close()
