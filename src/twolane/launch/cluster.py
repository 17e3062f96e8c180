"""Instances on a Ray cluster: the driver's side. Everything of Ray that TwoLane uses is here and in actor.py.

The supervisor is the driver. Each instance is an actor with a placement group of its own on one node. Neither is
detached: when the driver is gone, Ray ends them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from twolane.addresses import split_address
from twolane.errors import ConfigError, StartError
from twolane.launch import logwriter
from twolane.launch.actor import InstanceActor, NodeFacts, Order, Report, node_facts
from twolane.launch.nodes import Node, check_nodes, check_room, need_of, target
from twolane.launch.phases import IMPORTING, READY, SILENT
from twolane.launch.plan import Plan, ServedModel, ServiceSpec
from twolane.launch.scale import index_of
from twolane.launch.service import Service, ServiceError

CONNECT_S = 5.0
SURVEY_S = 60.0
REPORT_EVERY_S = 0.3
REPORT_S = 10.0  # for one answer of an actor
PLACING = "placing"
LOST = -1000  # in place of an exit code: its actor or node is gone


def connect(address: str) -> Any:
    """The module `ray`, connected. ConfigError names what is in the way."""
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            "--ray needs Ray beside TwoLane, here and on every node: pip install 'twolane[ray]'"
        ) from None
    if address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigError(f"--ray {address}: no Ray runs on this machine: `ray start --head` starts one") from error
    except (RuntimeError, ValueError, OSError) as error:
        words = " ".join(str(error).split())
        remedy = (
            "install the same Ray and Python on all nodes"
            if "mismatch" in words
            else (f"this machine has to be a node of that cluster: `ray start --address={address}` makes it one")
        )
        raise ConfigError(f"--ray {address}: can't join the cluster: {words}: {remedy}") from error
    return ray


def _check_answers(address: str) -> None:
    try:
        host, port = split_address(address)
        socket.create_connection((host, port), CONNECT_S).close()
    except ValueError as error:
        raise ConfigError(f"--ray {address}: neither `auto` nor host:port, such as 10.0.0.1:6379") from error
    except OSError as error:
        raise ConfigError(
            f"--ray {address}: no Ray answers there ({error}): `ray start --head` on that machine starts one, and "
            "its output names the address"
        ) from error


def survey(plan: Plan) -> tuple[str, list[Node]]:
    """Before a start: this machine's address in the cluster and its nodes. ConfigError for what would fail later.

    Connects and disconnects.
    """
    ray = connect(plan.settings.ray)
    try:
        nodes = _ask_nodes(ray, plan.model)
        check_nodes(nodes, plan.model)
        check_room(nodes, [need_of(spec) for spec in plan.instances()])
        return str(ray.util.get_node_ip_address()), nodes
    finally:
        ray.shutdown()


def _ask_nodes(ray: Any, model: ServedModel) -> list[Node]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    free = _free(ray)
    asked = ray.remote(num_cpus=0)(node_facts)
    model_path = model.source if model.local else None
    refs = {
        entry["NodeID"]: (
            entry["NodeManagerAddress"],
            asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)).remote(
                entry["NodeManagerAddress"], model_path
            ),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    }
    nodes = []
    until_s = time.monotonic() + SURVEY_S
    for node_id, (host, ref) in refs.items():
        try:
            facts = msgspec.convert(ray.get(ref, timeout=max(0.1, until_s - time.monotonic())), NodeFacts)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.TaskUnschedulableError) as error:
            raise ConfigError(
                f"node {host} doesn't answer, for {SURVEY_S:g} s or any more: see whether it runs and the network "
                "reaches it, or wait until Ray holds it for dead (`ray status`)"
            ) from error
        except (ray.exceptions.RayError, msgspec.ValidationError, ImportError) as error:
            words = " ".join(str(error).split())[-300:]
            raise ConfigError(
                f"node {host} can't run TwoLane ({words}): install the same TwoLane, Ray and Python there as here"
            ) from error
        nodes.append(Node(node_id, facts, free.get(node_id, {})))
    return nodes


def _free(ray: Any) -> dict[str, dict[str, float]]:
    """By node: what nobody has taken. Ray's public call knows the cluster's sum only."""
    return dict(ray._private.state.available_resources_per_node())


class Cluster:
    """The supervisor's connection. Owns it; the services own their actors."""

    def __init__(self, plan: Plan) -> None:
        """Connects. Blocks."""
        try:
            self.ray = connect(plan.settings.ray)
        except ConfigError as error:
            raise StartError(str(error)) from error
        self._plan = plan
        self._secret = Path(plan.secret_file).read_text().strip()
        hosts = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in self.ray.nodes() if entry["Alive"]}
        free = {node_id: free for node_id, free in _free(self.ray).items() if node_id in hosts}
        self._target = target(free, [need_of(spec) for spec in plan.instances()])

    def service(self, spec: ServiceSpec) -> Service:
        return Service(spec) if spec.role == "proxy" else RemoteService(spec, self)

    def order(self, spec: ServiceSpec) -> Order:
        plan = self._plan
        assert spec.role != "proxy"
        return Order(
            settings=plan.settings,
            model=plan.model,
            role=spec.role,
            index=index_of(spec.name),
            name=spec.name,
            discovery_host=plan.discovery_host,
            secret=self._secret,
            log_max_bytes=plan.log_max_bytes,
        )

    def place(self, spec: ServiceSpec) -> tuple[Any, Any]:
        """A placement group and an actor in it, both of which Ray makes when it can. Doesn't wait.

        All aim at one node (NVLink beats the network); Ray takes another where that has no room.
        """
        from ray.util.placement_group import placement_group  # noqa: PLC0415
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: PLC0415

        need = need_of(spec)
        alive = {entry["NodeID"] for entry in self.ray.nodes() if entry["Alive"]}
        aim = self._target if self._target in alive else None
        group = placement_group([need], strategy="STRICT_PACK", _soft_target_node_id=aim)
        options = {
            "num_cpus": need["CPU"],
            "num_gpus": need.get("GPU", 0),
            "max_restarts": -1,  # the supervisor gives it up, by the same rule as on one machine
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
        }
        return group, self.ray.remote(InstanceActor).options(**options).remote(self.order(spec))

    def is_alive(self, node_id: str) -> bool:
        """As far as Ray knows, which takes its time to find out (a minute, as it comes)."""
        return any(entry["NodeID"] == node_id and entry["Alive"] for entry in self.ray.nodes())

    def remove(self, group: Any, actor: Any) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(actor, no_restart=True)
        self.ray.util.remove_placement_group(group)


