"""Who is compared in benchmarks/proxy.py: a virtual environment for each peer, made once in a cache folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUART_EXAMPLE = "disagg_proxy_p2p_nccl_xpyd.py"
VLLM_VERSION = "0.22.1"


@dataclass(frozen=True)
class Ports:
    http: int
    discovery: int
    prefill: int
    decode: int
    metrics: int


@dataclass(frozen=True)
class Peer:
    """`argv` starts it; `kind` is how the mock instances register there, if they do."""

    name: str
    argv: Callable[[Path, Ports], list[str]]
    requirements: tuple[str, ...] = ()
    kind: str = ""
    prepare: Callable[[Path], None] | None = None

    def install(self, cache: Path) -> Path:
        """The folder with the peer's environment. Raises CalledProcessError or OSError."""
        home = cache / self.name
        done = home / "installed"
        if not done.exists() and self.requirements:
            venv.create(home / "venv", with_pip=True, clear=True)
            pip(home, "install", "--quiet", *self.requirements)
            if self.prepare is not None:
                self.prepare(home)
            done.touch()
        home.mkdir(parents=True, exist_ok=True)
        return home


def pip(home: Path, *arguments: str, env: dict[str, str] | None = None, check: bool = True) -> None:
    command = [str(home / "venv/bin/pip"), *arguments]
    subprocess.run(
        command, check=check, env=os.environ | (env or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def unpack_quart_example(home: Path) -> None:
    """vLLM's source archive holds the example, its wheel doesn't. pip unpacks it, fails to build it, and is told to
    leave the unpacked files where they are."""
    scratch = home / "sdist"
    scratch.mkdir(exist_ok=True)
    arguments = (
        "--quiet",
        "--no-deps",
        "--no-binary",
        "vllm",
        "--no-build-isolation",
        "--no-clean",
        "-d",
        str(scratch),
    )
    pip(home, "download", *arguments, f"vllm=={VLLM_VERSION}", env={"TMPDIR": str(scratch)}, check=False)
    found = sorted(scratch.rglob(QUART_EXAMPLE))
    if not found:
        raise OSError(f"the source archive of vllm {VLLM_VERSION} could not be unpacked, or has no {QUART_EXAMPLE}")
    (home / QUART_EXAMPLE).write_bytes(found[0].read_bytes())


def twolane_argv(_home: Path, ports: Ports) -> list[str]:
    flags = ["--http-port", str(ports.http), "--discovery-port", str(ports.discovery)]
    return [sys.executable, "-m", "twolane.cli", "proxy", *flags]


def router_argv(home: Path, ports: Ports) -> list[str]:
    flags = ["--vllm-pd-disaggregation", "--vllm-discovery-address", f"127.0.0.1:{ports.discovery}"]
    flags += ["--host", "127.0.0.1", "--port", str(ports.http), "--log-level", "warning"]
    flags += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.metrics)]
    return [str(home / "venv/bin/vllm-router"), *flags]


def quart_argv(home: Path, ports: Ports) -> list[str]:
    """As its own main does, on loopback and on free ports."""
    module = QUART_EXAMPLE.removesuffix(".py")
    code = (
        f"import sys; sys.path.insert(0, {str(home)!r}); import {module} as proxy; "
        f"proxy.start_service_discovery('127.0.0.1', {ports.discovery}); "
        f"proxy.app.run(host='127.0.0.1', port={ports.http})"
    )
    return [str(home / "venv/bin/python"), "-c", code]


def xpyd_argv(home: Path, ports: Ports) -> list[str]:
    config = {
        "model": "mock",
        "host": "127.0.0.1",
        "port": ports.http,
        "prefill": [f"127.0.0.1:{ports.prefill}"],
        "decode": [f"127.0.0.1:{ports.decode}"],
        "scheduling": "roundrobin",
    }
    path = home / "config.yaml"
    path.write_text(json.dumps(config))
    return [str(home / "venv/bin/xpyd"), "--config", str(path)]


def before(src: Path) -> Peer:
    """Ours from another source tree, to compare with."""
    return Peer("before", lambda home, ports: ["env", f"PYTHONPATH={src}", *twolane_argv(home, ports)], kind="twolane")


TWOLANE = Peer("twolane", twolane_argv, kind="twolane")
PEERS = (
    TWOLANE,
    Peer("vllm-router", router_argv, ("vllm-router==0.1.17",), kind="p2pnccl"),
    Peer(
        "vllm-quart-example",
        quart_argv,
        ("quart", "aiohttp", "msgpack", "pyzmq", "setuptools"),
        kind="p2pnccl",
        prepare=unpack_quart_example,
    ),
    Peer("xpyd-proxy", xpyd_argv, ("xpyd-proxy==1.8.0",)),
)
