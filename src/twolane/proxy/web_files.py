"""The dashboard's files: read once at the start, the same for everybody. They tell nothing of what is served."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from twolane.errors import NotFoundError
from twolane.proxy.headers import Headers, find
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
}
# Nothing from elsewhere, no script in the page itself, and no text that becomes markup: names and log lines come from
# others, and a slip in a script of ours must not make them more than text.
_POLICY = (
    b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Headers = [
    (b"cache-control", b"no-cache"),  # asked again each time, answered with 304: an upgrade shows at once
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True)
class _File:
    content_type: bytes
    content: bytes
    etag: bytes


class WebFiles:
    def __init__(self) -> None:
        web = files("twolane") / "web"
        self._files = {name: _read(web / name) for name in _names(web)}

    async def page(self, request: Request, responder: Responder, _rest: str) -> None:
        self._send("index.html", request, responder)

    async def asset(self, request: Request, responder: Responder, rest: str) -> None:
        self._send(rest, request, responder)

    def _send(self, name: str, request: Request, responder: Responder) -> None:
        file = self._files.get(name)
        if file is None:
            raise NotFoundError(f"the dashboard has no file {name!r}")
        headers = [*_HEADERS, (b"etag", file.etag), (b"content-type", file.content_type)]
        if find(request.headers, b"if-none-match") == file.etag:
            responder.send(304, headers, b"")
        else:
            responder.send(200, headers, file.content)


def _names(folder: Traversable, above: str = "") -> list[str]:
    """Of all files that a browser may want, as paths."""
    names: list[str] = []
    for item in folder.iterdir():
        if item.is_dir():
            names += _names(item, f"{above}{item.name}/")
        elif item.name.rpartition(".")[2] in _TYPES:
            names.append(above + item.name)
    return names


def _read(file: Traversable) -> _File:
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'.encode()
    return _File(_TYPES[file.name.rpartition(".")[2]], content, etag)
