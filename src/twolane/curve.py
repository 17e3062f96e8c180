"""Who may speak on a deployment's sockets: ZMQ's CURVE, with keys made of the deployment's one secret.

All who know the secret derive the same key pair from it. A listening socket takes who proves that it has the pair's
secret half, and both ends encrypt with keys of that connection alone: what was recorded is of no use, not even to who
learns the secret later. docs/THREATS.md says what that is worth and what it isn't.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from twolane.errors import ConfigError

HANDSHAKE_S = 10.0  # a connection that hasn't said who it is for so long is closed
LOCKED_OUT = "one of the two has no registration secret, or another one (registration_secret_file)"

_LABEL = b"twolane: key pair of a deployment"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks, in every context
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH

ZmqSocket = zmq.Socket[bytes]
ZmqContext = zmq.Context[ZmqSocket]


@dataclass(frozen=True)
class Keys:
    """A Curve25519 key pair. The public half is never told to anybody either."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)


def derive_keys(secret: str) -> Keys | None:
    """None for an empty secret: nothing is encrypted then. ConfigError if this libzmq can't encrypt."""
    if not secret:
        return None
    if not zmq.has("curve"):
        raise ConfigError(
            f"a registration secret is set, but this libzmq {zmq.zmq_version()} was built without CURVE and can't "
            "encrypt: install pyzmq from PyPI, whose wheels can"
        )
    half = z85.encode(hmac.digest(secret.encode(), _LABEL, "sha256"))
    return Keys(zmq.curve_public(half), half)


def overhead_bytes(keys: Keys | None) -> int:
    """What encryption adds to a frame, at most."""
    return 64 if keys is not None else 0


def speak(socket: ZmqSocket, keys: Keys | None) -> None:
    """For a socket that will connect."""
    if keys is not None:
        socket.curve_serverkey = socket.curve_publickey = keys.public
        socket.curve_secretkey = keys.secret


class DoorCounts(NamedTuple):
    """`refused`: connections that never got through the handshake: with no key or another one, with bytes that are no
    handshake (or too many), or with too little in `HANDSHAKE_S`. `ended`: connections that did, and are over: a peer
    left, a link was cut, a message was longer than may be."""

    refused: int = 0
    ended: int = 0


class Door:
    """Beside a listening socket: answers libzmq's question who may come in, and counts who could not.

    Owned by the thread of that socket, which calls `look` when one of `sockets` is readable. With keys a context has
    one door at most.
    """

    def __init__(self, socket: ZmqSocket, keys: Keys | None) -> None:
        """Before the socket is bound."""
        self.counts = DoorCounts()
        self._num_accepted = self._num_let_in = self._num_failed = 0
        self._open: dict[int, float] = {}  # descriptor -> when its handshake must be over
        self._socket = socket
        self._keys = keys
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        self._events = _monitor(socket, zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self.sockets = [self._events]
        if keys is not None:
            self._lock(socket, keys)

    def _lock(self, socket: ZmqSocket, keys: Keys) -> None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        socket.setsockopt(zmq.ZAP_DOMAIN, b"twolane")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer nobody comes in
        self._questions = socket.context.socket(zmq.REP)
        self._questions.setsockopt(zmq.LINGER, 0)
        self._questions.bind(_ZAP_ADDRESS)
        self.sockets.append(self._questions)

    def look(self) -> None:
        """Never blocks."""
        if self._keys is not None:
            self._answer(self._keys)
        now_s = time.monotonic()
        while (event := _next_event(self._events)) is not None:
            kind, value = event
            if kind == zmq.EVENT_ACCEPTED:
                self._num_accepted += 1
                self._open[value] = now_s + HANDSHAKE_S + 1.0
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._num_let_in += 1
            elif kind == zmq.EVENT_DISCONNECTED:
                self._open.pop(value, None)
            else:
                self._num_failed += 1
        self._count(now_s)

    def _count(self, now_s: float) -> None:
        """libzmq says neither which connection got through nor always that one failed: it follows from the numbers,
        for those that aren't in their handshake any more. Until that is sure, a number is too small."""
        num_undecided = sum(deadline_s > now_s for deadline_s in self._open.values())
        num_refused = self._num_accepted - self._num_let_in - num_undecided
        self.counts = DoorCounts(
            max(self.counts.refused, self._num_failed, num_refused),
            max(self.counts.ended, self._num_let_in - len(self._open)),
        )

    def _answer(self, keys: Keys) -> None:
        """ZAP, RFC 27. Knowing the public key of this socket is not enough, though nobody tells it."""
        while True:
            try:
                version, request_id, _, _, _, mechanism, *credentials = self._questions.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            known = mechanism == b"CURVE" and hmac.compare_digest(z85.encode(credentials[0]), keys.public)
            verdict = [b"200", b"OK"] if known else [b"400", b"unknown key"]
            self._questions.send_multipart([version, request_id, *verdict, b"", b""])

    def close(self) -> None:
        """Before the socket is closed."""
        _stop_monitor(self._socket, self._events)
        for socket in self.sockets:
            socket.close()


class Knock:
    """Beside a connecting socket: whether the other side lets it in. Owned by the thread of that socket, which calls
    `look` when `socket` is readable, or now and then. Made before the socket connects."""

    def __init__(self, socket: ZmqSocket) -> None:
        self._socket = socket
        self._num_failures = 0  # in a row
        self._is_told_so = False
        self.is_let_in = False
        self.socket = _monitor(socket, zmq.EVENT_HANDSHAKE_SUCCEEDED)

    @property
    def is_locked_out(self) -> bool:
        """Where the other side only hangs up, twice in a row: once may be a peer that is just ending. Where it is told
        why, libzmq doesn't try again: only another socket can."""
        return self._is_told_so or self._num_failures >= 2

    def look(self) -> None:
        while (event := _next_event(self.socket)) is not None:
            if event[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._num_failures, self.is_let_in = 0, True
            else:
                self._num_failures += 1
                self._is_told_so |= event[0] != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

    def close(self) -> None:
        """Before the socket is closed."""
        _stop_monitor(self._socket, self.socket)
        self.socket.close()


def _monitor(socket: ZmqSocket, events: int) -> ZmqSocket:
    """Receives these events and all failures. Without a bound, since at a bound libzmq would wait for whoever reads,
    with the thread that serves all connections."""
    address = f"inproc://events of {socket.FD}"
    socket.monitor(address, events | _FAILED)
    receiver: ZmqSocket = socket.context.socket(zmq.PAIR)
    receiver.setsockopt(zmq.LINGER, 0)
    receiver.setsockopt(zmq.RCVHWM, 0)
    receiver.connect(address)
    return receiver


def _stop_monitor(socket: ZmqSocket, receiver: ZmqSocket) -> None:
    """Nothing may be sent to a receiver that is gone: libzmq would wait for ever."""
    if not receiver.closed and not socket.closed:
        socket.monitor(None, 0)


def _next_event(receiver: ZmqSocket) -> tuple[int, int] | None:
    try:
        event = parse_monitor_message(receiver.recv_multipart(zmq.NOBLOCK))
    except zmq.Again:
        return None
    return event["event"], event["value"]
