"""What is under fire: a real service under the product's own supervisor, and a single instance to compare with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
from benchmarks.soak.phases import SMALL_CHUNKS, Phase
from rich.console import Console

from twolane.config import Settings
from twolane.launch import control, probes
from twolane.launch.configuration import load
from twolane.launch.hardware import inspect_machine
from twolane.launch.model import resolve_model
from twolane.launch.phases import READY
from twolane.launch.plan import Plan, ServiceSpec, make_plan
from twolane.launch.ports import check_ports
from twolane.launch.process import Child, ProcessId, kill_members, last_lines
from twolane.launch.progress import Progress
from twolane.launch.state import ServiceState, read_state

START_TIMEOUT_S = 240.0
KV_FLAG = "--kv-transfer-config"


def soak_settings(phase: Phase, folder: Path) -> Settings:
    """The environment's ports and model, the phase's instances; state and logs of its own."""
    return replace(
        load({}).settings,
        prefill=phase.prefill,
        decode=phase.decode,
        vllm_args=phase.vllm_args,
        restart_tries=1000,  # giving up an instance that is killed every minute isn't what is tried here
        log_dir=folder / "logs",
        state_dir=folder / "state",
    )


def soak_plan(phase: Phase, settings: Settings) -> Plan:
    machine = inspect_machine()
    plan = make_plan(settings, machine, resolve_model(settings, machine.engine, Progress(Console(stderr=True))))
    return msgspec.structs.replace(plan, services=tuple(_armed(spec, phase) for spec in plan.services))


def _armed(spec: ServiceSpec, phase: Phase) -> ServiceSpec:
    """With the phase's deadlines and fault in kv_connector_extra_config."""
    if spec.role == "proxy":
        return spec
    extra: dict[str, object] = dict(phase.extra)
    if spec.role == "prefill" and (spec.name in phase.drops or phase.fault):
        extra["fault"] = phase.fault or "drop_tenth"
    at = spec.argv.index(KV_FLAG) + 1
    config = json.loads(spec.argv[at])
    config["kv_connector_extra_config"].update(extra)
    return msgspec.structs.replace(spec, argv=(*spec.argv[:at], json.dumps(config), *spec.argv[at + 1 :]))


class Running:
    """Services that a supervisor keeps."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self._files = control.Files(settings)
        self.plan = plan
        self.model = plan.model.names[0]
        self.specs = {spec.name: spec for spec in plan.services}

    def states(self) -> list[ServiceState]:
        state = read_state(self._files.state)
        return state.services if state else []

    def ready(self, role: str) -> list[ServiceState]:
        return [state for state in self.states() if state.role == role and state.phase == READY]

    def all_ready(self) -> bool:
        """All run, and the proxy sends requests to all."""
        known = probes.instances(self.plan.proxy_address) or []
        in_proxy = [entry for entry in known if entry.get("state") == "ready"]
        states = self.states()
        return all(state.phase == READY for state in states) and len(in_proxy) == len(self.plan.instances())

    @property
    def supervisor(self) -> ProcessId | None:
        state = read_state(self._files.state)
        return state.supervisor if state else None


class Service(Running):
    """One run of all services. Owns the supervisor that it starts; `stop` ends it all, and is idempotent."""

    def __init__(self, phase: Phase, folder: Path) -> None:
        settings = soak_settings(phase, folder)
        super().__init__(settings, soak_plan(phase, settings))

    def start(self) -> None:
        """Returns at once; `await_ready` waits. StartError if the supervisor doesn't start, or a port is taken."""
        check_ports(self.plan)
        with control.exclusive(self._files):
            control.start_supervisor(self.plan, self._files)

    def await_ready(self) -> None:
        """Until the first start is through. StartError with the reason if it fails."""
        control.await_start(self._files, lambda _: None)

    def stop(self) -> list[str]:
        return control.stop_all(self._files)


def send_signal(members: list[ProcessId], number: signal.Signals) -> None:
    for member in members:
        if member.alive():
            with suppress(ProcessLookupError):  # ended between the two lines
                os.kill(member.pid, number)


def kill(state: ServiceState) -> None:
    """SIGKILL for all of it."""
    kill_members(state.members)


@contextmanager
def single_instance(folder: Path, port: int) -> Iterator[str]:
    """Address of vLLM without our connector, with nothing cached: the reference."""
    phase = Phase("reference", "reference", 0, 0, vllm_args=(*SMALL_CHUNKS, "--no-enable-prefix-caching"))
    plan = soak_plan(phase, soak_settings(phase, folder))
    spec = next(spec for spec in plan.services if spec.role == "prefill")
    at = spec.argv.index(KV_FLAG)
    argv = [*spec.argv[:at], *spec.argv[at + 2 :], "--port", str(port)]
    spec = msgspec.structs.replace(spec, argv=tuple(argv), http_port=port, log=str(folder / "logs/reference.log"))
    sockets = tempfile.mkdtemp(prefix="twolane-soak-")
    child = Child(spec, {"TMPDIR": sockets, "VLLM_RPC_BASE_PATH": sockets})
    try:
        _await_healthy(child, spec)
        yield spec.address
    finally:
        child.stop(10.0)
        shutil.rmtree(sockets, ignore_errors=True)


def _await_healthy(child: Child, spec: ServiceSpec) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not probes.is_healthy(spec):
        tail = "\n".join(last_lines(Path(spec.log), 20))
        assert child.exit_code() is None, f"the reference instance died:\n{tail}"
        assert time.monotonic() < deadline_s, f"the reference instance is not ready:\n{tail}"
        time.sleep(0.3)
