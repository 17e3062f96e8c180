"""The whole run: groups of setups one after the other, each started by TwoLane's supervisor, measured and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.engine import served_model
from benchmarks.gpu.measure import Live, Measurement
from benchmarks.gpu.memory import Memory, memory_of
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Results
from benchmarks.gpu.setups import (
    Setup,
    pair_routes,
    parse_setup,
    plan_of,
    routes_of,
    settings_of,
    starting_at_once,
    trace_file,
    why_not,
)
from benchmarks.gpu.trace import by_transfer, read_traces
from rich.console import Console

from twolane.bench.service import launched, stop_together
from twolane.errors import ConfigError, StartError, TwoLaneError
from twolane.launch import control
from twolane.launch.configuration import load
from twolane.launch.hardware import inspect_machine, vllm_folder
from twolane.launch.model import resolve_model
from twolane.launch.plan import Machine, Plan, ServedModel
from twolane.launch.progress import Progress
from twolane.launch.state import ServiceState

RESERVE_S = 30.0  # of the budget, to print, save and stop what runs; a quarter of a small one
MOST_OF_STARTING = 0.5  # of a group's time: a setup that isn't up by then is left out ...
STARTS_WITHIN_S = 150.0  # ... but as long as this it may take in any case, ...
LEAST_MEASURING_S = 60.0  # ... if so much is left behind it
ATTACHED = Setup("attached", "twolane", "auto")


def starting_time_s(time_s: float) -> float:
    """How much of a group's time may pass until a setup is up."""
    return max(MOST_OF_STARTING * time_s, min(STARTS_WITHIN_S, time_s - LEAST_MEASURING_S))


@dataclass(frozen=True)
class Launched:
    """A setup whose services are starting."""

    setup: Setup
    plan: Plan
    files: control.Files