class RemoteService(Service):
    """An instance in an actor. A thread asks the actor how it is, and writes its log into ours."""

    def __init__(self, spec: ServiceSpec, cluster: Cluster) -> None:
        super().__init__(spec)
        self._cluster = cluster
        self._placed: tuple[Any, Any] | None = None  # placement group, actor
        self._life = ""  # the one that is watched; empty: the next one
        self._last_life = ""
        self._node_id = ""
        self._num_heard = 0  # characters of this life's log
        self._ended: int | None = None
        self._problem = ""
        self._watching: threading.Thread | None = None

    def start(self, temp_dir: Path, log_max_bytes: int) -> None:  # noqa: ARG002 - the actor has its own
        path = Path(self.spec.log)
        path.parent.mkdir(parents=True, exist_ok=True)
        logwriter.rotate(str(path))
        path.touch()
        self._follow(path)
        self.is_placed = False
        self._last_life, self._life, self._ended, self._problem = self._life, "", None, ""
        if self._placed is None:
            self._placed = self._cluster.place(self.spec)
            self._watching = threading.Thread(target=self._watch, args=(self._placed,), daemon=True)
            self._watching.start()
        self.state.members = []
        self.enter(PLACING)

    def look(self) -> None:
        """Its processes are the actor's."""

    def exit_code(self) -> int | None:
        if self._ended is not None and self._ended != self.state.exit_code:
            self.state.exit_code, self.changed = self._ended, True
        return self._ended

    def ending(self) -> str:
        return "lost, with its actor or its node" if self._ended == LOST else super().ending()

    def error(self, what: str) -> ServiceError:
        return ServiceError(f"{self.spec.name} {self._problem}", []) if self._problem else super().error(what)

    def clear(self, term_wait_s: float, *, for_good: bool) -> str:
        """Ray starts again what ended by itself."""
        return self.stop(term_wait_s) if for_good else "left to Ray"

    def stop(self, term_wait_s: float) -> str:
        with self._stopping:
            placed, self._placed = self._placed, None
            if placed is None:
                return "was not started"
            ray, how = self._cluster.ray, "was gone"
            if self._life and self._ended is None:
                how = "was out of reach: Ray ends it"
                if self.state.phase != SILENT:
                    with contextlib.suppress(ray.exceptions.RayError):
                        how = str(ray.get(placed[1].stop.remote(term_wait_s), timeout=term_wait_s + REPORT_S))
            self._cluster.remove(*placed)
            self._ended = LOST if self._ended is None else self._ended
            return how

    def _watch(self, placed: tuple[Any, Any]) -> None:
        """Until the actor is given back. One question at a time: of those that wait for a network only one is left."""
        ray, asked = self._cluster.ray, None
        while self._placed is placed:
            if self._ended is None:
                asked = asked or placed[1].report.remote(self._life, self._num_heard)
                try:
                    answer, asked = ray.get(asked, timeout=REPORT_S), None
                    if self._placed is placed:
                        self._heard(msgspec.convert(answer, Report))
                except ray.exceptions.GetTimeoutError:
                    self._no_answer(placed)  # or not placed yet
                except ray.exceptions.ActorUnavailableError:
                    asked = None  # the network, or its end: the next answer tells
                    self._no_answer(placed)
                except ray.exceptions.RayError:
                    asked = None
                    self._ended = LOST if self._life else None
            time.sleep(REPORT_EVERY_S)

    def _no_answer(self, placed: tuple[Any, Any]) -> None:
        """It ends with its node, about whose end Ray decides. Until then it may be heard again."""
        if self._placed is not placed:
            return
        if self._life and not self._cluster.is_alive(self._node_id):
            self._ended = LOST
        elif self.state.phase == READY:
            self.enter(SILENT)

    def _heard(self, report: Report) -> None:
        if report.life == self._last_life:
            return  # it ends just now
        if self._life and report.life != self._life:
            self._ended = LOST
            return
        if not self._life:
            self._life, self._node_id, self._num_heard = report.life, report.node_id, 0
            self.spec = msgspec.structs.replace(self.spec, host=report.node, gpus=report.gpus)
            state = self.state
            state.host, state.node, state.gpus, state.pid = report.node, report.node, report.gpus, report.pid
            self.enter(IMPORTING)
            self.is_placed = True
        elif self.state.phase == SILENT:
            self.enter(READY)
        if report.log:
            with Path(self.spec.log).open("a") as log:
                log.write(report.log)
            self._num_heard += len(report.log)
        self._problem = report.problem
        self._ended = 1 if report.problem else report.exit_code
