"""The proxy as a process: start, run, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from time import monotonic
from types import TracebackType
from typing import Self

import uvloop

from twolane.config import ProxySettings, StaticInstance
from twolane.protocol import Registration
from twolane.proxy.app import App
from twolane.proxy.attempt import Upstreams
from twolane.proxy.dashboard import Dashboard
from twolane.proxy.descriptors import Descriptors, raise_limit
from twolane.proxy.discovery import Discovery
from twolane.proxy.engines import Engines
from twolane.proxy.health import Health
from twolane.proxy.http_client import HttpClient
from twolane.proxy.http_server import HttpServer
from twolane.proxy.policy import Router
from twolane.proxy.pool import Pool
from twolane.proxy.ports import listen
from twolane.proxy.power import Power
from twolane.proxy.stats import Stats
from twolane.proxy.tracing import make_tracer

logger = logging.getLogger(__name__)


class Service:
    """The running proxy, as an async context manager. Owns every part, and the task group that they work in."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.http_port = settings.http_port
        self.discovery_port = settings.discovery_port

    async def __aenter__(self) -> Self:
        """Raises ConfigError if a port is taken, or what a setting needs isn't installed."""
        settings = self.settings
        self._tracer = make_tracer(settings.otlp_endpoint)
        health = Health(settings)
        self.pool = Pool(
            settings.registration_expiry_s, settings.health_every_s, settings.health_ready_every_s, health.wake
        )
        stats = Stats(monotonic())
        listener = listen(settings.host, settings.http_port)
        self.http_port = listener.getsockname()[1]
        try:
            self.power = Power(settings, self.pool, lambda i: self.engines.latest(i))  # noqa: PLW0108 - made below
            self._discovery = Discovery(settings, self.pool, stats)
            self._discovery.bind()
        except BaseException:
            listener.close()
            raise
        self.discovery_port = self._discovery.port
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._client = HttpClient(settings, self._tasks)
        upstreams = Upstreams(settings, self.pool, self._client, Router(settings), stats.gaps)
        self.engines = Engines(settings, self.pool, self._client, self._tasks)
        descriptors = self._make_descriptors()
        self._app = App(upstreams, stats, self.engines, self.power, descriptors, self._tracer)
        for instance in settings.instances:
            self.pool.add_static(as_registration(instance), monotonic())
        self._server = HttpServer(self._app.handle, settings, self._tasks, descriptors)
        self._background = [
            self._tasks.create_task(health.run(self.pool, self._client)),
            self._tasks.create_task(self._server.sweep()),
            self._tasks.create_task(self.dashboard.run()),
            self._tasks.create_task(self.engines.run()),
        ]
        if self._tracer is not None:
            self._background.append(self._tasks.create_task(self._tracer.run()))
        await self._server.start(listener)
        self._discovery.start()
        self.power.start()
        logger.info("proxy ready host=%s http=%d discovery=%d", settings.host, self.http_port, self.discovery_port)
        return self

    def _make_descriptors(self) -> Descriptors:
        limit, wanted = raise_limit(), self.settings.max_in_flight
        descriptors = Descriptors(limit, lambda: self._client.num_sockets + self._server.num_connections)
        if descriptors.num_requests < wanted:
            logger.warning(
                "open files limit=%d are enough for about %d requests at once, fewer than max_in_flight=%d: "
                "raise the hard limit (LimitNOFILE, ulimit -n)",
                limit,
                descriptors.num_requests,
                wanted,
            )
        return descriptors

    @property
    def dashboard(self) -> Dashboard:
        return self._app.dashboard

    def stop_accepting(self) -> None:
        """No new connections, no new work; what is being answered goes on."""
        self._app.drain()
        self._server.stop_accepting()

    async def drained(self) -> None:
        """Returns when the last answer has ended."""
        await self._server.drained()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_accepting()
        self._discovery.stop()
        await self._server.close_connections()
        for task in self._background:
            task.cancel()
        self.engines.close()
        await self.power.stop()
        await self._tasks.__aexit__(kind, error, trace)
        await self._client.close()
        if self._tracer is not None:
            await self._tracer.close()


def as_registration(instance: StaticInstance) -> Registration:
    return Registration(instance.role, instance.address, instance.control_address, instance.kind)


async def serve(settings: ProxySettings) -> int:
    """Runs until SIGTERM or SIGINT, drains, and returns the exit code: 0, or 1 if answers had to be cut."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        async with Service(settings) as service:
            first = await signals.get()
            service.stop_accepting()
            logger.info("proxy draining signal=%s deadline_s=%g", first.name, settings.drain_timeout_s)
            return await _drain(service, signals)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _drain(service: Service, signals: asyncio.Queue[signal.Signals]) -> int:
    timeout_s = service.settings.drain_timeout_s
    async with asyncio.TaskGroup() as tasks:
        drain = tasks.create_task(service.drained())
        again = tasks.create_task(signals.get())
        await asyncio.wait((drain, again), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        drained = drain.done()
        if not drained:
            why = "second signal" if again.done() else f"not drained within {timeout_s:g} s"
            logger.warning('proxy cuts the answers in flight reason="%s"', why)
        drain.cancel()
        again.cancel()
    return 0 if drained else 1


def run(settings: ProxySettings) -> int:
    """Runs the proxy in this thread under uvloop. Raises ConfigError if a port is taken."""
    return uvloop.run(serve(settings))


def tune_collector() -> None:
    """For a process that does nothing else. A request leaves nothing behind that reference counts don't free, so the
    garbage collector needn't look often, and at what was imported it needn't look ever again."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
