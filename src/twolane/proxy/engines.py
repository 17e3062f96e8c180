"""The instances' engines, in numbers: their own /metrics pages, asked for now and then, and kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import msgspec

from twolane.config import ProxySettings
from twolane.errors import UpstreamError
from twolane.proxy.engine_numbers import EngineNumbers, read_page
from twolane.proxy.http_client import HttpClient, request_bytes
from twolane.proxy.pool import Instance, Pool, State

logger = logging.getLogger(__name__)


class Engines:
    """Owns the last numbers of each instance, and the tasks that ask for new ones. An instance that doesn't answer
    keeps its old numbers, which say how old they are.

    `run` is the task that asks all ready instances every few seconds, more often while somebody is `watching`.
    """

    def __init__(self, settings: ProxySettings, pool: Pool, client: HttpClient, tasks: asyncio.TaskGroup) -> None:
        self._settings = settings
        self._pool = pool
        self._client = client
        self._tasks = tasks
        self._known: dict[Instance, EngineNumbers] = {}
        self._asking: dict[Instance, asyncio.Task[None]] = {}
        self._num_watching = 0
        self._watched = asyncio.Event()

    def latest(self, instance: Instance) -> EngineNumbers | None:
        """None if this run of the instance has told nothing so far."""
        numbers = self._known.get(instance)
        return numbers if numbers is not None and numbers.epoch == instance.epoch else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is entered, by whomever, numbers are new every second."""
        self._num_watching += 1
        self._watched.set()
        try:
            yield
        finally:
            self._num_watching -= 1

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._watched.clear()
            self._known = {i: self._known[i] for i in self._pool if i in self._known}
            settings = self._settings
            every_s = settings.engines_watched_every_s if self._num_watching else settings.engines_every_s
            self._ask_older(every_s / 2)
            try:
                async with asyncio.timeout(every_s):
                    await self._watched.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> None:
        """Returns when all numbers are new, or after `engines_wait_s` with those that are."""
        asked = self._ask_older(self._settings.engines_watched_every_s)
        if asked:
            await asyncio.wait(asked, timeout=self._settings.engines_wait_s)

    async def page_of(self, instance: Instance) -> bytes:
        """The instance's own /metrics as it stands. Raises UpstreamError."""
        settings = self._settings
        request = request_bytes("GET", b"/metrics", instance.address, b"")
        head, page = await self._client.fetch(
            instance.address, request, settings.engines_timeout_s, settings.max_engine_page_bytes
        )
        if head.status != 200:
            raise UpstreamError(f"{instance.name} answered {head.status} to GET /metrics")
        return page

    def close(self) -> None:
        """Asks nobody any more."""
        for task in self._asking.values():
            task.cancel()

    def _ask_older(self, age_s: float) -> list[asyncio.Task[None]]:
        """Has the ready instances asked whose numbers are older than that. One question at a time to each: a hung one
        must not collect them."""
        now = monotonic()
        asked = []
        for instance in self._pool:
            numbers = self.latest(instance)
            if instance.state is not State.READY or (numbers is not None and now - numbers.at < age_s):
                continue
            task = self._asking.get(instance)
            if task is None:
                task = self._asking[instance] = self._tasks.create_task(self._ask(instance))
            asked.append(task)
        return asked

    async def _ask(self, instance: Instance) -> None:
        at, epoch = monotonic(), instance.epoch
        told: dict[str, Any] = {}
        try:
            page = await self.page_of(instance)
            for fields in read_page(page):
                told |= fields
                await asyncio.sleep(0)  # others' tokens first: a large page takes a while
        except UpstreamError as error:
            logger.debug('engine numbers role=%s address=%s reason="%s"', instance.role, instance.address, error)
        finally:
            del self._asking[instance]
        if told:
            numbers = EngineNumbers(at=at, epoch=epoch, **told)
            self._known[instance] = with_rate(numbers, self._known.get(instance))


def with_rate(numbers: EngineNumbers, before: EngineNumbers | None) -> EngineNumbers:
    """With the KV bytes a second since then; without, if the engine was another one or tells of no bytes."""
    if before is None or before.epoch != numbers.epoch or numbers.at <= before.at:
        return numbers
    moved, moved_before = _kv_bytes(numbers), _kv_bytes(before)
    if moved is None or moved_before is None or moved < moved_before:
        return numbers
    return msgspec.structs.replace(numbers, kv_bytes_per_s=round((moved - moved_before) / (numbers.at - before.at), 1))


def _kv_bytes(numbers: EngineNumbers) -> float | None:
    if numbers.kv_sent_bytes is None and numbers.kv_received_bytes is None:
        return None
    return (numbers.kv_sent_bytes or 0.0) + (numbers.kv_received_bytes or 0.0)
