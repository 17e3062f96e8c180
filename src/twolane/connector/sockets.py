"""Every socket between workers is made here: how much a stranger may send it, and when it finds out that a link is cut.

What makes them safe on a network (keys, encryption) belongs here, too.
"""

from __future__ import annotations

import zmq

MAX_CONTROL_BYTES = 16 << 20  # the longest message is an Announce: 5 bytes a block
LINK_TIMEOUT_S = 30.0  # a connection on which nobody answers for so long is closed, also an idle one

ZmqSocket = zmq.Socket[bytes]
ZmqContext = zmq.Context[ZmqSocket]


def listen(
    context: ZmqContext, address: str, *, max_bytes: int = MAX_CONTROL_BYTES, timeout_s: float = LINK_TIMEOUT_S
) -> ZmqSocket:
    """A ROUTER at `host:port`, which tells when a message can't go to its peer. Raises zmq.ZMQError."""
    socket = _make(context, zmq.ROUTER, address, max_bytes, timeout_s)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        socket.bind(f"tcp://{address}")
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def connect(
    context: ZmqContext, address: str, *, max_bytes: int = MAX_CONTROL_BYTES, timeout_s: float = LINK_TIMEOUT_S
) -> ZmqSocket:
    """A DEALER to `host:port`; doesn't wait for the other side. Raises zmq.ZMQError if that is no address."""
    socket = _make(context, zmq.DEALER, address, max_bytes, timeout_s)
    try:
        socket.connect(f"tcp://{address}")
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def _make(context: ZmqContext, kind: int, address: str, max_bytes: int, timeout_s: float) -> ZmqSocket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by open transfers and by slots
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(timeout_s * 250))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(timeout_s * 1000))
    socket.setsockopt(zmq.IPV6, address.startswith("["))
    return socket
