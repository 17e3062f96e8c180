"""Starts all services, keeps them running, ends them. Runs in the background as `twolane supervise`.

Owns the children and the state file. A child that ends while it is starting ends the start; one that ends later is
started again, after a wait that grows, and given up after so many tries in so many minutes. On SIGHUP it reads names
in the file `restart` beside its state file and starts those services again, also those that it gave up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from twolane.errors import StartError
from twolane.launch import probes, upkeep
from twolane.launch.diagnose import not_registered
from twolane.launch.drain import drain
from twolane.launch.phases import DRAINING, FIRST_ANSWER, GIVEN_UP, READY, REGISTERING, RESTARTING, STARTING_SERVER
from twolane.launch.plan import Plan
from twolane.launch.process import identify
from twolane.launch.service import Service, ServiceError, describe_exit
from twolane.launch.state import Overall, State, write_state

log = logging.getLogger(__name__)

RUN_DIR_PREFIX = "twolane-"
TICK_S = 0.1
LOADING_TICK_S = 0.5  # the machine has better things to do then
LOOK_EVERY_S = 5.0
PROXY_START_S = 60.0
PROXY_STOP_S = 35.0  # its own drain takes 30 s at most
INSTANCE_STOP_S = 15.0
STARTING_STOP_S = 2.0  # vLLM doesn't hear SIGTERM while it waits for its engine, and there is nothing to lose yet


def start_order(plan: Plan) -> list[list[int]]:
    """Indices of services: the inner lists start side by side, what is in one of them one after the other.

    Instances that share a GPU take turns: each measures the free memory while it starts.
    """
    order: list[list[int]] = []
    for index, spec in enumerate(plan.services):
        sharing = [turn for turn in order if any(set(plan.services[i].gpus) & set(spec.gpus) for i in turn)]
        order = [turn for turn in order if turn not in sharing]
        order.append([*(i for turn in sharing for i in turn), index])
    return sorted(order)


class Supervisor:
    """One run. `run()` returns when everything has ended; call it once."""

    def __init__(self, plan: Plan, state_path: Path) -> None:
        me = identify(os.getpid())
        assert me is not None
        self._plan = plan
        self._state_path = state_path
        self._services = [Service(spec) for spec in plan.services]
        self._stop = asyncio.Event()
        self._run_dir = Path(tempfile.mkdtemp(prefix=RUN_DIR_PREFIX))
        self._state = State(
            supervisor=me,
            overall="starting",
            url=plan.proxy_url,
            model_names=plan.model.names,
            run_dir=str(self._run_dir),
            services=[service.state for service in self._services],
            started=time.time(),
        )

    async def run(self) -> int:
        """Exit code: 0 after a clean stop, 1 if the start failed."""
        self._publish()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, upkeep.take_wishes, self._state_path, self._services)
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

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            for turn in start_order(self._plan):
                group.create_task(self._start_in_turn([self._services[index] for index in turn]))
        self._enter("up")
        async with asyncio.TaskGroup() as group:
            for service in self._services:
                group.create_task(self._keep(service))

    async def _start_in_turn(self, services: list[Service]) -> None:
        for service in services:
            await self._start(service)

    async def _start(self, service: Service) -> None:
        """Returns when it is ready. StartError if it ends before that, or takes too long."""
        service.start(self._run_dir / service.spec.name, self._plan.log_max_bytes)
        log.info("service=%s pid=%d event=started", service.spec.name, service.state.pid)
        timeout_s = self._plan.start_timeout_s
        if service.spec.role == "proxy":
            timeout_s = min(timeout_s, PROXY_START_S)
        try:
            async with asyncio.timeout(timeout_s):
                await self._until_ready(service)
        except TimeoutError as error:
            raise service.error(await asyncio.to_thread(self._why_not_ready, service, timeout_s)) from error
        service.enter(READY)
        log.info("service=%s pid=%d event=ready", service.spec.name, service.state.pid)

    def _why_not_ready(self, service: Service, timeout_s: float) -> str:
        what = f"was not ready after {timeout_s:.0f} s (it was at: {service.state.phase}; TIMEOUT_SECONDS allows more)"
        if service.state.phase != REGISTERING:
            return what
        known = probes.known_instances(self._plan.proxy_address)
        plan = self._plan
        return f"{what}: {not_registered(service.spec.address, plan.discovery_address, plan.kv, known)}"

    async def _until_ready(self, service: Service) -> None:
        spec, proxy = service.spec, self._plan.proxy_address
        if spec.role == "proxy":
            return await self._poll(service, lambda: probes.proxy_answers(proxy))
        await self._poll(service, lambda: probes.is_healthy(spec), LOADING_TICK_S)
        service.enter(FIRST_ANSWER)
        await self._poll(service, lambda: probes.serves_a_token(spec, self._plan.model.names[0]))
        service.enter(REGISTERING)
        return await self._poll(service, lambda: probes.is_registered(proxy, spec))

    async def _poll(self, service: Service, probe: Callable[[], bool], loading_tick_s: float = TICK_S) -> None:
        """Until the probe says yes, asked at every tick, or more rarely while the log says that it loads.

        StartError as soon as the child has ended.
        """
        next_s = 0.0
        while True:
            service.check_alive()
            if time.monotonic() >= next_s:
                if await asyncio.to_thread(probe):
                    return
                next_s = time.monotonic() + loading_tick_s
            service.read_log()
            if service.state.phase in {STARTING_SERVER, REGISTERING}:
                next_s = 0.0
            await asyncio.sleep(TICK_S)

    async def _keep(self, service: Service) -> None:
        """Starts it again whenever it ends or somebody asks for it; never returns."""
        while True:
            await self._until_exit(service)
            await self._drain(service)
            wait_s = self._restart_wait_s(service)
            service.state.restarts += 1
            service.enter(RESTARTING)
            await asyncio.to_thread(
                service.stop, PROXY_STOP_S if service.spec.role == "proxy" else INSTANCE_STOP_S
            )  # or what its leader left of the group
            if wait_s is None:
                service.enter(GIVEN_UP)
                log.error("service=%s event=given_up reason=%s", service.spec.name, service.state.reason)
            await self._pause(service, wait_s)
            try:
                await self._start(service)
            except StartError as error:
                log.warning("service=%s event=restart_failed error=%s", service.spec.name, error)
                await asyncio.to_thread(service.stop, INSTANCE_STOP_S)  # it may be alive, only not ready in time

    async def _drain(self, service: Service) -> None:
        """Where somebody asked for the restart of an instance that serves. The proxy drains by itself."""
        if service.exit_code() is None and service.spec.role != "proxy":
            service.enter(DRAINING)
            await drain(self._plan, service.spec)

    def _restart_wait_s(self, service: Service) -> float | None:
        """How long to wait before it is started again; None to give it up."""
        code = service.exit_code()
        if code is None:
            return 0.0  # it was asked for
        log.warning("service=%s event=ended %s", service.spec.name, describe_exit(code))
        num_failures = service.note_failure(f"ended {describe_exit(code)}", self._plan.restart_within_s)
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
        self._state.error = str(error)
        self._state.error_log = error.log if isinstance(error, ServiceError) else []
        self._enter("failed")

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
        write_state(self._state, self._state_path)


def _first(failures: BaseExceptionGroup[StartError]) -> StartError:
    """One of the errors of a tree of groups."""
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
