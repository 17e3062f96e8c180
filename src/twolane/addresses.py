"""`host:port`, as people and sockets write it."""

from __future__ import annotations

import ipaddress


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port). IPv6 hosts come in brackets. Raises ValueError, which names the address."""
    host, sep, port = address.rpartition(":")
    if not sep or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"not a host:port address: {address!r}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rank_address(address: str, rank: int) -> str:
    """The control address of worker `rank`, from that of rank 0."""
    host, port = split_address(address)
    return join_address(host, port + rank)
