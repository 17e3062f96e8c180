"""The clients of benchmarks/scaling.py: many open streams, and single requests that look how long it takes now."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

GROUP = 100  # streams opened at once
FROM_ONE_ADDRESS = 4000  # so that the ports of no address of ours run out
TOKEN = b'"text":'


def request_bytes(max_tokens: int, pace_s: float = 0.0) -> bytes:
    """A completion of 2 KiB; with a pace, a stream."""
    fields: dict[str, object] = {"model": "mock", "prompt": "scaling " * 256, "max_tokens": max_tokens}
    if pace_s:
        fields |= {"stream": True, "user": str(pace_s)}
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: mock\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Counts:
    """What the streams have come to. Tokens count from the last `begin`."""

    num_open: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """Opened once, for as long as it may last. `begun` is set by its first token, or its end."""

    def __init__(self, counts: Counts, request: bytes) -> None:
        self.begun = asyncio.Event()
        self._counts = counts
        self._request = request
        self._is_open = False
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._is_open and TOKEN in data:
            self._is_open = True
            self._counts.num_open += 1
            self.begun.set()
        elif not self._is_open and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data[:200].decode("latin-1"))
        elif b'"error"' in data:
            self._fail(data[:300].decode("latin-1"))
        self._counts.num_tokens += data.count(TOKEN)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counts.num_open -= self._is_open
        if not self._closing:
            self._fail(f"ended: {exc}")
        self.begun.set()

    def _fail(self, why: str) -> None:
        if not self._closing:
            self._counts.errors.append(why)
        self.close()

    def close(self) -> None:
        self._closing = True
        self._transport.abort()


class Streams:
    """Owns the open streams, over all the proxies in turn."""

    def __init__(self, ports: list[int], pace_s: float) -> None:
        self.counts = Counts()
        self._ports = ports
        self._request = request_bytes(10**9, pace_s)
        self._streams: list[Stream] = []

    async def grow_to(self, num: int, timeout_s: float = 300.0) -> float:
        """Opens more; returns how many a second, once each has its first token or its error."""
        began_at, before = perf_counter(), len(self._streams)
        async with asyncio.timeout(timeout_s):
            while len(self._streams) < num:
                first = len(self._streams)
                await asyncio.gather(*(self._open(n) for n in range(first, min(num, first + GROUP))))
        return (num - before) / (perf_counter() - began_at)

    async def _open(self, number: int) -> None:
        stream = Stream(self.counts, self._request)
        self._streams.append(stream)
        local = f"127.0.0.{2 + number // FROM_ONE_ADDRESS}", 0
        port = self._ports[number % len(self._ports)]
        try:
            await asyncio.get_running_loop().create_connection(lambda: stream, "127.0.0.1", port, local_addr=local)
        except OSError as error:
            self.counts.errors.append(str(error))
            return
        await stream.begun.wait()

    def close(self) -> None:
        for stream in self._streams:
            if hasattr(stream, "_transport"):
                stream.close()


@dataclass
class Times:
    """Of single requests, in ms, and what failed."""

    got_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.got_ms)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else float("nan")


async def ask_again_and_again(port: int, request: bytes, times: Times, pause_s: float, num: int = 10**9) -> None:
    """One at a time over one kept-alive connection, until cancelled; notes the time to the whole small answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for _ in range(num):
            began_at = perf_counter()
            writer.write(request)
            status, _ = await read_answer(reader)
            times.got_ms.append((perf_counter() - began_at) * 1e3)
            if status != 200:
                times.errors.append(f"HTTP {status}")
            await asyncio.sleep(pause_s)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        times.errors.append(str(error))
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if line)
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(fields[b"content-length"]))


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: mock\r\n\r\n".encode())
        return (await read_answer(reader))[1]
    finally:
        writer.close()
