"""Power in the proxy: what the sampler must know of the pool, and who wants the series."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from twolane.config import ProxySettings
from twolane.power.csv_file import CsvWriter
from twolane.power.lanes import Member, Sample
from twolane.power.report import as_dict
from twolane.power.sampler import Sampler
from twolane.proxy.engine_numbers import EngineNumbers
from twolane.proxy.pool import Instance, Pool

# Called in the sampler's thread. None: not known.
NumbersOf = Callable[[Instance], EngineNumbers | None]


class Power:
    """Owns the sampler, and the writer of `--power-csv`, with a thread each. The event loop waits for neither."""

    def __init__(self, settings: ProxySettings, pool: Pool, numbers_of: NumbersOf) -> None:
        """Raises ConfigError if the file of the series can't be written."""
        self._pool = pool
        self._numbers_of = numbers_of
        self._writer = CsvWriter(settings.power_csv) if settings.power_csv is not None else None
        self._ending = ExitStack()
        self.sampler = Sampler(self._members, settings.power_every_s)

    def start(self) -> None:
        if self._writer is not None:
            self._writer.start()
            self._ending.callback(self._writer.close)
            self._ending.enter_context(self.sampler.watched(self._writer.put))
        self._ending.callback(self.sampler.stop)
        self.sampler.start()

    async def stop(self) -> None:
        """The sampler first, whose last sample goes into the series. In a thread, since a driver may take its time."""
        await asyncio.to_thread(self._ending.close)

    def latest(self) -> Sample | None:
        return self.sampler.latest()

    def as_dict(self) -> dict[str, Any]:
        """For `/stats`: empty if nothing is measured."""
        sample = self.latest()
        return {} if sample is None else {"power": as_dict(sample)}

    def _members(self) -> Sequence[Member]:
        return [self._member(instance) for instance in self._pool.members]

    def _member(self, instance: Instance) -> Member:
        numbers = self._numbers_of(instance)
        tokens = None
        if numbers is not None:
            tokens = numbers.prompt_tokens if instance.role == "P" else numbers.generated_tokens
        return Member(instance.role, instance.name, instance.gpus, instance.in_flight, tokens)
