"""What runs: the supervisor's state, what the proxy says, and what the system says of the processes, put together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from twolane.config import Settings
from twolane.launch import control, probes, terminals
from twolane.launch.phases import SILENT
from twolane.launch.plan import proxy_address
from twolane.launch.ports import listener_pid
from twolane.launch.state import ServiceState, read_state
from twolane.launch.terminals import Terminal
from twolane.protocol import LANES

COLUMNS = ("instance", "role", "pid", "gpu", "ports", "state", "uptime", "memory", "in-flight")
WIDE_COLUMNS = ("waiting", "free kv")  # what the engines say, where a terminal has room for it
WIDE = 98


def status(settings: Settings) -> dict[str, Any]:
    """For --json. `running`: whether a supervisor does; without one, services that terminals started may be listed."""
    files = control.Files(settings)
    state = control.running(files)
    address = state.url.removeprefix("http://") if state else proxy_address(settings)
    known = {str(entry["address"]): entry for entry in probes.instances(address) or []}
    in_terminals = [_in_terminal(terminal, known) for terminal in terminals.running(settings.state_dir)]
    services = [_row(service, known) for service in state.services] if state else []
    services += [_row(service, known) for service in in_terminals]
    if state is None:
        leftover = read_state(files.state)
        services = _in_order(services + from_proxy(settings, {row["http_port"] for row in services}))
        left_over = bool(leftover and any(s.members for s in leftover.services))
        return {"running": False, "services": services, "left_over": left_over}
    return {
        "running": True,
        "state": state.overall,
        "url": state.url,
        "models": list(state.model_names),
        "supervisor_pid": state.supervisor.pid,
        "services": _in_order(services),
    }


def _in_order(services: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(services, key=lambda row: ("proxy", *LANES.values()).index(row["role"]))


def _in_terminal(terminal: Terminal, known: dict[str, Any]) -> ServiceState:
    """Its state is what the proxy says of it; the proxy's own, whether it answers. Until then it starts."""
    service = terminal.service
    entry = known.get(f"127.0.0.1:{service.http_port}")
    answers = service.role == "proxy" and probes.proxy_answers(f"127.0.0.1:{service.http_port}")
    phase = entry["state"] if entry else "ready" if answers else "starting"
    members = service.members or [terminal.owner]
    return msgspec.structs.replace(service, members=members, phase=phase)


def _row(service: ServiceState, known: dict[str, Any]) -> dict[str, Any]:
    entry = known.get(f"{service.host}:{service.http_port}", {})
    in_flight = sum(e["in_flight"] for e in known.values() if e["role"] == "D") if service.role == "proxy" else None
    pids = [member.pid for member in service.members if member.alive()]
    return {
        "name": service.name,
        "role": service.role,
        "pid": service.pid or None,
        "gpus": list(service.gpus),
        "node": service.node or None,
        "http_port": service.http_port,
        "kv_port": service.kv_port,
        "state": service.phase,
        "for_s": round(time.time() - service.since) if service.since else None,
        "uptime_s": uptime_s(pids[:1] and [service.pid]),
        "memory_bytes": memory_bytes(pids),
        "in_flight": entry.get("in_flight") if in_flight is None else in_flight,
        "load": entry.get("load"),
        "restarts": service.restarts,
        "reason": service.reason or None,
        "problem": entry.get("problem"),
        "log": service.log,
    }


def from_proxy(settings: Settings, ports: set[int]) -> list[dict[str, Any]]:
    """Services started elsewhere, on other ports than these, as far as the proxy at our address knows them."""
    known = probes.instances(proxy_address(settings))
    if known is None:
        return []
    in_flight = sum(entry["in_flight"] for entry in known if entry["role"] == "D")
    rows = [_found("proxy", settings.http_proxy_port, "ready", in_flight)]
    for entry in known:
        port = int(entry["address"].rpartition(":")[2])
        row = _found(LANES[entry["role"]], port, entry["state"], entry["in_flight"])
        rows.append(row | {"load": entry.get("load"), "problem": entry.get("problem")})
    return [row for row in rows if row["http_port"] not in ports]


def _found(role: str, port: int, state: str, in_flight: int) -> dict[str, Any]:
    pid = listener_pid(port)
    row: dict[str, Any] = {
        "name": role,
        "role": role,
        "pid": pid,
        "gpus": [],
        "node": None,
        "http_port": port,
        "kv_port": None,
        "state": state,
    }
    times = {"uptime_s": uptime_s([pid] if pid else []), "memory_bytes": memory_bytes([pid] if pid else [])}
    rest = {"in_flight": in_flight, "load": None, "restarts": None, "reason": None, "problem": None, "log": None}
    return row | times | rest


def memory_bytes(pids: list[int]) -> int | None:
    """Resident memory of these processes; what they share counts for each of them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total or None


def uptime_s(pids: list[int]) -> int | None:
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            return int(time.time() - float(psutil.Process(pid).create_time()))
    return None


def print_status(report: dict[str, Any], console: Console) -> None:
    if report["running"]:
        console.print(f"{report['state']}  {report['url']}  model {report['models'][0]}", markup=False)
    elif report["services"]:
        console.print("not started by `twolane up` in this folder, but in terminals or elsewhere:", markup=False)
    else:
        left_over = ", but something is left over: `twolane down`" * report.get("left_over", False)
        console.print("nothing is running in this folder" + left_over)
        return
    table = Table(box=None, pad_edge=False)
    columns = list(COLUMNS + WIDE_COLUMNS * (console.width >= WIDE))
    if any(service["node"] for service in report["services"]):
        columns[columns.index("role")] = "node"  # the name says the role
    for column in columns:
        table.add_column(column, no_wrap=column != "state")
    for service in report["services"]:
        table.add_row(*cells(service, columns))
    console.print(table)
    for service in report["services"]:
        if service["restarts"]:
            why = f"; {service['reason']}" if service["reason"] else ""
            text = f"{service['name']}: started again {service['restarts']} times{why} (log: {service['log']})"
            console.print(text, markup=False)
        if service["state"] == SILENT:
            since = duration(service["for_s"])
            text = f"no word from node {service['node']} for {since}; placed anew if Ray finds that the node is dead"
            console.print(f"{service['name']}: {text}", markup=False)
        if service.get("problem"):
            console.print(f"{service['name']}: {service['problem']}", markup=False)


def cells(service: dict[str, Any], columns: Collection[str]) -> list[str]:
    """One service as the table shows it."""
    ports = [str(port) for port in (service["http_port"], service["kv_port"]) if port]
    memory = service["memory_bytes"]
    load = service["load"]
    values = {
        "instance": service["name"],
        "role": service["role"],
        "node": service["node"],
        "pid": service["pid"],
        "gpu": "+".join(str(gpu) for gpu in service["gpus"]) or None,
        "ports": ",".join(ports),
        "state": service["state"],
        "uptime": None if service["uptime_s"] is None else duration(service["uptime_s"]),
        "memory": None if memory is None else f"{memory / 1e9:.1f} GB",
        "in-flight": service["in_flight"],
        "waiting": load and load["num_waiting"],
        "free kv": load and f"{100 * load['free_blocks'] // max(1, load['num_blocks'])}%",
    }
    return ["-" if values[column] is None else str(values[column]) for column in columns]


def duration(total_s: int) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`."""
    for unit_s, sub_s, unit, sub in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if total_s >= unit_s:
            return f"{total_s // unit_s}{unit}{total_s % unit_s // sub_s:02d}{sub}"
    return f"{total_s}s"
