"""Every socket between workers is made here: who may speak on it, how much at once, and when it finds out that a link
is cut."""

from __future__ import annotations

import logging

import zmq

from twolane.curve import LOCKED_OUT, Door, Keys, Knock, ZmqContext, ZmqSocket, overhead_bytes, speak

MAX_CONTROL_BYTES = 16 << 20  # the longest message is an Announce: 5 bytes a block
LOCKED_OUT_FOR_S = 60.0  # so long after the last try it is a problem worth showing
LINK_TIMEOUT_S = 30.0  # a connection on which nobody answers for so long is closed, also an idle one

logger = logging.getLogger("vllm.twolane")  # see agent.py


def listen(
    context: ZmqContext,
    address: str,
    keys: Keys | None,
    *,
    max_bytes: int = MAX_CONTROL_BYTES,
    timeout_s: float = LINK_TIMEOUT_S,
) -> tuple[ZmqSocket, Door]:
    """A ROUTER at `host:port`, which tells when a message can't go to its peer. Raises zmq.ZMQError."""
    socket = _make(context, zmq.ROUTER, address, max_bytes + overhead_bytes(keys), timeout_s)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    door = Door(socket, keys)
    try:
        socket.bind(f"tcp://{address}")
    except zmq.ZMQError:
        door.close()
        socket.close()
        raise
    return socket, door


def connect(
    context: ZmqContext,
    address: str,
    keys: Keys | None,
    *,
    max_bytes: int = MAX_CONTROL_BYTES,
    timeout_s: float = LINK_TIMEOUT_S,
    receive_ahead: int = 1000,
) -> tuple[ZmqSocket, Knock]:
    """A DEALER to `host:port`; doesn't wait for the other side. `receive_ahead`: messages that wait to be taken.
    Raises zmq.ZMQError if that is no address."""
    socket = _make(context, zmq.DEALER, address, max_bytes + overhead_bytes(keys), timeout_s)
    socket.setsockopt(zmq.RCVHWM, receive_ahead)  # before it connects, or it counts for nothing
    speak(socket, keys)
    knock = Knock(socket)
    try:
        socket.connect(f"tcp://{address}")
    except zmq.ZMQError:
        knock.close()
        socket.close()
        raise
    return socket, knock


def _make(context: ZmqContext, kind: int, address: str, max_bytes: int, timeout_s: float) -> ZmqSocket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by open transfers and by slots
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(timeout_s * 250))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(timeout_s * 1000))
    socket.setsockopt(zmq.IPV6, address.startswith("["))
    return socket


class LockedOut:
    """P that don't let D in, or that D takes for strangers. Owner: the agent's thread."""

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}  # address -> when that was found out last

    def note(self, address: str, now_s: float) -> str:
        """Why, in words; logged at the first time."""
        if address not in self._last_s:
            logger.error("%s; the prompts that it has are computed here", _in_words(address))
        self._last_s[address] = now_s
        return _in_words(address)

    def clear(self, address: str) -> None:
        self._last_s.pop(address, None)

    def problem(self, now_s: float) -> str:
        """Of a P that was asked lately, in words; empty: no trouble known."""
        for address, last_s in self._last_s.items():
            if now_s - last_s < LOCKED_OUT_FOR_S:
                return _in_words(address)
        return ""


def _in_words(address: str) -> str:
    return f"no connection to prefill instance {address}: {LOCKED_OUT}"
