"""Hosts made of network namespaces on one machine, joined by a bridge, with a Ray node on each.

A namespace is held by a process that ends with the test's, and ends with the last process in it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

import twolane
from tests.network.hosts import called_in

T = TypeVar("T")

SOURCE = Path(twolane.__file__).parent.parent
FAKE_VLLM = Path(__file__).parent.parent / "launch" / "fake_vllm"
NETWORK = "10.78.0"
RAY_PORT = 6399
STEP_S = 180.0
RAY_HERE = {
    **{"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"},  # it calls nobody
    "RAY_memory_monitor_refresh_ms": "0",  # each node takes the whole machine's memory for its own, and kills actors
}
HELD = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, configure_logging=False, logging_level="ERROR")
groups = ray.util.placement_group_table().values()
print(*(group["placement_group_id"] for group in groups if group["state"] != "REMOVED"))
print(*(name for name, actor in ray._private.state.actors().items() if actor["State"] != "DEAD"))
"""


def why_not() -> str:
    """Why hosts can't be made here; empty: they can."""
    if importlib.util.find_spec("ray") is None:
        return "needs Ray: pip install -e '.[ray]'"
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"needs root, for network namespaces: {tried.stderr.strip()}"


class Host:
    """One namespace with its address. Number 0 holds the bridge and has none."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.address = f"{NETWORK}.{number}"
        # In a session of its own: Ctrl+C is for the test, which needs it to find what to end.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self._holder.pid
        own = Path("/proc/thread-self/ns/net").readlink()
        deadline_s = time.monotonic() + STEP_S
        while Path(f"/proc/{self.pid}/ns/net").readlink() == own:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        self.run("ip", "link", "set", "lo", "up")

    def inside(self, *argv: str) -> list[str]:
        return ["nsenter", "--net", "-t", str(self.pid), *argv]

    def call(self, function: Callable[[], T]) -> T:
        """Calls it on this host; what it raises is raised here."""
        return called_in(f"/proc/{self.pid}/ns/net", function)

    def run(self, *argv: str, env: dict[str, str] | None = None, timeout_s: float = STEP_S) -> str:
        done = subprocess.run(
            self.inside(*argv), env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that run in it, but the one that holds it."""
        mine = Path(f"/proc/{self.pid}/ns/net").readlink()
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/net").readlink() == mine:
                    found.append(process)
            except OSError:
                continue
        return found

    def kill_all(self) -> None:
        for process in self.processes():
            with_pid = process.pid
            try:
                os.kill(with_pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        self.kill_all()
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdin:
            self._holder.stdin.close()


class Cluster:
    """Hosts with a Ray node of so many CPUs each. Commands run on the first, the head. `env`: for all of it."""

    def __init__(
        self, folder: Path, num_cpus: Sequence[int], *, real_engine: bool = False, env: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._ray_dirs: list[Path] = []
        path = [str(SOURCE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.env = {
            **os.environ,
            **RAY_HERE,
            "PYTHONPATH": os.pathsep.join(path if real_engine else [str(FAKE_VLLM), *path]),
            # beside the ports that Ray gives to its workers, and beside its client server's 10001
            **{"HTTP_PROXY_PORT": "26010", "PROXY_PORT": "26030", "COLUMNS": "80"},
            **(env or {}),
        }
        self.hosts: list[Host] = []
        self._switch = Host(0)
        try:
            self._switch.run("ip", "link", "add", "name", "lan", "type", "bridge")
            self._switch.run("ip", "link", "set", "lan", "up")
            for count in num_cpus:
                self.add_host(count)
        except BaseException:
            self.close()
            raise

    def add_host(self, num_cpus: int) -> Host:
        number = len(self.hosts) + 1
        self.hosts.append(self._plug_in(Host(number)))
        self.start_node(number, num_cpus)
        return self.hosts[-1]

    def cut(self, number: int) -> None:
        """Pulls its cable: nothing comes, nothing goes, and nobody is told."""
        self._switch.run("ip", "link", "set", f"p{number}", "down")

    def heal(self, number: int) -> None:
        self._switch.run("ip", "link", "set", f"p{number}", "up")

    def kill_node(self, number: int) -> None:
        """Returns when Ray knows, so that what comes next isn't about a node that dies just now."""
        self.hosts[number - 1].kill_all()
        deadline_s = time.monotonic() + STEP_S
        alive = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)\n"
        alive += "print(*(node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']))"
        while self.hosts[number - 1].address in self.python(alive):
            assert time.monotonic() < deadline_s

    def python(self, code: str) -> str:
        """Runs it on the head; its argument is Ray's address."""
        return self.hosts[0].run(sys.executable, "-c", code, self.address, env=self.env)

    def number_of(self, address: str) -> int:
        return next(host.number for host in self.hosts if host.address == address)

    def _plug_in(self, host: Host) -> Host:
        port = f"p{host.number}"
        self._switch.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._switch.run("ip", "link", "set", port, "master", "lan", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        return host

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{RAY_PORT}"

    def start_node(
        self, number: int, num_cpus: int, mount: str = "", program: Sequence[str] = ("-m", "ray.scripts.scripts")
    ) -> None:
        """`mount`: a shell command that changes what this node alone sees of the disk."""
        host = self.hosts[number - 1]
        self._ray_dirs.append(Path(tempfile.mkdtemp(prefix="ray-")))  # short: sockets lie in it
        words = ["start", f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}", "--disable-usage-stats"]
        words += [f"--temp-dir={self._ray_dirs[-1]}", "--object-store-memory=80000000"]
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--ray-client-server-port=9999"]
        words += head if number == 1 else [f"--address={self.address}"]
        python = [sys.executable]
        if mount:
            python = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
        for attempt in range(3):  # Ray gives up after 30 s, which no setting changes: too soon for a busy machine
            try:
                host.run(*python, *program, *words, env=self.env)
            except AssertionError:
                if number == 1:
                    host.kill_all()
                else:
                    self.kill_node(number)  # it may have told Ray of itself already
                if attempt == 2:
                    raise
            else:
                return

    def twolane(
        self, *words: str, timeout_s: float = 300.0, program: Sequence[str] = ("-m", "twolane.cli")
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.hosts[0].inside(sys.executable, *program, *words),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def instances(self) -> list[psutil.Process]:
        """vLLM's servers, on all hosts."""
        found: list[Any] = []
        for process in (process for host in self.hosts for process in host.processes()):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "vllm.entrypoints.openai.api_server" in words or any(word.endswith("/reaper.py") for word in words):
                found.append(process)
        return found

    def held(self) -> str:
        """What Ray holds for anybody: placement groups and actors."""
        return self.python(HELD).strip()

    def close(self) -> None:
        for host in [*self.hosts, self._switch]:
            host.close()
        for folder in self._ray_dirs:
            shutil.rmtree(folder, ignore_errors=True)
