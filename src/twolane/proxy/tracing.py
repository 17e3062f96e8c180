"""Spans of requests for an OpenTelemetry collector, made when a request is over. Knows nothing of OpenTelemetry itself:
`spans` does, and is imported only where an endpoint is configured.

While a request runs, all that happens is that its legs get a `traceparent` of ours (W3C Trace Context, level 1), so
that vLLM's own spans hang below.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from twolane.errors import ConfigError
from twolane.protocol import Role
from twolane.proxy.headers import Headers

if TYPE_CHECKING:
    from twolane.proxy.stats import RequestRecord

logger = logging.getLogger(__name__)

HEADERS = frozenset((b"traceparent", b"tracestate"))
SETTLE_S = 1.0  # after a request's end: so late come P's answer and the engines' last words
_EVERY_S = 0.5
_REQUESTS_A_TURN = 16  # then other callbacks of the loop get theirs
_MAX_PENDING = 8192
_MAX_STATE_BYTES = 512
_CLOSE_DEADLINE_S = 3.0
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Parent:
    """A client's span."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: bytes  # tracestate, as it came


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The ids of a request's spans that must be known before they are made."""

    parent: Parent | None
    trace_id: str
    root_id: str
    prefill_id: str
    decode_id: str
    is_chat: bool
    model: str

    def headers_for(self, role: Role) -> bytes:
        """For a leg: its spans hang below ours."""
        span_id = self.prefill_id if role == "P" else self.decode_id
        lines = b"traceparent: 00-%b-%b-01\r\n" % (self.trace_id.encode(), span_id.encode())
        if self.parent is not None and self.parent.state:
            lines += b"tracestate: %b\r\n" % self.parent.state
        return lines


def parse_parent(headers: Headers) -> Parent | None:
    """None if there is none, or not a valid one: then a trace begins here, and `tracestate` has no meaning."""
    values = [value for name, value in headers if name == b"traceparent"]
    match = _TRACEPARENT.fullmatch(values[0].strip()) if len(values) == 1 else None
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    state = b",".join(value.strip() for name, value in headers if name == b"tracestate")
    state = state if len(state) <= _MAX_STATE_BYTES else b""
    return Parent(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & 1), state)


def begin_trace(headers: Headers, is_chat: bool, model: str) -> RequestTrace | None:
    """None if the client's trace is one that isn't sampled: its headers go through as they are."""
    parent = parse_parent(headers)
    if parent is not None and not parent.is_sampled:
        return None
    random = os.urandom(40).hex()
    trace_id = parent.trace_id if parent is not None else random[:32]
    return RequestTrace(parent, trace_id, random[32:48], random[48:64], random[64:80], is_chat, model)


class Exporter(Protocol):
    """Takes spans off the loop's hands: `put` doesn't block, `close` may."""

    def put(self, record: RequestRecord, trace: RequestTrace) -> None: ...

    def close(self) -> None: ...


class Tracer:
    """Owns the requests that have ended and whose spans aren't made yet. `run` makes them, `close` makes the rest."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._pending: deque[tuple[float, RequestRecord]] = deque()
        self._num_dropped = 0

    def ended(self, record: RequestRecord) -> None:
        if len(self._pending) < _MAX_PENDING:
            self._pending.append((monotonic() + SETTLE_S, record))
        else:
            self._num_dropped += 1

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            while self.make_spans(monotonic(), _REQUESTS_A_TURN):  # noqa: ASYNC110 - lets others have their turn
                await asyncio.sleep(0)

    def make_spans(self, now: float, at_most: int = _MAX_PENDING) -> bool:
        """Of those that are due by `now`. Whether there are more than `at_most`."""
        for _ in range(at_most):
            if not self._pending or self._pending[0][0] > now:
                self._tell_dropped()
                return False
            self._make(self._pending.popleft()[1])
        return True

    def _make(self, record: RequestRecord) -> None:
        assert record.trace is not None
        try:
            self._exporter.put(record, record.trace)
        except Exception:
            logger.exception("no spans request_id=%s", record.request_id)

    def _tell_dropped(self) -> None:
        if self._num_dropped:
            logger.warning("spans left out requests=%d: more ended than could be told", self._num_dropped)
            self._num_dropped = 0

    async def close(self, deadline_s: float = _CLOSE_DEADLINE_S) -> None:
        """Sends what there is. A collector that doesn't answer is not waited for: the thread dies with the process."""
        self.make_spans(float("inf"))
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close_exporter() -> None:
            self._exporter.close()
            if not loop.is_closed():
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=close_exporter, name="twolane-otel-close", daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s):
                await closed.wait()
        except TimeoutError:
            logger.warning("the last spans were not delivered within %g s", deadline_s)


def make_tracer(endpoint: str) -> Tracer | None:
    """None without an endpoint. ConfigError if it is none, or if OpenTelemetry isn't installed."""
    if not endpoint:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp_endpoint {endpoint}: name a collector's OTLP/HTTP address, as http://127.0.0.1:4318")
    try:
        from twolane.proxy.spans import SpanExporter  # noqa: PLC0415 - large, and an extra
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint is {endpoint}, but OpenTelemetry is not installed ({error}): "
            "pip install 'twolane[otel]', or unset it (OTEL_EXPORTER_OTLP_ENDPOINT counts too)"
        ) from error
    return Tracer(SpanExporter.over_http(endpoint))
