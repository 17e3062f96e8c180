"""Bytes of one client connection in, whole requests out. Pure: no sockets, no clock.

`httptools` (llhttp, strict) refuses what request smuggling lives on: Content-Length with Transfer-Encoding, two
lengths, bare LF, obs-fold, control characters. Left to us: limits, Host, Transfer-Encoding in HTTP/1.0.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import httptools

from twolane.errors import BadRequestError, BodyTooLargeError, HeaderTooLargeError, TwoLaneError
from twolane.proxy.headers import Headers

# Chunk framing may cost this many bytes for each byte of body before we call it an attack.
_MAX_FRAMING_FACTOR = 16


class Phase(enum.Enum):
    """Where in a request the connection's input stands."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


@dataclass(slots=True)
class Request:
    """A whole request. `target` is in origin form (`/path?query`), `body` is without its transfer coding."""

    method: str = ""
    target: bytes = b""
    http_version: str = "1.1"
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    keep_alive: bool = True

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")


class RequestReader:
    """Owns the parser of one connection. After it has returned an error it takes no more input."""

    def __init__(self, max_head_bytes: int, max_body_bytes: int) -> None:
        self._max_head_bytes = max_head_bytes
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._ready: list[Request | TwoLaneError] = []
        self._finished = False  # an error, or a request that said `Connection: close`
        self.phase = Phase.IDLE
        self.wants_continue = False  # the client waits for `100 Continue` before it sends its body
        self._begin()

    def _begin(self) -> None:
        self._request = Request()
        self._pieces: list[bytes] = []
        self._head_bytes = 0  # as the callbacks see them
        self._raw_head_bytes = 0  # as they came, while the head is unfinished
        self._body_bytes = 0
        self._raw_body_bytes = 0

    def feed(self, data: bytes) -> list[Request | TwoLaneError]:
        """The requests that `data` completes, in order; an error can only be the last."""
        if not self._finished:
            self._feed(data)
        ready, self._ready = self._ready, []
        return ready

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            phase_before = self.phase
            try:
                self._parser.feed_data(rest)
                self._limit_raw_bytes(phase_before, len(rest))
                return
            except httptools.HttpParserUpgrade as upgrade:
                # We speak nothing but HTTP/1.1: the wish is ignored, and what follows is the next request.
                self._parser = httptools.HttpRequestParser(self)
                rest = rest[upgrade.args[0] :]
            except (httptools.HttpParserError, TwoLaneError) as error:
                self._fail(error)
                return

    def _fail(self, error: Exception) -> None:
        if self._finished:  # bytes after `Connection: close`: not ours to judge
            return
        self._finished = True
        cause = error if isinstance(error, TwoLaneError) else error.__context__
        if isinstance(cause, TwoLaneError):
            self._ready.append(cause)
        else:
            self._ready.append(BadRequestError(f"not a valid HTTP request: {error}"))

    def _limit_raw_bytes(self, phase_before: Phase, num_bytes: int) -> None:
        """What the parser swallows without a callback: an endless header line, chunk extensions, trailers."""
        if self.phase is Phase.HEAD and phase_before is not Phase.BODY:
            self._raw_head_bytes += num_bytes
            if self._raw_head_bytes > self._max_head_bytes:
                raise self._head_too_large()
        elif self.phase is Phase.BODY and phase_before is Phase.BODY:
            self._raw_body_bytes += num_bytes
            if self._raw_body_bytes > self._max_head_bytes + _MAX_FRAMING_FACTOR * self._body_bytes:
                raise BadRequestError("the chunked body is nearly all framing")

    def _head_too_large(self) -> HeaderTooLargeError:
        return HeaderTooLargeError(f"the request's head exceeds {self._max_head_bytes} bytes")

    # --- httptools callbacks; an exception raised here comes back as the parser error's __context__ --------

    def on_message_begin(self) -> None:
        self.phase = Phase.HEAD

    def on_url(self, url: bytes) -> None:
        self._request.target += url
        self._head_bytes += len(url)
        if self._head_bytes > self._max_head_bytes:
            raise self._head_too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._max_head_bytes:
            raise self._head_too_large()
        if self.phase is Phase.HEAD:  # trailers are dropped
            self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode("ascii")
        request.http_version = self._parser.get_http_version()
        request.target = origin_form(request.method, request.target)
        fields = dict(reversed(request.headers))  # of several with one name the first
        self._check_rules(request, fields)
        expect = fields.get(b"expect")
        if expect is not None:
            self.wants_continue = expect.lower() == b"100-continue" and request.http_version == "1.1"
        self.phase = Phase.BODY

    def _check_rules(self, request: Request, fields: dict[bytes, bytes]) -> None:
        if request.http_version not in ("1.0", "1.1"):
            raise BadRequestError(f"HTTP/{request.http_version} is not spoken here; use HTTP/1.1")
        num_repeated = len(request.headers) - len(fields)
        num_hosts = sum(name == b"host" for name, _ in request.headers) if num_repeated else b"host" in fields
        if num_hosts > 1 or (num_hosts == 0 and request.http_version == "1.1"):
            raise BadRequestError("a request needs exactly one Host header")
        coding = fields.get(b"transfer-encoding")
        if coding is not None and (request.http_version == "1.0" or coding.strip().lower() != b"chunked"):
            raise BadRequestError("the only transfer coding understood is `chunked`, in HTTP/1.1")
        length = fields.get(b"content-length")
        if length is not None and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request's body exceeds {self._max_body_bytes} bytes")

    def on_body(self, data: bytes) -> None:
        self.wants_continue = False
        self._body_bytes += len(data)
        if self._body_bytes > self._max_body_bytes:
            raise self._too_large()
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        request = self._request
        request.body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        request.keep_alive = self._parser.should_keep_alive() and request.method != "CONNECT"
        self._ready.append(request)
        self._finished = not request.keep_alive
        self.wants_continue = False
        self.phase = Phase.IDLE
        self._begin()


def origin_form(method: str, target: bytes) -> bytes:
    """`/path?query` of a request target in any form that RFC 9112 section 3.2 knows. Raises BadRequestError."""
    if target.startswith(b"/") or method == "CONNECT" or (target == b"*" and method == "OPTIONS"):
        return target
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError as error:
        raise BadRequestError("the request target is not a path or URL") from error
    return (url.path or b"/") + (b"?" + url.query if url.query else b"")
