"""`up`, `down` and `restart` as a person sees them."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import replace

from rich.console import Console

from twolane.config import Settings
from twolane.errors import ConfigError, StartError
from twolane.launch import control, logs, probes, terminals
from twolane.launch.configuration import nearest
from twolane.launch.doctor import examine
from twolane.launch.facts import gather
from twolane.launch.firstlight import FirstLight, curl_line, first_light
from twolane.launch.hardware import inspect_machine, vllm_folder
from twolane.launch.kv import check_kv
from twolane.launch.model import resolve_model
from twolane.launch.phases import DRAINING, GIVEN_UP, READY
from twolane.launch.plan import ALONE_ONLY, Machine, Plan, load_plan, make_plan, on_cluster
from twolane.launch.ports import check_ports
from twolane.launch.process import signals_interrupt
from twolane.launch.progress import Progress, ServicesView
from twolane.launch.scale import index_of, scaled
from twolane.launch.state import State

USUAL_START_S = {"cpu": 45.0, "cuda": 90.0}


def up(settings: Settings, console: Console) -> None:
    """Returns when a request has gone through both lanes, or at once if all is up. Stops what it started on Ctrl+C."""
    if alone := [key for key in ALONE_ONLY if getattr(settings, key) != getattr(Settings, key)]:
        raise ConfigError(f"{alone[0]} is for a proxy that stands alone: leave it out, or use `twolane proxy`")
    files = control.Files(settings)
    with control.exclusive(files):
        if state := control.running(files):
            plan = load_plan(files.plan)
            _tell_other_settings(settings, plan, console)
            return _complete(settings, files, state, plan, console)
        if leftovers := control.stop_all(files):
            console.print("left over from before: " + ", ".join(leftovers))
        machine = inspect_machine()
        plan = prepare(settings, machine, console)
        if settings.ray:
            plan = place_on_cluster(plan, files, console)
            check_ports(plan, {"proxy"})
        else:
            check_ports(plan)
            _warn(settings, plan, console)
        console.print(f"starting {len(plan.services)} services with {plan.model.source}", markup=False)
        try:
            control.start_supervisor(plan, files)
            plan, light = _await_all(files, plan, machine.engine, console)
        except (KeyboardInterrupt, StartError):
            for line in control.stop_all(files):
                console.print(line)
            raise
    return _tell(plan, light, console)


def prepare(settings: Settings, machine: Machine, console: Console) -> Plan:
    """What would be started. Converts the default model if that hasn't happened yet."""
    check_kv(settings.kv, machine.engine, vllm_folder())
    return make_plan(settings, machine, resolve_model(settings, machine.engine, Progress(console)))


def place_on_cluster(plan: Plan, files: control.Files, console: Console) -> Plan:
    """Asks the cluster whether it can; makes the secret that the deployment shares."""
    from twolane.launch.cluster import survey  # noqa: PLC0415 - one machine needs no Ray

    host, nodes = survey(plan)
    console.print(f"Ray cluster of {len(nodes)} nodes: " + ", ".join(node.facts.host for node in nodes), markup=False)
    secret_file = files.folder.absolute() / "registration-secret"
    secret_file.unlink(missing_ok=True)
    secret_file.touch(mode=0o600)
    secret_file.write_text(secrets.token_hex(32) + "\n")
    given = plan.settings.allow_network
    networks = tuple(f"{node.facts.host}/32" for node in nodes) if given == Settings.allow_network else given
    return on_cluster(plan, host, networks, secret_file)


def _tell_other_settings(settings: Settings, plan: Plan, console: Console) -> None:
    """What runs goes on as it is. A user who asks for something else must not believe to have got it."""
    asked, runs = (settings.prefill, settings.decode), (len(plan.of_role("prefill")), len(plan.of_role("decode")))
    if replace(settings, prefill=1, decode=1) != replace(plan.settings, prefill=1, decode=1):
        console.print("what runs was started with other settings: `twolane down`, then `twolane up` applies these")
    if asked != runs:
        console.print(
            f"{runs[0]} prefill and {runs[1]} decode instances run, and the settings say {asked[0]} and {asked[1]}: "
            f"`twolane scale --prefill {asked[0]} --decode {asked[1]}` makes it so"
        )


def _warn(settings: Settings, plan: Plan, console: Console) -> None:
    """What the doctor finds: said before the wait for a start that may fail, but left to the user."""
    folders = [settings.log_dir.absolute(), settings.cache_dir.absolute()]
    for finding in examine(gather(plan, folders, running=False)):
        if finding.level != "ok" and finding.name != "clock":  # no start fails of that
            console.print(f"{finding.level}: {finding.text} ({finding.remedy})", markup=False)


def _await_all(files: control.Files, plan: Plan, engine: str, console: Console) -> tuple[Plan, FirstLight]:
    """The plan says by then where Ray has placed what."""
    with ServicesView(console, USUAL_START_S[engine]) as view:
        state = control.await_start(files, view.update)
    console.print(f"ready after {time.time() - state.started:.1f} s: {plan.proxy_url}", markup=False)
    plan = load_plan(files.plan)
    return plan, first_light(plan)


