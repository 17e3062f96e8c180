"""Pages of the instances, by way of the proxy."""

from __future__ import annotations

from urllib.parse import unquote

from twolane.errors import NotFoundError
from twolane.proxy.engines import Engines
from twolane.proxy.metrics import CONTENT_TYPE
from twolane.proxy.pool import Instance, Pool
from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

PREFIX = "/instances/"


class InstancePages:
    """`/instances/NAME/metrics`: the instance's own page as it stands. NAME may be its address."""

    def __init__(self, pool: Pool, engines: Engines) -> None:
        self._pool = pool
        self._engines = engines

    async def answer(self, _request: Request, responder: Responder, rest: str) -> None:
        """Raises NotFoundError, or UpstreamError with what the instance did wrong."""
        name, _, page = unquote(rest).rpartition("/")
        if page != "metrics":
            raise NotFoundError(f"there is no {PREFIX}{rest} here; known is {PREFIX}NAME/metrics")
        text = await self._engines.page_of(self._find(name))
        responder.send(200, [(b"content-type", CONTENT_TYPE)], text)

    def _find(self, name: str) -> Instance:
        for instance in self._pool:
            if name in (instance.name, instance.address):
                return instance
        known = sorted({instance.name for instance in self._pool})
        raise NotFoundError(f"there is no instance {name!r}; known are {', '.join(known) or 'none so far'}")
