"""Which clients may ask, and what of their key the instances see."""

from __future__ import annotations

import hashlib
import hmac

from twolane.errors import UnauthorizedError
from twolane.proxy.headers import Headers, find

# Where a client's key may be: the OpenAI way and the Anthropic way.
KEY_HEADERS = frozenset((b"authorization", b"x-api-key"))


class Gatekeeper:
    """Holds digests of the keys, so that a comparison takes the same time for every key, near or far from right."""

    def __init__(self, api_keys: tuple[str, ...], upstream_api_key: str) -> None:
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._upstream: Headers = []
        if upstream_api_key:
            self._upstream = [(b"authorization", b"Bearer " + upstream_api_key.encode())]
        # A key of ours means nothing to the instances and must not leak to them; with no keys of ours, the client's
        # is meant for them.
        self.replaced: frozenset[bytes] = KEY_HEADERS if self._digests or self._upstream else frozenset()

    def check(self, headers: Headers) -> None:
        """Raises UnauthorizedError."""
        if not self._digests:
            return
        digest = _digest(_given_key(headers))
        good = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whatever the first says
        if not any(good):
            raise UnauthorizedError("a valid key is needed: send `Authorization: Bearer <key>`")

    def upstream_headers(self) -> Headers:
        """What the instances get in place of the replaced."""
        return self._upstream


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given_key(headers: Headers) -> bytes:
    authorization = find(headers, b"authorization")
    if authorization is None:
        return find(headers, b"x-api-key") or b""
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
