"""A folder in which tests run commands, on ports of their own, with real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import twolane
from tests.ports import free_ports_of

PORTS = ("HTTP_PROXY_PORT", "PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT", "PREFILL_KV_PORT", "DECODE_KV_PORT")
BIN = Path(sys.executable).parent


class Place:
    """A folder to run commands in, with ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports_of(PORTS)
        path = os.pathsep.join([str(Path(twolane.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self.env = {**os.environ, **self.ports, "PYTHONPATH": path}

    def program(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=400, check=False
        )

    def twolane(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.program(sys.executable, "-m", "twolane.cli", *words)

    def services(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads(self.twolane("status", "--json").stdout)["services"]}
