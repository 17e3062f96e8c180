"""Whether the ports of a plan are free, and who has them if not."""

from __future__ import annotations

import errno
import socket

import psutil

from twolane.errors import ConfigError
from twolane.launch.plan import Plan

VARIABLES = {
    "proxy": ("HTTP_PORT", ""),
    "prefill": ("PREFILL_PORT", "PREFILL_KV_PORT"),
    "decode": ("DECODE_PORT", "DECODE_KV_PORT"),
}


def check_ports(plan: Plan) -> None:
    """ConfigError if a port is taken: names the port, who holds it, and the variable that moves it."""
    for port, host, variable, whose in _wanted(plan):
        if not is_free(host, port):
            raise ConfigError(
                f"port {port} ({whose}) is taken by {holder(port)}: end that, or use another port, as in "
                f"{variable}={port + 5}"
            )


def _wanted(plan: Plan) -> list[tuple[int, str, str, str]]:
    wanted = [(plan.discovery_port, "127.0.0.1", "DISCOVERY_PORT", "the proxy's discovery")]
    for spec in plan.services:
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


def holder(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.NoSuchProcess:
                continue
    return "a process of another user, or one that is just ending"
