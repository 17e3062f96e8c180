"""Asks, and notes when each token came. One connection a request; the client's own cost is small beside an engine's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httptools
import msgspec

from twolane.addresses import split_address
from twolane.bench.workload import Ask

# A server takes a connection up only after the kernel has made it: that isn't counted, as with kept-alive connections,
# which a proxy has to its instances.
ACCEPT_S = 0.003


@dataclass
class Sample:
    """One request as the client saw it, in seconds of the monotonic clock. `error`: empty if all tokens came.

    `sent_s` is taken before the first byte is written, on a connection that stands. An event may carry several tokens:
    vLLM joins those that are waiting when it writes. `num_tokens` is what the server counted; `token_ids` is filled if
    they were asked for.
    """

    sent_s: float
    event_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str = ""
    first_byte_s: float | None = None
    ended_s: float | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_s, self.event_s[1:], strict=False)]


class _Choice(msgspec.Struct):
    text: str
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Stream:
    """httptools' callbacks: collects the body and notes when each SSE event with tokens came."""

    def __init__(self, sample: Sample) -> None:
        self.complete = False
        self.body = b""
        self._sample = sample
        self._tail = b""

    def on_body(self, data: bytes) -> None:
        now_s = time.monotonic()
        self.body += data
        *events, self._tail = (self._tail + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                self._note(_decode_event(event[6:]), now_s)

    def _note(self, event: _Event, now_s: float) -> None:
        if event.choices:
            self._sample.event_s.append(now_s)
            self._sample.text += event.choices[0].text
            self._sample.token_ids += event.choices[0].token_ids or []
        if event.usage is not None:
            self._sample.num_tokens = event.usage.completion_tokens

    def on_message_complete(self) -> None:
        self.complete = True


def request_bytes(address: str, model: str, ask: Ask) -> bytes:
    fields: dict[str, object] = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.wants_token_ids:
        fields["return_token_ids"] = True
    body = msgspec.json.encode(fields)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n"
    )
    if ask.request_id:
        head += f"X-Request-Id: {ask.request_id}\r\n"
    return head.encode() + b"\r\n" + body


async def ask_once(address: str, model: str, ask: Ask, timeout_s: float) -> Sample:
    """Never raises for what the other side does: it is noted in the sample."""
    request = request_bytes(address, model, ask)
    sample = Sample(time.monotonic())
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(address, request, sample)
    except (OSError, TimeoutError, httptools.HttpParserError, msgspec.MsgspecError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    if not sample.error and sample.num_tokens != ask.max_tokens:
        sample.error = f"{sample.num_tokens} of {ask.max_tokens} tokens came"
    return sample


async def _exchange(address: str, request: bytes, sample: Sample) -> None:
    host, port = split_address(address)
    reader, writer = await asyncio.open_connection(host, port)
    stream = _Stream(sample)
    parser = httptools.HttpResponseParser(stream)
    try:
        await asyncio.sleep(ACCEPT_S)
        sample.sent_s = time.monotonic()
        writer.write(request)
        while not stream.complete:
            data = await reader.read(65536)
            if sample.first_byte_s is None:
                sample.first_byte_s = time.monotonic()
            if not data:
                sample.error = "the connection was closed"
                return
            parser.feed_data(data)
        sample.ended_s = time.monotonic()
        if parser.get_status_code() != 200:
            sample.error = f"{parser.get_status_code()}: {stream.body[:200]!r}"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def run_in_turn(address: str, model: str, asks: list[Ask], timeout_s: float) -> list[Sample]:
    """One request at a time."""
    return [await ask_once(address, model, ask, timeout_s) for ask in asks]


async def run_at_times(
    address: str, model: str, asks: list[Ask], timeout_s: float, on_end: Callable[[Sample], None] = lambda _: None
) -> list[Sample]:
    """Each request at its time, whether the earlier ones have ended or not. `on_end`: called with each as it ends."""
    started_s = time.monotonic()

    async def wait_and_ask(ask: Ask) -> Sample:
        await asyncio.sleep(max(0.0, started_s + ask.at_s - time.monotonic()))
        sample = await ask_once(address, model, ask, timeout_s)
        on_end(sample)
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait_and_ask(ask)) for ask in asks]
    return [task.result() for task in tasks]


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection while times are taken."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
