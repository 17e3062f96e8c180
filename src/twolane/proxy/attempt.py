"""One try at a request: both legs sent at once to one P and one D, until there is a verdict."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from time import monotonic

from twolane.config import ProxySettings
from twolane.errors import StaleConnectionError, UpstreamConnectionError, UpstreamError, UpstreamTimeoutError
from twolane.proxy.body import SplitBody
from twolane.proxy.http_client import Exchange, HttpClient, request_bytes
from twolane.proxy.legs import DecodeLeg, PrefillLeg, Verdict, judge
from twolane.proxy.policy import Route
from twolane.proxy.pool import Instance, Pool, Ticket


@dataclass(frozen=True, slots=True)
class Job:
    """What a client wants of an instance, ready to be sent to any. Without `body` it is a plain relay to D."""

    method: str
    target: bytes
    headers: bytes  # encoded lines that both legs get
    body: SplitBody | None = None
    raw: bytes = b""

    @property
    def num_bytes(self) -> int:
        return len(self.body.raw) if self.body is not None else len(self.raw)


@dataclass(frozen=True, slots=True)
class Upstreams:
    """Whom an attempt works with."""

    settings: ProxySettings
    pool: Pool
    client: HttpClient


class Attempt:
    """Owns two exchanges, their deadlines and the instances' counts; `close` ends all of it, at any time.

    Deadlines fail their leg, so that a late leg is judged like a broken one.
    """

    def __init__(self, job: Job, route: Route, upstreams: Upstreams) -> None:
        self.route = route
        self.transfer_id = uuid.uuid4().hex if route.prefill is not None else ""
        self._job = job
        self._settings = upstreams.settings
        self._pool = upstreams.pool
        self._client = upstreams.client
        self._loop = asyncio.get_running_loop()
        self._judged: asyncio.Future[Verdict] = self._loop.create_future()
        self._timers: list[asyncio.TimerHandle] = []
        self._tickets: list[Ticket] = []
        self.prefill: PrefillLeg | None = None
        self._prefill_exchange: Exchange | None = None
        self.decode = DecodeLeg(f"decode instance {route.decode.address}", self._changed)
        self._blamed: set[Instance] = set()

    def send(self) -> None:
        """Sends both legs. Returns without waiting."""
        settings = self._settings
        prefill_body, decode_body = self._bodies()
        if self.route.prefill is not None:
            leg = PrefillLeg(f"prefill instance {self.route.prefill.address}", self._changed)
            self.prefill = leg
            self._prefill_exchange = self._open(self.route.prefill, prefill_body, leg)
            self._deadline(leg, settings.prefill_timeout_s, "prefill")
        self.decode_exchange = self._open(self.route.decode, decode_body, self.decode)
        self._first_byte_timer = self._deadline(self.decode, settings.first_byte_timeout_s, "first byte")

    def _bodies(self) -> tuple[bytes, bytes]:
        body, prefill, decode = self._job.body, self.route.prefill, self.route.decode
        if body is None:
            return b"", self._job.raw
        if prefill is None:
            return b"", body.for_decode_alone()
        for_prefill = body.for_prefill(self.transfer_id, decode.control_address)
        return for_prefill, body.for_decode(self.transfer_id, prefill.control_address)

    def _open(self, instance: Instance, body: bytes, leg: PrefillLeg | DecodeLeg) -> Exchange:
        job = self._job
        self._tickets.append(Ticket(instance, job.num_bytes))
        request = request_bytes(job.method, job.target, instance.address, job.headers, body)
        return self._client.send(instance.address, request, leg)

    def _deadline(self, leg: PrefillLeg | DecodeLeg, timeout_s: float, what: str) -> asyncio.TimerHandle:
        error = UpstreamTimeoutError(f"no {what} within {timeout_s:g} s")
        timer = self._loop.call_later(timeout_s, leg.failed, error)
        self._timers.append(timer)
        return timer

    def _changed(self) -> None:
        """From a leg: something about it is new. Runs in the socket's callback."""
        if self.prefill is not None:
            if self.prefill.settled.done():
                self._tickets[0].give_back()
            self._blame(self.route.prefill, self.prefill.state.error)
        self._blame(self.route.decode, self.decode.state.error)
        if self.decode.state.begun:
            self._first_byte_timer.cancel()
        if not self._judged.done():
            verdict = judge(self.prefill.state if self.prefill else None, self.decode.state)
            if verdict is not Verdict.WAIT:
                self._judged.set_result(verdict)

    def _blame(self, instance: Instance | None, error: UpstreamError | None) -> None:
        """A broken connection takes the instance out at once, also if this request no longer needs it."""
        if instance is None or error is None or instance in self._blamed:
            return
        self._blamed.add(instance)
        if isinstance(error, UpstreamConnectionError):
            self._client.forget_idle(instance.address)
            if not isinstance(error, StaleConnectionError):
                self._pool.connection_failed(instance, str(error), monotonic())

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
        for timer in self._timers:
            timer.cancel()
        if self._prefill_exchange is not None:
            self._prefill_exchange.close()
        self.decode_exchange.close()
        for ticket in self._tickets:
            ticket.give_back()
