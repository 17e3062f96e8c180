"""Whether the ports of a plan are free, and who has them if not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

import psutil

from twolane.errors import ConfigError
from twolane.launch.plan import Plan

UNKNOWN_HOLDER = "a process of another user, or one that is just ending"
VARIABLES = {
    "proxy": ("HTTP_PROXY_PORT", ""),
    "prefill": ("PREFILL_HTTP_PORT", "PREFILL_KV_PORT"),
    "decode": ("DECODE_HTTP_PORT", "DECODE_KV_PORT"),
}


def check_ports(plan: Plan, names: Collection[str] = ()) -> None:
    """ConfigError if a port is taken (of the services named, or of all). Says who holds it and what moves it."""
    if taken := taken_ports(plan, names):
        raise ConfigError(taken[0])


def taken_ports(plan: Plan, names: Collection[str] = ()) -> list[str]:
    """A sentence for each port that isn't free: the port, who holds it, and the variable that moves it."""
    return [
        f"port {port} ({whose}) is taken by {holder(port)}: end that, or use another port, as in {variable}={port + 5}"
        for port, host, variable, whose in _wanted(plan, names)
        if not is_free(host, port)
    ]


def _wanted(plan: Plan, names: Collection[str]) -> list[tuple[int, str, str, str]]:
    wanted = [(plan.discovery_port, plan.discovery_host, "PROXY_PORT", "the proxy's discovery")] * (
        not names or "proxy" in names
    )
    for spec in plan.services:
        if names and spec.name not in names:
            continue
        http_variable, kv_variable = VARIABLES[spec.role]
        wanted.append((spec.http_port, spec.host, http_variable, f"{spec.name}'s HTTP server"))
        if spec.kv_port is not None:
            wanted.append((spec.kv_port, spec.host, kv_variable, f"{spec.name}'s KV transfer"))
    return sorted(wanted)


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind it now. ConfigError if `host` is no address of this machine."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            return False
        raise ConfigError(f"HOST={host} is no address that this machine can listen on: {error}") from error
    return True


def listener_pid(port: int) -> int | None:
    """Who listens on `port`, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    listening = (c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    return next((int(c.pid) for c in listening if c.pid), None)


def holder(port: int) -> str:
    """The same in words."""
    pid = listener_pid(port)
    try:
        return f"process {pid} ({psutil.Process(pid).name()})" if pid else UNKNOWN_HOLDER
    except psutil.NoSuchProcess:
        return UNKNOWN_HOLDER
