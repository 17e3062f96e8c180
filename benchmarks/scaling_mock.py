"""Many prefill and decode instances in one process that cost next to nothing, for benchmarks/scaling.py.

Each has a loopback address of its own (127.0.1.1, 127.0.1.2, ..., all at PORT) and registers as the connector does: by
its Registrar, at every discovery address given, with its load. Every other one is a P. Streams get a token every PACE_S
seconds (the request's `user` field), each at a moment of its own; what is asked without a stream is answered at once.
Idle connections are closed after 5 s, as vLLM's server does.

    python -m benchmarks.scaling_mock PORT NUM_INSTANCES DISCOVERY_ADDRESS[,DISCOVERY_ADDRESS ...]
"""

from __future__ import annotations

import asyncio
import random
import sys
from functools import partial
from time import monotonic
from typing import cast

import uvloop
import zmq
from benchmarks.proxy_mock import CHUNK, COMPLETION, STREAM_HEAD, decode_body, page_for, take_request

from twolane.connector.register import Registrar
from twolane.protocol import Load, Registration, Role

KEEP_ALIVE_S = 5.0
TICK_S = 0.05
NUM_BLOCKS, BLOCK_SIZE, BLOCKS_A_STREAM = 100_000, 16, 64
MAX_INSTANCES = 250  # of one network 127.0.1.0/24


def host_of(number: int) -> str:
    return f"127.0.1.{number + 1}"


def role_of(number: int) -> Role:
    return "D" if number % 2 else "P"


class Instance:
    """Owns its connections. A wheel of them, so that in each tick a part of the streams gets a token."""

    def __init__(self, number: int, port: int, context: zmq.Context[zmq.Socket[bytes]], discovery: str) -> None:
        self.connections: set[Connection] = set()
        self.num_streams = 0
        host = host_of(number)
        addresses = f"{host}:{port}", f"{host}:{port + 1}"
        me = Registration(role_of(number), *addresses, "twolane", "1", name=f"mock-{number}")
        self._registrar = Registrar(context, discovery, me)

    def tick(self, now: float) -> None:
        used = self.num_streams * BLOCKS_A_STREAM
        self._registrar.load = Load(NUM_BLOCKS - used, NUM_BLOCKS, BLOCK_SIZE, self.num_streams, 0)
        self._registrar.tick(now)
        for connection in list(self.connections):
            connection.tick(now)


class Connection(asyncio.Protocol):
    """Just enough HTTP: a whole request in, an answer or a stream out."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._buffer = b""
        self._pace_s = 0.0  # of the stream; 0: none
        self._due = monotonic() + KEEP_ALIVE_S  # the next token, or the end of an idle connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._instance.connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._instance.connections.discard(self)
        self._instance.num_streams -= self._pace_s > 0

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if (found := take_request(self._buffer)) is not None:
            head, raw, self._buffer = found
            self._due = monotonic() + KEEP_ALIVE_S
            self._answer(head, raw)

    def _answer(self, head: bytes, raw: bytes) -> None:
        if (page := page_for(head)) is not None:
            self._send(page)
            return
        body = decode_body(raw)
        if not body.stream or not body.user:
            self._send(COMPLETION)
            return
        self._pace_s = float(body.user)
        self._instance.num_streams += 1
        self._transport.write(STREAM_HEAD + CHUNK)
        self._due = monotonic() + self._pace_s * random.random()

    def _send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def tick(self, now: float) -> None:
        if now < self._due or self._transport.is_closing():
            return
        if self._pace_s:
            self._transport.write(CHUNK)
            self._due += self._pace_s
        else:
            self._transport.close()


async def serve(port: int, num_instances: int, discovery: str) -> None:
    loop = asyncio.get_running_loop()
    with zmq.Context() as context:
        instances = [Instance(number, port, context, discovery) for number in range(num_instances)]
        for number, instance in enumerate(instances):
            await loop.create_server(partial(Connection, instance), host_of(number), port, backlog=4096)
        while True:
            for instance in instances:
                instance.tick(monotonic())
            await asyncio.sleep(TICK_S)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
