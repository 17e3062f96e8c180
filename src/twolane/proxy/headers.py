"""HTTP header fields as a list of (name in lower case, value) pairs: which travel on, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1: these speak of one connection. `expect` is answered by us, the length is written anew.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"content-length",
        b"expect",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


def find(headers: Headers, name: bytes) -> bytes | None:
    """The first value of `name` (lower case)."""
    for key, value in headers:
        if key == name:
            return value
    return None


def end_to_end(headers: Headers, dropped: frozenset[bytes] = HOP_BY_HOP) -> Headers:
    """`headers` without those in `dropped` and those that a `Connection` field names. `dropped` holds HOP_BY_HOP."""
    if find(headers, b"connection") is not None:
        dropped |= connection_options(headers)
    return [pair for pair in headers if pair[0] not in dropped]


def connection_options(headers: Headers) -> frozenset[bytes]:
    """The tokens of all `Connection` fields, in lower case."""
    values = [value for key, value in headers if key == b"connection"]
    return frozenset(token.strip().lower() for value in values for token in value.split(b","))


def encode(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def status_line(status: int) -> bytes:
    """For an HTTP/1.1 answer. An unknown status gets an empty reason, as RFC 9112 allows."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
