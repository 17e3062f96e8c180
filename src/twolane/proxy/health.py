"""Probes instances, often while they are not ready, and forgets those that have gone silent."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from twolane.config import ProxySettings
from twolane.errors import NoDescriptorError, StaleConnectionError, UpstreamError, UpstreamTimeoutError
from twolane.proxy.http_client import HttpClient, request_bytes
from twolane.proxy.pool import Instance, Pool, Probe

logger = logging.getLogger(__name__)

_LOOKS = 20  # at all instances, within `health_every_s`: so what a look costs grows with their number, not its square


class Health:
    """`run` is the task; `wake` makes it look at once."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._due = asyncio.Event()

    def wake(self) -> None:
        self._due.set()

    async def run(self, pool: Pool, client: HttpClient) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as probes:
            while True:
                self._due.clear()
                now = monotonic()
                pool.expire(now)
                for instance in pool.due_probes(now):
                    probes.create_task(self._probe(instance, pool, client))
                await self._sleep(pool.next_probe_at(), now)

    async def _sleep(self, until: float | None, now: float) -> None:
        longest_s = self._settings.health_every_s  # expiry is looked at as often; no probe is due again sooner
        due_s = longest_s if until is None else until - now
        try:
            async with asyncio.timeout(min(longest_s, max(longest_s / _LOOKS, due_s))):
                await self._due.wait()
        except TimeoutError:
            pass

    async def _probe(self, instance: Instance, pool: Pool, client: HttpClient) -> None:
        probe = Probe.HUNG  # also if it is cancelled: nothing is known then
        try:
            request = request_bytes("GET", b"/health", instance.address, b"")
            head, _ = await client.fetch(instance.address, request, self._settings.health_timeout_s)
            probe = Probe.HEALTHY if head.status == 200 else Probe.UNHEALTHY
        except (UpstreamTimeoutError, StaleConnectionError, NoDescriptorError) as error:
            self._log(instance, error)
        except UpstreamError as error:
            probe = Probe.UNHEALTHY
            self._log(instance, error)
        finally:
            pool.probed(instance, probe, monotonic())

    def _log(self, instance: Instance, error: UpstreamError) -> None:
        logger.debug('probe role=%s address=%s reason="%s"', instance.role, instance.address, error)
