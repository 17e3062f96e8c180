"""One client request, from its parsed body to the last byte of its answer: attempts, failover, the record of it."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from twolane.errors import NoInstanceError, StaleConnectionError, TooBusyError, TwoLaneError, UpstreamError
from twolane.protocol import Role
from twolane.proxy.attempt import Attempt, Job, Upstreams
from twolane.proxy.headers import HOP_BY_HOP, Headers, end_to_end
from twolane.proxy.legs import Verdict
from twolane.proxy.policy import MAX_ATTEMPTS, Route, Tried
from twolane.proxy.pool import Pool
from twolane.proxy.relay import ClientTooSlowError, Relay
from twolane.proxy.responder import Responder
from twolane.proxy.stats import RequestRecord, Stats, log_request

logger = logging.getLogger(__name__)


class Handoff:
    """Serves one job. `run` ends when the client has its answer, P's leg has ended too, and the record is written.

    Cancelled (the client left, the proxy stops), it closes both legs before it lets the cancellation through.
    """

    def __init__(
        self, job: Job, responder: Responder, record: RequestRecord, upstreams: Upstreams, stats: Stats
    ) -> None:
        self._job = job
        self._responder = responder
        self._record = record
        self._upstreams = upstreams
        self._stats = stats
        self._tried = Tried()
        self._last_error: UpstreamError | None = None
        self._retried: tuple[Role, str] | None = None  # whose failure, of what cause, the next attempt makes up for
        self._may_be_stale = True  # a stale connection is forgiven once
        self._headers: Headers = [(b"x-request-id", record.request_id.encode("latin-1"))]

    async def run(self) -> None:
        try:
            await self._attempts()
        except asyncio.CancelledError:
            self._record.outcome = "client_left" if self._responder.disconnected else "cancelled"
            raise
        except UpstreamError as error:
            self._fail("upstream_failed", error)
        except NoInstanceError as error:
            self._fail("no_instance", error)
        finally:
            if self._record.ended_at is None:
                self._close_record()
            log_request(self._record)

    def _fail(self, outcome: str, error: UpstreamError | NoInstanceError) -> None:
        self._record.outcome = outcome
        # Whatever went wrong between proxy and instances is a bad gateway, or a late one.
        self._responder.send_error(error, self._headers)

    async def _attempts(self) -> None:
        while True:
            attempt = Attempt(self._job, self._route(), self._upstreams, self._record)
            self._note(attempt)
            attempt.send()
            try:
                verdict = await attempt.verdict()
                if verdict in (Verdict.RELAY, Verdict.ANSWER_PREFILL):
                    await self._answer(verdict, attempt)
                    return
                self._learn(verdict, attempt)
            finally:
                attempt.close()

    def _route(self) -> Route:
        """Raises NoInstanceError, or the last attempt's UpstreamError, if nobody is left to ask."""
        pool = self._upstreams.pool
        if self._tried.attempts < MAX_ATTEMPTS:
            route = self._upstreams.router.route(pool.ready("P"), pool.ready("D"), self._tried, self._job.ask)
            if route is not None:
                return route
        raise self._last_error or _nobody_left(pool)

    def _note(self, attempt: Attempt) -> None:
        record, route = self._record, attempt.route
        self._tried.attempts += 1
        record.attempts += 1
        self._stats.stories.begins(record, attempt.transfer_id)
        record.decode = route.decode.address
        record.prefill = route.prefill.address if route.prefill is not None else ""
        record.alone_because = route.alone_because
        if self._retried is not None:
            self._stats.retries[self._retried] += 1
            record.forget_times()

    def _learn(self, verdict: Verdict, attempt: Attempt) -> None:
        """Draws the conclusion from a failed attempt, before the next."""
        error = attempt.error_of(verdict)
        route = attempt.route
        culprit = route.prefill if verdict is Verdict.RETRY_PREFILL else route.decode
        assert culprit is not None
        logger.warning(
            'leg failed transfer_id=%s request_id=%s role=%s address=%s reason="%s"',
            attempt.transfer_id or "-",
            self._record.request_id,
            culprit.role,
            culprit.address,
            error,
        )
        self._retried = (culprit.role, error.cause)
        if isinstance(error, StaleConnectionError) and self._may_be_stale:
            self._may_be_stale = False
            self._tried.attempts -= 1
            return
        self._last_error = error
        self._tried.failed.add(culprit)

    async def _answer(self, verdict: Verdict, attempt: Attempt) -> None:
        if verdict is Verdict.ANSWER_PREFILL:
            self._answer_from_prefill(attempt)
            return
        record = self._record
        error = await Relay(attempt, self._responder, self._upstreams.settings, self._headers).run()
        if error is not None:
            record.outcome = "client_stalled" if isinstance(error, ClientTooSlowError) else "decode_died"
            logger.warning('answer cut transfer_id=%s reason="%s"', attempt.transfer_id or "-", error)
        else:
            record.outcome = "ok" if self._responder.status < 400 else "rejected"
        self._close_record()
        if record.outcome == "ok":
            await attempt.prefill_settled(self._upstreams.settings.prefill_linger_s)

    def _answer_from_prefill(self, attempt: Attempt) -> None:
        leg = attempt.prefill
        assert leg is not None
        self._record.outcome = "rejected"
        headers = end_to_end(leg.headers, HOP_BY_HOP | {b"x-request-id"}) + self._headers
        self._responder.send(leg.state.status, headers, leg.body)

    def _close_record(self) -> None:
        self._record.status = self._responder.status
        self._record.ended_at = monotonic()
        self._stats.ended(self._record)


def _nobody_left(pool: Pool) -> NoInstanceError:
    if pool.ready("D"):
        why = "this request needs a prefill instance of the decode instances' kind, and none is ready"
    else:
        why = "no decode instance is ready"
    return NoInstanceError(f"{why}; try again soon")


def reject(error: TwoLaneError, responder: Responder, record: RequestRecord, stats: Stats) -> None:
    """Answers a request that never got as far as an instance."""
    responder.send_error(error, [(b"x-request-id", record.request_id.encode("latin-1"))])
    record.outcome = "rejected" if error.status != TooBusyError.status else "too_busy"
    record.status = error.status
    record.ended_at = monotonic()
    stats.ended(record)
    log_request(record)
