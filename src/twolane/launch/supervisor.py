"""Starts all services, keeps them running, ends them. Runs in the background as `twolane supervise`.

Owns the children and the state file. A child that ends while it is starting ends the start; one that ends later is
started again, after a wait that grows, and given up after so many tries in so many minutes. On SIGHUP it takes the
wish that a command left beside its state file: services to start again (also those that it gave up), or another plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec

from twolane.errors import StartError
from twolane.launch import upkeep
from twolane.launch.drain import drained
from twolane.launch.phases import DRAINING, GIVEN_UP, READY, RESTARTING
from twolane.launch.plan import Plan, ServiceSpec, plan_file, save_plan
from twolane.launch.process import identify
from twolane.launch.readiness import until_ready
from twolane.launch.scale import in_order, index_of
from twolane.launch.service import Service, ServiceError
from twolane.launch.state import Overall, State, write_state

log = logging.getLogger(__name__)

RUN_DIR_PREFIX = "twolane-"
TICK_S = 0.1
LOOK_EVERY_S = 5.0
PROXY_STOP_S = 35.0  # its own drain takes 30 s at most
INSTANCE_STOP_S = 15.0
STARTING_STOP_S = 2.0  # vLLM doesn't hear SIGTERM while it waits for its engine, and there is nothing to lose yet


class Supervisor:
    """One run. `run()` returns when everything has ended; call it once."""

    def __init__(self, plan: Plan, state_path: Path) -> None:
        me = identify(os.getpid())
        assert me is not None
        self._plan = plan
        self._state_path = state_path
        self._make: Callable[[ServiceSpec], Service] = Service
        self._services: list[Service] = []
        self._stop = asyncio.Event()
        self._wished = asyncio.Event()  # a command has left a wish
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # who starts on this GPU
        self._run_dir = Path(tempfile.mkdtemp(prefix=RUN_DIR_PREFIX))
        self._state = State(
            supervisor=me,
            overall="starting",
            url=plan.proxy_url,
            model_names=plan.model.names,
            run_dir=str(self._run_dir),
            services=[],
            started=time.time(),
        )

    async def run(self) -> int:
        """Exit code: 0 after a clean stop, 1 if the start failed."""
        self._publish()
        if self._plan.settings.ray:
            try:
                self._make = self._join_cluster()
            except StartError as error:
                self._note_failure(error)
                return 1
        self._services = [self._make(spec) for spec in self._plan.services]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._wished.set)
        try:
            async with asyncio.TaskGroup() as group:
                work = (self._publish_changes(), self._serve(), upkeep.register(self._plan, self._services))
                tasks = [group.create_task(part) for part in work]
                await self._stop.wait()
                for task in tasks:
                    task.cancel()
        except* StartError as failures:
            self._note_failure(_first(failures))
        finally:
            await self._shut_down()
        return 1 if self._state.overall == "failed" else 0

    def _join_cluster(self) -> Callable[[ServiceSpec], Service]:
        from twolane.launch.cluster import Cluster  # noqa: PLC0415 - one machine needs no Ray

        return Cluster(self._plan).service

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            for service in sorted(self._services, key=lambda service: index_of(service.spec.name)):
                group.create_task(self._start(service))  # P and D in turns: Ray packs those on a node that come first
        self._enter("up")
        async with asyncio.TaskGroup() as lives:
            for service in self._services:
                service.life = lives.create_task(self._keep(service))
            while True:
                await self._wished.wait()
                self._wished.clear()
                if wish := upkeep.take_wish(self._state_path):
                    self._fulfil(wish, lives)

    def _fulfil(self, wish: upkeep.Wish, lives: asyncio.TaskGroup) -> None:
        self._state.wish, self._state.retired, self._state.error, self._state.error_log = wish.id, [], "", []
        for service in self._services:
            service.drain_s = wish.drain_s
            if service.spec.name in wish.restart and not service.retiring:
                service.restart_wanted.set()
        if wish.target:
            self._head_for(wish.target, lives)
        self._publish()

    def _head_for(self, target: Plan, lives: asyncio.TaskGroup) -> None:
        """Begins to end the services that are not in the target, then to start those that are new in it."""
        names = {spec.name for spec in target.services}
        for service in self._services:
            if service.spec.name not in names and not service.retiring:
                service.retiring = True
                service.life = lives.create_task(self._retire(service, service.life))
        leaving = [service.life for service in self._services if service.retiring and service.life]
        staying = {service.spec.name for service in self._services if not service.retiring}
        for spec in target.services:
            if spec.name not in staying:
                service = self._make(spec)
                self._services.append(service)
                service.life = lives.create_task(self._join(service, leaving))
        self._services.sort(key=lambda service: in_order(service.spec))
        self._save(target)

    async def _retire(self, service: Service, life: asyncio.Task[None] | None) -> None:
        """Drains it, stops it, and forgets it."""
        if life:
            life.cancel()
        name, how = service.spec.name, "was not serving"
        if service.state.phase in {READY, DRAINING}:
            how = "drained" if await self._drain(service) else "its requests were cut"
        wait_s = STARTING_STOP_S if how == "was not serving" else INSTANCE_STOP_S
        end = await asyncio.to_thread(service.stop, wait_s)
        log.info("service=%s event=retired how=%s end=%s", name, how, end)
        self._services.remove(service)
        self._state.retired.append(f"{name}: {how}, {end}")
        self._publish()

    async def _drain(self, service: Service) -> bool:
        service.enter(DRAINING)
        log.info("service=%s event=draining deadline_s=%g", service.spec.name, service.drain_s)
        return await drained(self._plan, service.spec, service.drain_s)

    async def _join(self, service: Service, leaving: list[asyncio.Task[None]]) -> None:
        """Starts a new one when those that leave are gone: it may need their ports or GPUs. Then keeps it running."""
        if leaving:
            await asyncio.wait(leaving)
        try:
            await self._start(service)
        except StartError as error:
            await asyncio.to_thread(service.stop, INSTANCE_STOP_S)
            self._services.remove(service)
            self._save(msgspec.structs.replace(self._plan, services=tuple(s.spec for s in self._services)))
            self._tell(error)
            self._publish()
            return
        await self._keep(service)

    def _save(self, plan: Plan) -> None:
        """For the commands, and the next `up`: what is meant to run."""
        self._plan = plan
        save_plan(plan, plan_file(self._state_path))

    async def _start(self, service: Service) -> None:
        """Returns when it is ready. StartError if it ends before that, or takes too long.

        Instances that share a GPU take turns: each measures the free memory while it starts.
        """
        async with contextlib.AsyncExitStack() as turns:
            for gpu in sorted(service.spec.gpus):
                await turns.enter_async_context(self._turns[gpu])
            service.start(self._run_dir / service.spec.name, self._plan.log_max_bytes)
            log.info("service=%s pid=%d event=started", service.spec.name, service.state.pid)
            await until_ready(self._plan, service)
        here = {service.spec.name: service.spec}  # Ray may have placed it elsewhere than before
        placed = tuple(here.get(spec.name, spec) for spec in self._plan.services)
        if placed != self._plan.services:
            self._save(msgspec.structs.replace(self._plan, services=placed))
        service.enter(READY)
        log.info("service=%s pid=%d event=ready", service.spec.name, service.state.pid)

    async def _keep(self, service: Service) -> None:
        """Starts it again whenever it ends or somebody asks for it; never returns."""
        while True:
            await self._until_exit(service)
            wait_s = self._restart_wait_s(service)
            if wait_s == 0.0 and service.is_instance and service.state.phase == READY:
                await self._drain(service)
            service.state.restarts += 1
            service.enter(RESTARTING)
            stop_s = INSTANCE_STOP_S if service.is_instance else PROXY_STOP_S
            await asyncio.to_thread(service.clear, stop_s, for_good=not wait_s)  # or what its leader left of the group
            if wait_s is None:
                service.enter(GIVEN_UP)
                log.error("service=%s event=given_up reason=%s", service.spec.name, service.state.reason)
            await self._pause(service, wait_s)
            try:
                await self._start(service)
            except StartError as error:
                log.warning("service=%s event=restart_failed error=%s", service.spec.name, error)
                await asyncio.to_thread(service.stop, INSTANCE_STOP_S)  # it may be alive, only not ready in time

    def _restart_wait_s(self, service: Service) -> float | None:
        """How long to wait before it is started again; None to give it up."""
        code = service.exit_code()
        if code is None:
            return 0.0  # it was asked for
        log.warning("service=%s event=ended %s", service.spec.name, service.ending())
        num_failures = service.note_failure(f"ended {service.ending()}", self._plan.restart_within_s)
        return service.backoff_s() if num_failures <= self._plan.restart_tries else None

    async def _pause(self, service: Service, wait_s: float | None) -> None:
        """Returns after `wait_s` (None: never), or as soon as somebody asks for a restart."""
        try:
            async with asyncio.timeout(wait_s):
                await service.restart_wanted.wait()
                service.forgive()
        except TimeoutError:
            pass
        service.restart_wanted.clear()

    async def _until_exit(self, service: Service) -> None:
        """Or until somebody asks for a restart."""
        looked_s = 0.0
        while service.exit_code() is None and not service.restart_wanted.is_set():
            if time.monotonic() - looked_s > LOOK_EVERY_S:
                service.look()
                looked_s = time.monotonic()
            await asyncio.sleep(TICK_S)

    def _note_failure(self, error: StartError) -> None:
        log.error("event=start_failed error=%s", error)
        self._tell(error)
        self._enter("failed")

    def _tell(self, error: StartError) -> None:
        self._state.error = str(error)
        self._state.error_log = error.log if isinstance(error, ServiceError) else []

    async def _shut_down(self) -> None:
        """The proxy first, so that no new request comes; then all instances side by side. Leaves nothing behind."""
        failed = self._state.overall == "failed"
        if not failed:
            self._enter("stopping")
        for role_is_proxy, wait_s in ((True, PROXY_STOP_S), (False, INSTANCE_STOP_S)):
            async with asyncio.TaskGroup() as group:
                for service in self._services:
                    if (service.spec.role == "proxy") == role_is_proxy:
                        group.create_task(self._stop_one(service, wait_s))
        shutil.rmtree(self._run_dir, ignore_errors=True)
        self._enter("failed" if failed else "stopped")

    async def _stop_one(self, service: Service, wait_s: float) -> None:
        if service.state.phase not in {READY, DRAINING}:
            wait_s = STARTING_STOP_S
        how = await asyncio.to_thread(service.stop, wait_s)
        service.exit_code()
        service.state.members = []
        service.enter(how)
        log.info("service=%s event=ended how=%s", service.spec.name, how)
        self._publish()

    def _enter(self, overall: Overall) -> None:
        self._state.overall = overall
        self._publish()

    async def _publish_changes(self) -> None:
        while True:
            if any(service.changed for service in self._services):
                self._publish()
            await asyncio.sleep(TICK_S)

    def _publish(self) -> None:
        for service in self._services:
            service.changed = False
        self._state.services = [service.state for service in self._services]
        write_state(self._state, self._state_path)


def _first(failures: BaseExceptionGroup[StartError]) -> StartError:
    """One of the errors of a tree of groups."""
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
