"""The two legs of an attempt, as states that the sockets' callbacks advance, and the judgement over them.

`judge` is the whole failover table: it looks at both states and says what the request should do now.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from twolane.errors import UpstreamError
from twolane.protocol import LANES
from twolane.proxy.headers import Headers, find
from twolane.proxy.histogram import Histogram
from twolane.proxy.pool import Instance
from twolane.proxy.stats import RequestRecord
from twolane.proxy.upstream import ResponseHead

_MAX_PREFILL_BODY_BYTES = 1024 * 1024


@dataclass(slots=True)
class LegState:
    """How far one leg's answer is. `begun`: so far that nothing else may answer the client any more."""

    status: int = 0  # 0 until the head has come
    begun: bool = False
    ended: bool = False
    error: UpstreamError | None = None


class Verdict(enum.Enum):
    WAIT = enum.auto()
    RELAY = enum.auto()  # D's answer, of whatever status below 500, goes to the client
    ANSWER_PREFILL = enum.auto()  # P refused the request as wrong: its answer goes to the client
    RETRY_PREFILL = enum.auto()  # another P, or none
    RETRY_DECODE = enum.auto()  # another D, with the prefill leg again


def judge(prefill: LegState | None, decode: LegState) -> Verdict:
    """Pure. Once D has begun, P's fate changes nothing: D has, or recomputes, what it needs."""
    if decode.begun:
        return Verdict.RELAY
    if decode.error is not None:
        return Verdict.RETRY_DECODE
    if prefill is None:
        return Verdict.WAIT
    if prefill.error is not None:
        return Verdict.RETRY_PREFILL
    if prefill.ended and prefill.status >= 400:
        return Verdict.ANSWER_PREFILL
    return Verdict.WAIT


class _Leg:
    """What both legs share: a leg settles once, by its end or by its first error, whichever comes first. Its moments
    are written into the request's record as they come."""

    def __init__(self, instance: Instance, record: RequestRecord, on_change: Callable[[], None]) -> None:
        self.state = LegState()
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._instance = instance
        self._record = record
        self._on_change = on_change

    @property
    def _name(self) -> str:
        return f"{LANES[self._instance.role]} instance {self._instance.address}"

    def failed(self, error: UpstreamError) -> None:
        if self.state.error is None and not self.state.ended:
            self.state.error = error
            self._settle()

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)
        self._on_change()


class PrefillLeg(_Leg):
    """Listens to P. A 4xx is kept, since it may be the client's; a good answer only if its kind `keeps_answer`."""

    def __init__(
        self, instance: Instance, record: RequestRecord, on_change: Callable[[], None], keeps_answer: bool = False
    ) -> None:
        super().__init__(instance, record, on_change)
        self.headers: Headers = []
        self.body = b""
        self._keeps_answer = keeps_answer
        self._num_bytes = 0

    def head_received(self, head: ResponseHead) -> None:
        self.state.status = head.status
        self.headers = head.headers
        if not (200 <= head.status < 300 or 400 <= head.status < 500):
            self.failed(UpstreamError(f"{self._name} answered {head.status}"))

    def data_received(self, data: bytes, is_last: bool) -> None:  # noqa: ARG002
        self._num_bytes += len(data)
        if self._num_bytes > _MAX_PREFILL_BODY_BYTES:
            self.failed(UpstreamError(f"{self._name} answered more than {_MAX_PREFILL_BODY_BYTES} bytes"))
        elif self._keeps_answer or self.state.status >= 400:
            self.body += data

    def ended(self) -> None:
        if self.state.error is None:
            self.state.ended = True
            if self.state.status < 300:
                self._record.prefill_done_at = monotonic()
            self._settle()

    def forget(self) -> None:
        """Nobody wants to know any more. Ends a cycle of references."""
        self._on_change = _ignore


def _ignore() -> None:
    pass


@dataclass(slots=True)
class Held:
    """What D has sent and the client has not got yet."""

    pieces: list[bytes] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, data: bytes) -> None:
        self.pieces.append(data)
        self.num_bytes += len(data)

    def take(self) -> bytes:
        data = b"".join(self.pieces)
        self.pieces.clear()
        self.num_bytes = 0
        return data


class DecodeLeg(_Leg):
    """Listens to D. Its answer is held until `sink` is set, then goes there straight from the socket's callback."""

    def __init__(
        self, instance: Instance, record: RequestRecord, on_change: Callable[[], None], gaps: Histogram
    ) -> None:
        super().__init__(instance, record, on_change)
        self._gaps = gaps
        self.head: ResponseHead | None = None
        self.is_stream = False  # server-sent events
        self.held = Held()
        self.last_data_at = 0.0
        self.sink: Callable[[bytes, bool], None] | None = None  # is told which bytes are the last
        self.on_held: Callable[[], None] | None = None  # more is held

    def head_received(self, head: ResponseHead) -> None:
        self.state.status = head.status
        self.last_data_at = monotonic()
        if head.status >= 500:
            self.failed(UpstreamError(f"{self._name} answered {head.status}"))
            return
        self.head = head
        content_type = find(head.headers, b"content-type") or b""
        self.is_stream = content_type.startswith(b"text/event-stream")
        if not self.is_stream:
            # vLLM sends this head when the answer is ready; a stream's head says only that the request is accepted.
            self._begin()

    def data_received(self, data: bytes, is_last: bool) -> None:
        now = monotonic()
        gap_s, self.last_data_at = now - self.last_data_at, now
        if self.sink is not None:
            if self.is_stream:
                self._gaps.add(gap_s)
            self.sink(data, is_last)
            return
        if self.state.error is not None:
            return
        self.held.add(data)
        if self._record.first_byte_at is None:
            self._record.first_byte_at = now
            self._begin()
        if self.on_held is not None:
            self.on_held()

    def ended(self) -> None:
        if self.state.error is None:
            self.state.ended = True
            self._begin()
            self._settle()

    def forget(self) -> None:
        """Nobody wants to know any more. Ends a cycle of references."""
        self._on_change = _ignore
        self.sink = self.on_held = None

    def _begin(self) -> None:
        if not self.state.begun:
            self.state.begun = True
            self._on_change()
