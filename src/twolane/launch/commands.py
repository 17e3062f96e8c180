"""`up`, `down` and `status` as a person sees them."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from twolane.config import Settings
from twolane.errors import StartError
from twolane.launch import control, probes
from twolane.launch.firstlight import FirstLight, curl_line, first_light
from twolane.launch.hardware import inspect_machine
from twolane.launch.model import resolve_model
from twolane.launch.phases import READY
from twolane.launch.plan import Plan, load_plan, make_plan
from twolane.launch.ports import check_ports
from twolane.launch.progress import Progress, ServicesView
from twolane.launch.state import State, read_state

USUAL_START_S = {"cpu": 45.0, "cuda": 90.0}


def up(settings: Settings, console: Console) -> None:
    """Returns when a request has gone through both lanes, or at once if all is up. Stops what it started on Ctrl+C."""
    files = control.Files(settings)
    with control.exclusive(files):
        if state := control.running(files):
            return _already(state, load_plan(files.plan), console)
        if leftovers := control.stop_all(files):
            console.print("left over from before: " + ", ".join(leftovers))
        machine = inspect_machine()
        plan = make_plan(settings, machine, resolve_model(settings, machine.engine, Progress(console)))
        check_ports(plan)
        console.print(f"starting {len(plan.services)} services with {plan.model.source}")
        try:
            control.start_supervisor(plan, files)
            with ServicesView(console, USUAL_START_S[machine.engine]) as view:
                control.await_start(files, view.update)
            light = first_light(plan)
        except (KeyboardInterrupt, StartError):
            for line in control.stop_all(files):
                console.print(line)
            raise
    return _tell(plan, light, console)


def down(settings: Settings, console: Console) -> None:
    """Returns when nothing runs any more. Also ends an `up` that is still at work."""
    files = control.Files(settings)
    if control.running(files):
        console.print("stopping (requests that are running may end first, for 30 s at most) ...")
        report = control.stop_all(files)
    else:
        with control.exclusive(files):
            report = control.stop_all(files)
    for line in report or ["nothing is running in this folder"]:
        console.print(line)


def status(settings: Settings) -> dict[str, Any]:
    """What runs, for --json. `running` says whether the supervisor does."""
    files = control.Files(settings)
    state = control.running(files)
    if state is None:
        leftover = read_state(files.state)
        return {
            "running": False,
            "services": [],
            "left_over": bool(leftover and any(s.members for s in leftover.services)),
        }
    services = [
        {
            "name": service.name,
            "role": service.role,
            "pid": service.pid,
            "gpu": service.gpu,
            "http_port": service.http_port,
            "kv_port": service.kv_port,
            "state": service.phase,
            "for_s": round(time.time() - service.since),
            "restarts": service.restarts,
            "log": service.log,
        }
        for service in state.services
    ]
    return {
        "running": True,
        "state": state.overall,
        "url": state.url,
        "models": list(state.model_names),
        "supervisor_pid": state.supervisor.pid,
        "services": services,
    }


def print_status(report: dict[str, Any], console: Console) -> None:
    if not report["running"]:
        console.print(
            "nothing is running in this folder" + (", but something is left over: `twolane down`" * report["left_over"])
        )
        return
    console.print(f"{report['state']}  {report['url']}  model {report['models'][0]}")
    table = Table(box=None, pad_edge=False)
    columns = ("name", "pid", "gpu", "http_port", "kv_port", "state", "for_s", "restarts", "log")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for service in report["services"]:
        table.add_row(*("-" if service[column] is None else str(service[column]) for column in columns))
    console.print(table)


def _already(state: State, plan: Plan, console: Console) -> None:
    if state.overall != "up":
        raise StartError(f"a supervisor is already at work here (state: {state.overall}); `twolane status` shows it")
    waiting = [service.name for service in state.services if service.phase != READY]
    if waiting or not probes.proxy_answers(plan.proxy_address):
        raise StartError(
            f"it is running, but not all is well ({', '.join(waiting) or 'the proxy does not answer'}): "
            "`twolane status` shows it, `twolane down` stops it"
        )
    console.print(f"already up: {state.url} serves {state.model_names[0]}")
    _tell_more(plan, console)


def _tell(plan: Plan, light: FirstLight, console: Console) -> None:
    console.print("\nfirst light: a real request went through both lanes")
    sources = f"D got the KV of {light.moved_tokens} from P and computed {light.computed_tokens}"
    console.print(f"  prompt  {light.prompt_tokens} tokens, of which {sources}")
    console.print(f"  answer  {light.answer!r}", markup=False)
    stages = {**light.stages_ms, "total_ms": light.stages_ms.get("total_ms", light.total_ms)}
    words = {"prefill_done_ms": "prefill done", "first_byte_ms": "first token", "total_ms": "all"}
    console.print("  times   " + ", ".join(f"{words[name]} {ms:.0f} ms" for name, ms in stages.items()))
    _tell_more(plan, console)


def _tell_more(plan: Plan, console: Console) -> None:
    rows = [(spec.name, f"http://{spec.address}", spec.log) for spec in plan.services]
    console.print()
    for name, url, log in rows:
        console.print(f"  {name:<10} {url}  log {log}", markup=False)
    console.print("\ntry:   " + curl_line(plan), markup=False, soft_wrap=True)
    console.print("stop:  make down   (or: twolane down)")
