"""The load generator of benchmarks/proxy.py: kept-alive connections, each with one stream after another."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

END = b"0\r\n\r\n"


def request_bytes(seed: int, prompt_bytes: int, max_tokens: int, pace_ms: float, port: int) -> bytes:
    """A streaming completion with a text prompt. `user` tells the mock instance how to pace the tokens."""
    words = random.Random(seed)
    prompt = " ".join(f"{words.randrange(16**7):07x}" for _ in range(prompt_bytes // 8))
    fields: dict[str, object] = {"model": "mock", "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    if pace_ms:
        fields["user"] = str(pace_ms)
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Load:
    """`num_requests` in all, over `concurrency` connections."""

    port: int
    num_requests: int
    concurrency: int
    max_tokens: int
    pace_ms: float = 0.0
    prompt_bytes: int = 2048
    seed: int = 1


@dataclass
class Outcome:
    num_ok: int = 0
    errors: list[str] = field(default_factory=list)
    first_byte_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


class Client(asyncio.Protocol):
    """Sends the next request when an answer has ended; checks that all tokens came."""

    def __init__(self, load: Load, outcome: Outcome, number: int, left: list[int], done: asyncio.Future[None]) -> None:
        self._load = load
        self._outcome = outcome
        self._left = left
        self._done = done
        self._request = request_bytes(
            load.seed * 100_003 + number, load.prompt_bytes, load.max_tokens, load.pace_ms, load.port
        )
        self._got: list[bytes] = []
        self._first_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        if self._left[0] <= 0:
            self._transport.close()
            return
        self._left[0] -= 1
        self._got.clear()
        self._first_at = 0.0
        self._sent_at = perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._first_at and (self._got or b"data:" in data):
            self._first_at = perf_counter()
        self._got.append(data)
        if data.endswith(END) or (len(data) < len(END) and b"".join(self._got).endswith(END)):
            self._ended()

    def _ended(self) -> None:
        answer = b"".join(self._got)
        if b"data: [DONE]" not in answer:
            return  # a token's bytes that look like an end
        if not answer.startswith(b"HTTP/1.1 200") or answer.count(b'"text":') != self._load.max_tokens:
            self._outcome.errors.append(answer[:200].decode("latin-1"))
        else:
            self._outcome.num_ok += 1
            self._outcome.first_byte_s.append(self._first_at - self._sent_at)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._transport.is_closing() or self._left[0] > 0:
            self._outcome.errors.append(f"connection lost: {exc} after {b''.join(self._got)[:200]!r}")
        if not self._done.done():
            self._done.set_result(None)


async def run(load: Load, timeout_s: float = 300.0) -> Outcome:
    """Connects in small groups, so that no backlog overflows."""
    loop = asyncio.get_running_loop()
    outcome = Outcome()
    left = [load.num_requests]
    began_at = perf_counter()
    ends: list[asyncio.Future[None]] = []

    async def connect(number: int) -> None:
        done: asyncio.Future[None] = loop.create_future()
        ends.append(done)
        await loop.create_connection(lambda: Client(load, outcome, number, left, done), "127.0.0.1", load.port)

    async with asyncio.timeout(timeout_s):
        for first in range(0, load.concurrency, 64):
            await asyncio.gather(*(connect(n) for n in range(first, min(first + 64, load.concurrency))))
        await asyncio.gather(*ends)
    outcome.wall_s = perf_counter() - began_at
    return outcome
