"""One try at a request: its legs sent to one P and one D in the order of their kind, until there is a verdict."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic

import msgspec

from twolane.config import ProxySettings
from twolane.errors import StaleConnectionError, UpstreamConnectionError, UpstreamError, UpstreamTimeoutError
from twolane.proxy.body import SplitBody
from twolane.proxy.histogram import Histogram
from twolane.proxy.http_client import Exchange, HttpClient, request_bytes
from twolane.proxy.kinds import HANDOVERS
from twolane.proxy.legs import DecodeLeg, PrefillLeg, Verdict, judge
from twolane.proxy.policy import Ask, Route, Router
from twolane.proxy.pool import Instance, Pool, Ticket
from twolane.proxy.stats import RequestRecord
from twolane.proxy.tracing import RequestTrace


class Job(msgspec.Struct, frozen=True):
    """What a client wants of an instance, ready to be sent to any. Without `body` it is a plain relay to D."""

    method: str
    target: bytes
    headers: bytes  # encoded lines that both legs get, without X-Request-Id
    request_id: str
    ask: Ask
    body: SplitBody | None = None
    raw: bytes = b""
    trace: RequestTrace | None = None  # then `headers` holds no trace context


@dataclass(frozen=True, slots=True)
class Upstreams:
    """Whom an attempt works with."""

    settings: ProxySettings
    pool: Pool
    client: HttpClient
    router: Router
    gaps: Histogram  # between the arrivals of a stream's bytes


class Attempt:
    """Owns two exchanges, their deadlines and the instances' counts; `close` ends all of it, at any time.

    Where D's leg waits for P's answer, it is sent from the callback that brings that answer's end. Deadlines fail
    their leg, so that a late leg is judged like a broken one.
    """

    def __init__(self, job: Job, route: Route, upstreams: Upstreams, record: RequestRecord) -> None:
        self.route = route
        self._handover = HANDOVERS[route.decode.kind]
        self.transfer_id = ""
        if route.prefill is not None:
            self.transfer_id = self._handover.transfer_id(route.prefill, route.decode)
        self._job = job
        self._upstreams = upstreams
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._judged: asyncio.Future[Verdict] = self._loop.create_future()
        self._tickets: list[Ticket] = []
        self.prefill: PrefillLeg | None = None
        self._prefill_exchange: Exchange | None = None
        self._prefill_timer: asyncio.TimerHandle | None = None
        self.decode = DecodeLeg(route.decode, record, self._changed, upstreams.gaps)
        self.decode_exchange: Exchange | None = None
        self._first_byte_timer: asyncio.TimerHandle | None = None
        self._blamed: set[Instance] = set()
        self._closed = False

    def send(self) -> None:
        """Sends both legs, or P's if D's has to wait for its answer. Returns without waiting."""
        prefill = self.route.prefill
        if prefill is not None:
            self._send_prefill(prefill)
        if prefill is None or not self._handover.prefill_first:
            self._send_decode(b"")

    def _send_prefill(self, prefill: Instance) -> None:
        assert self._job.body is not None
        self.prefill = leg = PrefillLeg(prefill, self._record, self._changed, self._handover.reads_prefill)
        body = self._handover.for_prefill(self._job.body, self.transfer_id, prefill, self.route.decode)
        self._record.prefill_sent_at = monotonic()
        self._prefill_exchange = self._open(prefill, body, leg)
        self._prefill_timer = self._deadline(leg, self._upstreams.settings.prefill_timeout_s, "prefill")

    def _send_decode(self, answer: bytes) -> None:
        """Raises UpstreamError if P's answer makes no sense."""
        body = self._decode_body(answer)
        self._record.decode_sent_at = monotonic()
        self.decode_exchange = self._open(self.route.decode, body, self.decode)
        timeout_s = self._upstreams.settings.first_byte_timeout_s
        self._first_byte_timer = self._deadline(self.decode, timeout_s, "first byte")

    def _decode_body(self, answer: bytes) -> bytes:
        body, prefill = self._job.body, self.route.prefill
        if body is None:
            return self._job.raw
        if prefill is None:
            return body.for_decode_alone()
        return self._handover.for_decode(body, self.transfer_id, prefill, self.route.decode, answer)

    def _open(self, instance: Instance, body: bytes, leg: PrefillLeg | DecodeLeg) -> Exchange:
        job = self._job
        self._tickets.append(Ticket(instance, job.ask.num_tokens))
        request_id = job.request_id
        if self.transfer_id:
            request_id = self._handover.request_id(self.transfer_id, request_id)
        headers = b"%bx-request-id: %b\r\n" % (job.headers, request_id.encode("ascii"))
        if job.trace is not None:
            headers += job.trace.headers_for(instance.role)
        request = request_bytes(job.method, job.target, instance.address, headers, body)
        return self._upstreams.client.send(instance.address, request, leg)

    def _deadline(self, leg: PrefillLeg | DecodeLeg, timeout_s: float, what: str) -> asyncio.TimerHandle:
        return self._loop.call_later(timeout_s, _too_late, leg, what, timeout_s)

    def _changed(self) -> None:
        """From a leg: something about it is new. Runs in the socket's callback."""
        prefill, decode = self.prefill, self.decode.state
        if prefill is not None and prefill.settled.done():
            self._tickets[0].give_back()
            if self.decode_exchange is None:
                self._prefill_settled(prefill)
            if prefill.state.error is not None:
                self._blame(self.route.prefill, prefill.state.error)
        if decode.error is not None:
            self._blame(self.route.decode, decode.error)
        if not self._judged.done():
            verdict = judge(prefill.state if prefill is not None else None, decode)
            if verdict is not Verdict.WAIT:
                self._judged.set_result(verdict)
                if self._first_byte_timer is not None:
                    self._first_byte_timer.cancel()

    def _prefill_settled(self, leg: PrefillLeg) -> None:
        """It is D's turn, if it wasn't before, and if P's answer is a good one."""
        if self._closed or self._record.prefill_done_at is None:
            return
        try:
            self._send_decode(leg.body)
        except UpstreamError as error:
            leg.state.error = error

    def _blame(self, instance: Instance | None, error: UpstreamError) -> None:
        """A broken connection takes the instance out at once, also if this request no longer needs it."""
        if instance is None or instance in self._blamed:
            return
        self._blamed.add(instance)
        if isinstance(error, UpstreamConnectionError):
            self._upstreams.client.forget_idle(instance.address)
            if not isinstance(error, StaleConnectionError):
                self._upstreams.pool.connection_failed(instance, str(error), monotonic())

    async def verdict(self) -> Verdict:
        """What to do now; never WAIT."""
        return await self._judged

    def error_of(self, verdict: Verdict) -> UpstreamError:
        """Why a leg has to be tried again."""
        leg = self.prefill if verdict is Verdict.RETRY_PREFILL else self.decode
        assert leg is not None
        assert leg.state.error is not None
        return leg.state.error

    async def prefill_settled(self, timeout_s: float) -> None:
        """Gives P's answer a little time after D's has ended, so that its connection can be kept."""
        if self.prefill is not None and not self.prefill.settled.done():
            await asyncio.wait((self.prefill.settled,), timeout=timeout_s)

    def close(self) -> None:
        """Cuts what is still open. Idempotent."""
        self._closed = True
        self.decode.forget()
        if self.prefill is not None:
            self.prefill.forget()
        for timer in (self._prefill_timer, self._first_byte_timer):
            if timer is not None:
                timer.cancel()
        if self._prefill_exchange is not None:
            self._prefill_exchange.close()
        if self.decode_exchange is not None:
            self.decode_exchange.close()
        for ticket in self._tickets:
            ticket.give_back()


def _too_late(leg: PrefillLeg | DecodeLeg, what: str, timeout_s: float) -> None:
    leg.failed(UpstreamTimeoutError(f"no {what} within {timeout_s:g} s"))