class Run:
    """One run of the command. Ctrl+C at any time: `results` keeps what there is.

    What it starts runs on until the next group starts or `running` is closed, so that results are printed and saved
    before minutes may go by with stopping.
    """

    def __init__(
        self, options: Options, results: Results, progress: Console, began_s: float, running: ExitStack
    ) -> None:
        self._options = options
        self._results = results
        self._progress = progress
        self._began_s = began_s
        self._end_s = began_s + options.budget_s - min(RESERVE_S, options.budget_s / 4)
        self._running = running

    def run(self) -> None:
        """Raises TwoLaneError if nothing can be measured at all."""
        if self._options.proxy:
            self._attached()
            return
        machine = inspect_machine()
        if self._options.device and self._options.device != machine.engine:
            raise ConfigError(f"--device {self._options.device}: the engine installed here is for {machine.engine}")
        groups = self._groups(machine)
        if not groups:
            raise ConfigError("none of the setups can run here")
        model = resolve_model(load({"model": self._options.model}).settings, machine.engine, Progress(self._progress))
        self._options.out.mkdir(parents=True, exist_ok=True)
        for index, group in enumerate(groups):
            left_s = self._end_s - time.monotonic()
            if left_s <= 0:
                for setup in group:
                    self._skip(setup, "the budget was spent before its turn")
                continue
            self._running.close()
            self._group(index, group, machine, model, time.monotonic() + left_s / (len(groups) - index))

    def _say(self, text: str) -> None:
        now_s = time.monotonic()
        times = f"{now_s - self._began_s:6.1f} s, {max(0.0, self._end_s - now_s):4.0f} s left"
        self._progress.print(f"[{times}] {text}", soft_wrap=True)

    def _groups(self, machine: Machine) -> list[list[Setup]]:
        """Setups that live at once, without those that can't run here."""
        able = []
        for setup in [parse_setup(name) for name in dict.fromkeys(self._options.setups)]:
            if reason := why_not(setup, self._options, machine, vllm_folder()):
                self._skip(setup, reason)
            else:
                able.append(setup)
        return [able] if self._options.together and able else [[setup] for setup in able]

    def _skip(self, setup: Setup, reason: str) -> None:
        self._results.skipped[setup.name] = reason
        self._say(f"{setup.name}: not measured: {reason}")

    def _group(self, number: int, setups: list[Setup], machine: Machine, model: ServedModel, end_s: float) -> None:
        memory = memory_of(setups, self._options, machine, model)
        now_s = time.monotonic()
        up_by_s = now_s + starting_time_s(end_s - now_s)
        starting: list[Launched] = []
        up: list[Launched] = []
        launches = self._running.enter_context(ExitStack())
        self._running.callback(self._stop, starting)  # all at the same time, before each one's own end
        for index, setup in enumerate(setups):
            if one := self._launch(index, setup, memory, machine, model, launches):
                starting.append(one)
                if not memory.at_once and self._is_up(one, up_by_s):
                    up.append(one)
        if memory.at_once:
            up = [one for one in starting if self._is_up(one, up_by_s)]
        self._results.beside.update({one.setup.name: number for one in up})
        try:
            if up:
                self._measure([self._live(one) for one in up], end_s)
        finally:
            for one in up:
                self._read_traces(one.setup)

    def _stop(self, running: list[Launched]) -> None:
        stop_together([one.files for one in running])
        self._say(f"stopped: {', '.join(one.setup.name for one in running)}")

    def _launch(
        self, index: int, setup: Setup, memory: Memory, machine: Machine, model: ServedModel, launches: ExitStack
    ) -> Launched | None:
        """None, with the reason noted, if it can't even begin."""
        try:
            settings = settings_of(setup, self._options, machine, index, memory.args())
            plan = plan_of(setup, self._options, settings, machine, model)
            if memory.at_once:
                plan = starting_at_once(plan, self._options, setup, machine, memory.at_once)
            self._remove_old_traces(setup)
            self._results.commands[setup.name] = [list(spec.argv) for spec in plan.services]
            return Launched(setup, plan, launches.enter_context(launched(plan, settings)))
        except TwoLaneError as error:
            self._skip(setup, str(error))
            return None

    def _is_up(self, one: Launched, by_s: float) -> bool:
        """Waits for it. False, with the reason noted, if it doesn't come up, or not in time: then it is stopped."""
        try:
            control.await_start(one.files, _Watch(self._say, one.setup.name, by_s).show)
        except TwoLaneError as error:
            self._skip(one.setup, str(error))
            stop_together([one.files])
            return False
        return True

    def _live(self, one: Launched) -> Live:
        setup, plan, state = one.setup, one.plan, control.running(one.files)
        routes = tuple(routes_of(setup, plan))
        self._results.baselines.update({route.name: route.baseline for route in routes if route.baseline})
        address = {spec.role: spec.address for spec in plan.services}
        measures_p = setup.kind in ("twolane", "nixl")  # P2pNcclConnector's P answers nothing without a D
        return Live(
            setup,
            plan.model.names[0],
            routes,
            proxy=plan.proxy_address if setup.kind != "plain" else "",
            prefill=address["prefill"] if measures_p else "",
            decode=address["decode"] if setup.hands_over else "",
            pids=tuple(service.pid for service in state.services if service.pid) if state else (),
        )

    def _measure(self, lives: list[Live], end_s: float) -> None:
        self._say(f"measuring {', '.join(live.setup.name for live in lives)}")
        measurement = Measurement(lives, self._options, self._results, self._say)
        try:
            asyncio.run(measurement.run(end_s))
        except KeyboardInterrupt:
            measurement.fetch_records()
            raise

    def _attached(self) -> None:
        options = self._options
        model = served_model(options.proxy)
        if not model:
            raise StartError(f"no proxy with a ready instance answers at {options.proxy}")
        routes = tuple(pair_routes(ATTACHED, options.proxy, options.decode_url))
        self._results.baselines[routes[0].name] = routes[0].baseline
        self._results.beside[ATTACHED.name] = 0
        live = Live(ATTACHED, model, routes, options.proxy, options.prefill_url, options.decode_url)
        try:
            self._measure([live], self._end_s)
        finally:
            self._results.moments.update(by_transfer(read_traces(map(Path, options.trace_files))))

    def _trace_files(self, setup: Setup) -> list[Path]:
        stems = [trace_file(self._options, setup, role) for role in ("prefill", "decode")]
        return [file for stem in stems for file in sorted(stem.parent.glob(f"{stem.name}.*.jsonl"))]

    def _remove_old_traces(self, setup: Setup) -> None:
        trace_file(self._options, setup, "prefill").parent.mkdir(parents=True, exist_ok=True)
        for file in self._trace_files(setup):
            file.unlink()

    def _read_traces(self, setup: Setup) -> None:
        if setup.kind == "twolane" and self._options.trace:
            self._results.moments.update(by_transfer(read_traces(self._trace_files(setup))))


class _Watch:
    """Tells how a start goes, and ends it when its time is over."""

    def __init__(self, say: Callable[[str], None], name: str, end_s: float) -> None:
        self._say = say
        self._name = name
        self._end_s = end_s
        self._shown: dict[str, str] = {}

    def show(self, services: list[ServiceState]) -> None:
        for service in services:
            if self._shown.get(service.name, "waiting") != service.phase:
                self._shown[service.name] = service.phase
                self._say(f"{self._name}: {service.name}: {service.phase}")
        if time.monotonic() > self._end_s:
            raise StartError("it was not up before the share of the budget that is for starting had ended")
