"""One instance in the foreground of a terminal: `twolane prefill` and `twolane decode`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console

from twolane.config import Settings
from twolane.errors import ConfigError, StartError
from twolane.launch import probes
from twolane.launch.commands import prepare
from twolane.launch.diagnose import diagnose, not_registered
from twolane.launch.hardware import inspect_machine
from twolane.launch.logs import Follower
from twolane.launch.plan import Plan, ServiceSpec
from twolane.launch.ports import check_ports
from twolane.launch.process import Child, last_lines, signals_interrupt
from twolane.launch.registrar import Registrar, make_registrar
from twolane.launch.service import describe_exit
from twolane.launch.state import ServiceState
from twolane.launch.supervisor import INSTANCE_STOP_S, RUN_DIR_PREFIX
from twolane.launch.terminals import Record, recorded

POLL_S = 0.1
WATCH_EVERY_S = 2.0


def settings_for(settings: Settings, role: str, index: int) -> Settings:
    """With as many instances of the role as number `index` (from 1) needs, but not more than GPUs are named."""
    groups = settings.prefill_gpu if role == "prefill" else settings.decode_gpu
    count = settings.prefill if role == "prefill" else settings.decode
    if groups and index > len(groups):
        raise ConfigError(f"{role.upper()}_GPU names {len(groups)} instances: there is no number {index}")
    count = max(count, index)
    return replace(settings, prefill=count) if role == "prefill" else replace(settings, decode=count)


def spec_of(plan: Plan, role: str, index: int, extra_args: list[str]) -> ServiceSpec:
    """Instance number `index` of the role, from 1, with more options for vLLM at its end."""
    spec = [spec for spec in plan.services if spec.role == role][index - 1]
    return msgspec.structs.replace(spec, argv=(*spec.argv, *extra_args))


def run_role(settings: Settings, role: str, index: int, vllm_options: list[str], console: Console) -> None:
    """What `twolane prefill` and `twolane decode` do."""
    if vllm_options and not vllm_options[0].startswith("-"):
        raise ConfigError(f"{vllm_options[0]!r}: options for vLLM come after `--` and begin with a dash")
    plan = prepare(settings_for(settings, role, index), inspect_machine(), console)
    spec = spec_of(plan, role, index, vllm_options)
    check_ports(plan, {spec.name})
    console.print(f"{spec.name} at http://{spec.address}, log {spec.log}; Ctrl+C ends it", markup=False)
    me = ServiceState(spec.name, spec.role, spec.http_port, spec.log, spec.kv_port, spec.gpus)
    with recorded(settings.state_dir, me) as record:
        run_in_foreground(plan, spec, _write, record)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run_in_foreground(plan: Plan, spec: ServiceSpec, write: Callable[[str], object], record: Record) -> None:
    """Shows the instance's log until it ends. Ctrl+C, SIGTERM and a closed terminal stop it. StartError if it fails."""
    run_dir = Path(tempfile.mkdtemp(prefix=RUN_DIR_PREFIX))
    registrar = make_registrar(plan, spec)
    child = None
    try:
        with signals_interrupt():
            child = Child(spec, {"TMPDIR": str(run_dir), "VLLM_RPC_BASE_PATH": str(run_dir)}, plan.log_max_bytes)
            watch = Watch(plan, spec, child, record)
            _show_until_exit(child, Path(spec.log), watch, registrar, write)
    except KeyboardInterrupt:
        if child:
            write(f"\n{spec.name}: {child.stop(INSTANCE_STOP_S)}\n")
        return
    finally:
        if registrar:
            registrar.close()
        if child:
            child.stop(0.0)
        shutil.rmtree(run_dir, ignore_errors=True)
    _explain(spec, child.exit_code() or 0)


def _show_until_exit(
    child: Child, path: Path, watch: Watch, registrar: Registrar | None, write: Callable[[str], object]
) -> None:
    log = Follower("", path, from_start=True)
    ended = False
    try:
        while not ended:
            ended = child.exit_code() is not None
            for line in log.read():
                write(line)
            if registrar:
                registrar.tick()
            if not ended:
                write(watch.tick())
                time.sleep(POLL_S)
    finally:
        log.close()


class Watch:
    """Every few seconds: records the instance's processes, and tells once why it serves but gets no requests yet."""

    def __init__(self, plan: Plan, spec: ServiceSpec, child: Child, record: Record) -> None:
        self._plan = plan
        self._spec = spec
        self._child = child
        self._record = record
        self._record.note(child.pgid, child.look())
        self._next_s = time.monotonic() + WATCH_EVERY_S
        self._served = False
        self._done = False

    def tick(self) -> str:
        """A line to show, or nothing. An instance has from one look to the next to register."""
        if time.monotonic() < self._next_s:
            return ""
        self._next_s = time.monotonic() + WATCH_EVERY_S
        self._record.note(self._child.pgid, self._child.look())
        return "" if self._done else self._registration()

    def _registration(self) -> str:
        proxy, spec = self._plan.proxy_address, self._spec
        self._done = probes.is_registered(proxy, spec)
        served_before, self._served = self._served, probes.is_healthy(spec)
        if self._done or not (served_before and self._served):
            return ""
        self._done = True
        if probes.instances(proxy) is None:
            return f"twolane: no proxy answers yet at {proxy}: start it with `twolane proxy`, here or later\n"
        why = not_registered(spec.address, self._plan.discovery_address, self._plan.kv, probes.known_instances(proxy))
        return f"twolane: {why}\n"


def _explain(spec: ServiceSpec, code: int) -> None:
    """StartError with the cause, unless it ended by its own will."""
    if code == 0:
        return
    known = diagnose(last_lines(Path(spec.log), 200))
    raise StartError(f"{spec.name} ended {describe_exit(code)}" + (f": {known}" if known else f"; see {spec.log}"))
