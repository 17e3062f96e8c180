"""Whether the ports of a plan are free, and who has them if not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

import psutil

from twolane.errors import ConfigError
from twolane.launch.plan import Plan, ports_of

UNKNOWN_HOLDER = "a process of another user, or one that is just ending"


def check_ports(plan: Plan, names: Collection[str] = ()) -> None:
    """ConfigError if a port is taken (of the services named, or of all). Says who holds it and what moves it."""
    if taken := taken_ports(plan, names):
        raise ConfigError(taken[0])


def taken_ports(plan: Plan, names: Collection[str] = ()) -> list[str]:
    """A sentence for each port that isn't free: the port, who holds it, and the variable that moves it."""
    return [
        f"port {use.port} ({use.whose}) is taken by {holder(use.port)}: end that, or use another port, as in "
        f"{use.variable}={use.port + 5}"
        for use in sorted(ports_of(plan), key=lambda use: use.port)
        if (not names or use.service in names) and not is_free(use.host, use.port)
    ]


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
