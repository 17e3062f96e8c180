"""What the proxy answers on which path."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from time import monotonic

from twolane import __version__
from twolane.errors import BadRequestError, MethodNotAllowedError, NoInstanceError, NotFoundError
from twolane.proxy.attempt import Job, Upstreams
from twolane.proxy.body import SplitBody, parse_body
from twolane.proxy.handoff import Handoff, reject
from twolane.proxy.headers import encode, end_to_end, find
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder
from twolane.proxy.stats import RequestRecord, Stats, instance_dict

CHAT_PATH = "/v1/chat/completions"
HANDOFF_PATHS = frozenset(("/v1/completions", CHAT_PATH))
# Answered by a decode instance as it stands.
RELAYED = {"/v1/models": "GET", "/version": "GET", "/tokenize": "POST", "/detokenize": "POST"}

# Host and length are written anew. Answers stay uncompressed, so that an error event can be put behind them.
_NOT_PASSED_ON = frozenset((b"host", b"x-request-id", b"accept-encoding"))
_GOOD_REQUEST_ID = re.compile(rb"[!-~]{1,256}")


class App:
    """Handles every request of the server. `draining` is set once, when the proxy is told to stop."""

    def __init__(self, upstreams: Upstreams, stats: Stats) -> None:
        self.draining = False
        self._upstreams = upstreams
        self._stats = stats
        self._own: dict[str, Callable[[Responder], None]] = {"/health": self._health, "/stats": self._report}

    async def handle(self, request: Request, responder: Responder) -> None:
        record = RequestRecord(request.path, _request_id(request), monotonic())
        if record.route in self._own and request.method in ("GET", "HEAD"):
            self._own[record.route](responder)
            return
        try:
            job = self._job(request, record)
        except BadRequestError as error:
            record.route = record.route if self._allowed(record.route) else "unknown"
            reject(error, responder, record, self._stats)
            return
        if self.draining:
            responder.keep_alive = False
            raise NoInstanceError("the proxy is shutting down")
        await self._serve(job, responder, record)

    def _serve(self, job: Job, responder: Responder, record: RequestRecord) -> Awaitable[None]:
        return Handoff(job, responder, record, self._upstreams, self._stats).run()

    def _job(self, request: Request, record: RequestRecord) -> Job:
        """Raises BadRequestError, or a subclass, for what can't be passed on."""
        path = record.route
        allowed = self._allowed(path)
        if not allowed:
            raise NotFoundError(f"there is no {path} here; known are {', '.join(self._paths())}")
        if request.method not in allowed:
            raise MethodNotAllowedError(request.method, path, allowed)
        body: SplitBody | None = None
        if path in HANDOFF_PATHS:
            body = parse_body(request.body, is_chat=path == CHAT_PATH)
            record.stream = body.stream
        method = "GET" if request.method == "HEAD" else request.method
        return Job(method, request.target, _passed_on(request, record.request_id), body, request.body)

    def _allowed(self, path: str) -> tuple[str, ...]:
        if path in HANDOFF_PATHS:
            return ("POST",)
        method = "GET" if path in self._own else RELAYED.get(path)
        if method is None:
            return ()
        return ("GET", "HEAD") if method == "GET" else (method,)

    def _paths(self) -> list[str]:
        return sorted((*HANDOFF_PATHS, *RELAYED, *self._own))

    def _health(self, responder: Responder) -> None:
        pool = self._upstreams.pool
        num_prefill, num_decode = len(pool.ready("P")), len(pool.ready("D"))
        status = "ok" if num_prefill and num_decode else "degraded" if num_decode else "unavailable"
        reason = None
        if self.draining:
            status, reason = "draining", "the proxy is shutting down"
        elif not num_decode:
            reason = "no decode instance is ready"
        elif not num_prefill:
            reason = "no prefill instance is ready: decode instances compute the prompts themselves"
        code = 200 if status in ("ok", "degraded") else 503
        headers = [(b"retry-after", b"1")] if code == 503 else None
        answer = {"status": status, "reason": reason, "prefill": num_prefill, "decode": num_decode}
        responder.send_json(code, answer, headers)

    def _report(self, responder: Responder) -> None:
        now = monotonic()
        instances = [instance_dict(instance, now) for instance in self._upstreams.pool]
        report = {"version": __version__, "uptime_s": round(now - self._stats.started_at, 3), "instances": instances}
        responder.send_json(200, report | self._stats.as_dict())


def _request_id(request: Request) -> str:
    """The client's, if it is fit for a header and a log line."""
    given = find(request.headers, b"x-request-id")
    if given is not None and _GOOD_REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex


def _passed_on(request: Request, request_id: str) -> bytes:
    headers = end_to_end(request.headers, _NOT_PASSED_ON)
    headers.append((b"x-request-id", request_id.encode("ascii")))
    return encode(headers)
