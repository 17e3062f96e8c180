"""A prefill and a decode instance in one process that cost next to nothing, for benchmarks/proxy.py.

They speak just enough HTTP for proxies: a parser of a few lines, answers made beforehand, one write a token. `pace_ms`
0 sends a stream's tokens in successive turns of the event loop, without a pause. Otherwise all streams get a token at
each tick, as an engine's step gives one to every request that it decodes.

    python benchmarks/proxy_mock.py PREFILL_PORT DECODE_PORT [DISCOVERY_PORT=KIND ...]

registers at each discovery port every 3 s, in TwoLane's format (KIND twolane) or in P2pNcclConnector's (KIND p2pnccl).
The pace of a request is read from its `user` field.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import msgspec
import uvloop
import zmq

from twolane.protocol import REGISTER_EVERY_S

MODEL = "mock"
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"mock",'
    b'"choices":[{"index":0,"text":" word"}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
    b"server: mock\r\n\r\n"
)
COMPLETION = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":[{"index":0,"text":" word",'
    b'"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
MODELS = (
    b'{"object":"list","data":[{"id":"mock","object":"model","created":1,"owned_by":"mock","max_model_len":32768}]}'
)
# As large as vLLM's own, with the lines that the proxy looks for at its end.
METRICS = b"".join(
    b'vllm:some_histogram_seconds_bucket{engine="0",le="%d",model_name="mock"} 0.0\n' % number for number in range(1000)
) + b"".join(
    b'%b{engine="0",model_name="mock"} 1.0\n' % name
    for name in (b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total", b"twolane_kv_received_bytes_total")
)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Body(msgspec.Struct):
    max_tokens: int = 16
    stream: bool | None = False
    user: str | None = None


decode_body = msgspec.json.Decoder(Body).decode


def take_request(buffer: bytes) -> tuple[bytes, bytes, bytes] | None:
    """(head, body, what is behind them) of a request; None as long as it isn't whole."""
    head, separator, rest = buffer.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    num_bytes = int(length[1]) if length else 0
    if not separator or len(rest) < num_bytes:
        return None
    return head, rest[:num_bytes], rest[num_bytes:]


def page_for(head: bytes) -> bytes | None:
    """The answer to what isn't a completion."""
    if head.startswith(b"POST /v1/"):
        return None
    return MODELS if b"/v1/models" in head[:40] else METRICS if b"/metrics" in head[:40] else b"{}"


class Ticker:
    """Owns the streams that are paced: one token each at every tick."""

    def __init__(self) -> None:
        self._by_pace: dict[float, set[Connection]] = {}

    def add(self, connection: Connection, pace_s: float) -> None:
        if not self._by_pace.get(pace_s):
            self._by_pace[pace_s] = set()
            asyncio.get_running_loop().call_later(pace_s, self._tick, pace_s)
        self._by_pace[pace_s].add(connection)

    def _tick(self, pace_s: float) -> None:
        streams = self._by_pace[pace_s]
        streams -= {stream for stream in streams if not stream.send_token()}
        if streams:
            asyncio.get_running_loop().call_later(pace_s, self._tick, pace_s)


class Connection(asyncio.Protocol):
    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        self._buffer = b""
        self._tokens_left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._call_soon = asyncio.get_running_loop().call_soon

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if (found := take_request(self._buffer)) is not None:
            head, raw, self._buffer = found
            self._answer(head, raw)

    def _answer(self, head: bytes, raw: bytes) -> None:
        if (page := page_for(head)) is not None:
            self._send(page)
            return
        body = decode_body(raw)
        if not body.stream:
            self._send(COMPLETION)
            return
        self._tokens_left = body.max_tokens
        self._transport.write(STREAM_HEAD)
        if body.user:
            self._ticker.add(self, float(body.user) / 1e3)
        else:
            self._send_all()

    def _send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _send_all(self) -> None:
        if self.send_token():
            self._call_soon(self._send_all)

    def send_token(self) -> bool:
        """False if that was the last."""
        if self._transport.is_closing():
            return False
        self._tokens_left -= 1
        self._transport.write(CHUNK if self._tokens_left else CHUNK + LAST)
        return self._tokens_left > 0


async def register(sockets: list[tuple[zmq.Socket[bytes], bytes]]) -> None:
    while True:
        for socket, message in sockets:
            socket.send(message, zmq.NOBLOCK)
        await asyncio.sleep(REGISTER_EVERY_S)


def registrations(
    context: zmq.Context[zmq.Socket[bytes]], ports: dict[str, int], targets: list[str]
) -> list[tuple[zmq.Socket[bytes], bytes]]:
    made = []
    for target in targets:
        discovery_port, _, kind = target.partition("=")
        for role, port in ports.items():
            socket = context.socket(zmq.DEALER)
            address = f"127.0.0.1:{port + 1000}"
            socket.setsockopt(zmq.IDENTITY, address.encode())
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"tcp://127.0.0.1:{discovery_port}")
            message = {"type": role, "http_address": f"127.0.0.1:{port}", "zmq_address": address}
            if kind == "twolane":
                message |= {"kind": kind, "epoch": "1"}
            made.append((socket, msgspec.msgpack.encode(message)))
    return made


async def serve(ports: dict[str, int], targets: list[str]) -> None:
    ticker = Ticker()
    loop = asyncio.get_running_loop()
    for port in ports.values():
        await loop.create_server(lambda: Connection(ticker), "127.0.0.1", port, backlog=4096)
    with zmq.Context() as context:
        await register(registrations(context, ports, targets))


if __name__ == "__main__":
    uvloop.run(serve({"P": int(sys.argv[1]), "D": int(sys.argv[2])}, sys.argv[3:]))
