"""What travels on a data connection (transport `tcp`): a sealed head, then the bytes that it speaks of."""

from __future__ import annotations

import hmac
import zlib
from typing import Annotated

import msgspec

KEY_BYTES = 32
TOKEN_BYTES = 32
CHUNK_BYTES = 512 << 10  # bytes behind one head: a loan travels in chunks, so that little waits in sockets
MAX_HEAD_BYTES = 256
MAX_DATA_BYTES = CHUNK_BYTES  # of one frame
ALIVE = b""  # in place of a head: P says that it is there
_MAC_BYTES = 16

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(gt=0)]


class FrameError(Exception):
    """A frame that isn't P's, or doesn't fit what came before it."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [offset, offset + size) of a loan of `total` bytes, which holds `num_items` items, from `first_layer` on.
    `crc`: of these bytes."""

    loan: Count
    offset: Count
    size: Positive
    total: Positive
    num_items: Positive
    first_layer: Count
    crc: Count


checksum = zlib.crc32
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Head).decode


class Seal:
    """Both sides of one connection have its key, from the handshake; nobody else makes a head that opens."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def close(self, head: Head) -> bytes:
        body = _encode(head)
        return self._mac(body) + body

    def open(self, frame: bytes) -> Head:
        """Raises FrameError."""
        mac, body = frame[:_MAC_BYTES], frame[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(body)):
            raise FrameError("a frame that this prefill worker didn't seal")
        try:
            return _decode(body)
        except msgspec.MsgspecError as error:
            raise FrameError(f"a head that is not understood: {error}") from error

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_MAC_BYTES]