def _complete(settings: Settings, files: control.Files, state: State, plan: Plan, console: Console) -> None:
    """A supervisor runs: starts what isn't running, and nothing else."""
    usual_s = USUAL_START_S[inspect_machine().engine]
    if state.overall == "starting":  # the `up` that began it was killed
        console.print("a start is going on already")
        return _tell(*_await_all(files, plan, inspect_machine().engine, console), console)
    waiting = [service for service in state.services if service.phase not in {READY, DRAINING}]
    if waiting:
        console.print("starting what isn't running: " + ", ".join(service.name for service in waiting))
        given_up = {service.name: service.pid for service in waiting if service.phase == GIVEN_UP}
        if given_up:
            control.ask_restart(files, state, list(given_up), settings.drain_seconds)
        with ServicesView(console, usual_s) as view:
            control.await_ready(files, {service.name for service in waiting}, given_up, view.update)
    if not probes.proxy_answers(plan.proxy_address):
        raise StartError(f"it is running, but the proxy doesn't answer at {plan.proxy_url}: `twolane restart proxy`")
    console.print(f"{'up' if waiting else 'already up'}: {state.url} serves {state.model_names[0]}", markup=False)
    return _tell_more(plan, console)


def _what_is_up(files: control.Files) -> State:
    state = control.running(files)
    if state is None or state.overall != "up":
        raise StartError("nothing is up in this folder: `twolane up` starts it")
    return state


def scale(settings: Settings, prefill: int | None, decode: int | None, drain_s: float | None, console: Console) -> None:
    """Returns when the new instances serve, and those that go have ended their requests and are gone."""
    if prefill is None and decode is None:
        raise ConfigError("say how many there shall be, as in: twolane scale --prefill 3 --decode 2")
    files = control.Files(settings)
    with control.exclusive(files):
        state = _what_is_up(files)
        plan, machine = load_plan(files.plan), inspect_machine()
        target = scaled(plan, machine, prefill, decode)
        old = {service.name for service in state.services}
        new = {spec.name for spec in target.services} - {spec.name for spec in plan.services}
        if new - old and not plan.settings.ray:  # the ports of one that still leaves are its own
            check_ports(target, new - old)
        wish_id = control.ask_scale(files, state, target, drain_s or plan.settings.drain_seconds)
        try:
            with ServicesView(console, USUAL_START_S[machine.engine]) as view:
                state = control.await_scaled(files, wish_id, old - new, target, view.update)
        except KeyboardInterrupt:
            console.print("it goes on in the background (`twolane status`); another `twolane scale` changes its aim")
            raise
    for line in [*state.retired, *(f"{name}: ready" for name in sorted(new))]:
        console.print(line, markup=False)
    counts = [len(target.of_role(role)) for role in ("prefill", "decode")]
    console.print(f"now {counts[0]} prefill and {counts[1]} decode instances at {state.url}", markup=False)


def restart(settings: Settings, role: str, drain_s: float | None, console: Console) -> None:
    """One instance after the other, so that others of its role go on. ConfigError if there is no such service."""
    files = control.Files(settings)
    with control.exclusive(files):
        state = _what_is_up(files)
        drain_s = drain_s or load_plan(files.plan).settings.drain_seconds
        names = chosen([(service.name, service.role) for service in state.services], role)
        for name in names:
            old_pids = {service.name: service.pid for service in state.services if service.name == name}
            control.ask_restart(files, state, [name], drain_s)
            with ServicesView(console, USUAL_START_S[inspect_machine().engine]) as view:
                control.await_ready(files, {name}, old_pids, view.update)
            console.print(f"{name}: started again")


def chosen(services: list[tuple[str, str]], word: str) -> list[str]:
    """Names of the services that a word means: a role, a name, or `all`. ConfigError with the nearest right word.

    The one whose name is its role's is `prefill-1`, too.
    """
    names = [name for name, role in services if word in {name, role, "all", f"{role}-{index_of(name) + 1}"}]
    if not names:
        known = tuple(dict.fromkeys([word for pair in services for word in pair]))
        raise ConfigError(f"{word!r} is no role or instance here ({', '.join(known)}){nearest(word, known)}")
    return names


def down(settings: Settings, console: Console) -> None:
    """Returns when nothing runs any more, in terminals neither. Also ends an `up` that is still at work."""
    files = control.Files(settings)
    if control.running(files) or terminals.running(settings.state_dir):
        console.print("stopping (requests that are running may end first, for 30 s at most) ...")
        report = control.stop_all(files)
    else:
        with control.exclusive(files):
            report = control.stop_all(files)
    report += terminals.stop_all(settings.state_dir)
    for line in report or ["nothing is running in this folder"]:
        console.print(line)


def stay(settings: Settings, console: Console) -> None:
    """What `up --foreground` does once all is up: shows the logs until Ctrl+C, then stops all."""
    files = control.Files(settings)
    console.print("\nCtrl+C stops everything")
    try:
        with signals_interrupt():  # what ends a service or a container
            logs.follow(logs.files_of(settings), sys.stdout.write, lambda: control.running(files) is not None)
    except KeyboardInterrupt:
        console.print()
    down(settings, console)


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
