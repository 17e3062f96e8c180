"""What somebody without the deployment's secret can do to a listening socket, and what he can hear."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import zmq

from twolane.curve import Keys, derive_keys, speak

SECRET = "correct horse battery staple"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"%b" + bytes(32)  # ZMTP 3.1; 20 bytes of mechanism
KEYLESS = GREETING % b"NULL".ljust(20, b"\0")
ENCRYPTED = GREETING % b"CURVE".ljust(20, b"\0")


def deployment_keys() -> Keys:
    keys = derive_keys(SECRET)
    assert keys is not None
    return keys


# Bytes of a connection that is no member's. Each of them is refused, wherever a key is wanted.
RAW = {
    "garbage": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4,
    "noise": bytes(range(256)) * 16,
    "a keyless greeting": KEYLESS,
    "a forged hello": ENCRYPTED + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
    "an oversized command": ENCRYPTED + b"\x06" + struct.pack(">Q", 1 << 40) + b"\x05HELLO",
    "a truncated hello": ENCRYPTED + b"\x04\xc8\x05HELLO\x01\x00" + bytes(20),  # and then: nothing
    "one byte": b"\xff",  # and then: nothing
    "nothing": b"",
}


@contextlib.contextmanager
def raw(address: str, data: bytes) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        yield connection


def other_keys() -> Keys:
    public, secret = zmq.curve_keypair()
    return Keys(public, secret)


@contextlib.contextmanager
def dealer(address: str, keys: Keys | None, server: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """`server`: the other side's public key, if it isn't that of `keys`."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.setsockopt(zmq.LINGER, 0)
        speak(made, keys)
        if server:
            made.curve_serverkey = server
        made.connect(f"tcp://{address}")
        yield made


MEMBERS_ONLY: dict[str, Callable[[], tuple[Keys | None, bytes]]] = {
    "no key": lambda: (None, b""),
    "another key": lambda: (other_keys(), b""),
    "another secret": lambda: (derive_keys("guess"), b""),
    "the public key alone": lambda: (other_keys(), deployment_keys().public),
}


class Relay:
    """Somebody between two sides: passes everything on, and hears it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = bytearray()  # by who connected
        self.answered = bytearray()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def heard(self) -> bytes:
        return bytes(self.sent + self.answered)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, sink, ears in ((near, far, self.sent), (far, near, self.answered)):
                    threading.Thread(target=self._pass_on, args=(source, sink, ears), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, ears: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                ears += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
