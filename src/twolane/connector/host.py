"""Knowing another process of the same host: whose pid it is, and when it dies."""

from __future__ import annotations

import os
from pathlib import Path


def host_identity() -> str:
    """The same for two processes only if they share the machine and no container's border lies between them: a pid of
    one means the same process to the other (pid), who may look into its memory (user), CUDA's handles too (ipc); and
    what one calls its address is its own (net)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("pid", "user", "ipc", "net")]
    return ":".join([boot, *namespaces])


def open_pidfd(pid: int, host: str) -> int | None:
    """A descriptor that becomes readable when process `pid` of this host dies; None if it is another host's.

    Raises ProcessLookupError if it is dead already. The caller closes the descriptor.
    """
    return os.pidfd_open(pid) if host == host_identity() else None
