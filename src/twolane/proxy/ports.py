"""Listening sockets, and who holds a port that we can't have."""

from __future__ import annotations

import errno
import socket

import psutil

from twolane.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket for asyncio to listen on. Raises ConfigError, which names the port and its holder."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{host!r} is no address to listen on: {error}; give another --host") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use("HTTP", port, "--http-port") from error
        raise ConfigError(f"can't listen on {host}:{port}: {error}") from error
    return listener


def port_in_use(what: str, port: int, flag: str) -> ConfigError:
    return ConfigError(f"the {what} port {port} is in use by {holder_of(port)}; stop it, or choose another with {flag}")


def holder_of(port: int) -> str:
    """`name (pid N)` of who listens on a TCP port, as far as we may know."""
    try:
        pids = [
            c.pid
            for c in psutil.net_connections(kind="tcp")
            if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN and c.pid
        ]
        if pids:
            return f"{psutil.Process(pids[0]).name()} (pid {pids[0]})"
    except psutil.Error:
        pass
    return "a process that this user may not see"
