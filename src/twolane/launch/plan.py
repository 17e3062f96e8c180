"""Pure: settings and what the machine has -> the services to run, with argv, environment and ports.

Ports count on by 10 from an instance to the next of its role: P is on 20003, 20013, ..., D on 20005, 20015, ...; KV
ports likewise (21001, 21011, ... and 22001, 22011, ...), of which an instance takes one a rank and may take eight.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from twolane.config import GpuGroups, Kv, Settings
from twolane.errors import ConfigError
from twolane.launch.configuration import flag
from twolane.launch.engine import engine_args, engine_env
from twolane.launch.gpus import assign_gpus, memory_share
from twolane.launch.kv import Place, kv_args, kv_config, kv_env
from twolane.launch.options import check_lanes

Role = Literal["proxy", "prefill", "decode"]
InstanceRole = Literal["prefill", "decode"]
Engine = Literal["cpu", "cuda"]

PORT_STEP = 10
RANKS_PER_INSTANCE = 8
PORT_VARIABLES = {
    "proxy": ("HTTP_PROXY_PORT", ""),
    "prefill": ("PREFILL_HTTP_PORT", "PREFILL_KV_PORT"),
    "decode": ("DECODE_HTTP_PORT", "DECODE_KV_PORT"),
}
UNPLACED = Place(host="")
# Of the proxy's own settings, those that `up` passes on; the others are for a proxy that stands alone.
PROXY_OPTIONS = (
    *("policy", "min_prefill_tokens", "max_prefill_queue", "max_in_flight", "max_queued", "queue_timeout"),
    *("power_csv", "power_every"),
    *("otlp_endpoint", "log_dir"),
)
ALONE_ONLY = ("discovery_host", "registration_secret_file", "api_key", "api_key_file", "upstream_api_key")


class Machine(msgspec.Struct, frozen=True):
    """What the plan needs to know of this machine."""

    engine: Engine
    python: str  # the interpreter that has TwoLane and the engine
    num_cpus: int
    gpus: tuple[int, ...] = ()
    gpu_uuids: dict[int, str] = {}


class ServedModel(msgspec.Struct, frozen=True):
    """A model as instances load it. `names`: what a request may call it, the preferred one first."""

    source: str  # a folder, or a hub's name for it
    names: tuple[str, ...]
    max_len: int | None = None  # the model's own limit, None if it doesn't say
    local: bool = True


class ServiceSpec(msgspec.Struct, frozen=True):
    """One child of the supervisor. `env` comes on top of the supervisor's own environment."""

    name: str
    role: Role
    argv: tuple[str, ...]
    env: dict[str, str]
    host: str
    http_port: int
    log: str
    kv_port: int | None = None
    gpus: tuple[int, ...] = ()  # one a tensor-parallel rank
    gpu_uuids: tuple[str, ...] = ()  # as many, or none if they aren't known

    @property
    def address(self) -> str:
        return f"{self.host}:{self.http_port}"


class Plan(msgspec.Struct, frozen=True):
    """All that the supervisor needs: it reads this from a file and asks nobody."""

    services: tuple[ServiceSpec, ...]
    model: ServedModel
    proxy_address: str
    discovery_port: int
    start_timeout_s: float
    kv: Kv = "twolane"
    restart_tries: int = 5
    restart_within_s: float = 600.0
    log_max_bytes: int = 100_000_000
    discovery_host: str = "127.0.0.1"
    secret_file: str = ""  # what all of it is encrypted with, where there are other machines
    settings: Settings = Settings()  # those of `up`: what is added later is started with the same

    @property
    def proxy_url(self) -> str:
        return f"http://{self.proxy_address}"

    @property
    def discovery_address(self) -> str:
        return f"{self.discovery_host}:{self.discovery_port}"

    def instances(self) -> list[ServiceSpec]:
        return [spec for spec in self.services if spec.role != "proxy"]

    def of_role(self, role: str) -> list[ServiceSpec]:
        return [spec for spec in self.services if spec.role == role]


def make_plan(settings: Settings, machine: Machine, model: ServedModel) -> Plan:
    """ConfigError if two services would need the same port, or if there are fewer GPUs than needed.

    With a Ray cluster instances get their GPUs and addresses when Ray has placed them.
    """
    if settings.ray:
        _check_ray(settings)
        prefill_gpus: GpuGroups = ((),) * settings.prefill
        decode_gpus: GpuGroups = ((),) * settings.decode
    else:
        prefill_gpus, decode_gpus = assign_gpus(settings, machine.engine, machine.gpus)
    place = UNPLACED if settings.ray else Place()
    services = [_proxy(settings, machine)]
    roles: tuple[tuple[InstanceRole, int, GpuGroups], ...] = (
        ("prefill", settings.prefill, prefill_gpus),
        ("decode", settings.decode, decode_gpus),
    )
    for role, count, groups in roles:
        names = [role] if count == 1 else [f"{role}-{i + 1}" for i in range(count)]
        for index, name in enumerate(names):
            services.append(
                make_instance(
                    settings, machine, model, role=role, index=index, name=name, gpus=groups[index], place=place
                )
            )
    plan = Plan(
        services=tuple(services),
        model=model,
        proxy_address=proxy_address(settings),
        discovery_port=settings.proxy_port,
        start_timeout_s=settings.timeout_seconds,
        kv=settings.kv,
        restart_tries=settings.restart_tries,
        restart_within_s=settings.restart_minutes * 60,
        log_max_bytes=settings.log_max_mb * 1_000_000,
        settings=settings,
    )
    check_plan(plan)
    return plan


def _check_ray(settings: Settings) -> None:
    if settings.kv != "twolane":
        raise ConfigError(f"--ray needs --kv twolane: vLLM's connector for {settings.kv} can't encrypt registrations")
    if settings.prefill_gpu or settings.decode_gpu:
        raise ConfigError(
            "with --ray it is Ray that gives GPUs out: leave PREFILL_GPU and DECODE_GPU out; several GPUs an "
            'instance: --vllm-args "--tensor-parallel-size 2"'
        )


def on_cluster(plan: Plan, host: str, networks: tuple[str, ...], secret_file: Path) -> Plan:
    """The plan for a driver at `host`: instances register there, from these networks, with the secret."""
    proxy, *instances = plan.services
    argv = [*proxy.argv, "--discovery-host", host, "--registration-secret-file", str(secret_file)]
    argv += [word for network in networks for word in ("--allow-network", network)]
    proxy = msgspec.structs.replace(proxy, argv=tuple(argv))
    return msgspec.structs.replace(
        plan, services=(proxy, *instances), discovery_host=host, secret_file=str(secret_file)
    )


def check_plan(plan: Plan) -> None:
    """ConfigError if two services would need the same port, or no KV could move."""
    _check_collisions(plan)
    if plan.kv == "twolane":
        check_lanes({spec.name: spec.argv for spec in plan.instances()})


def reachable(host: str) -> str:
    """The address to reach a server at that is bound to `host`."""
    return "127.0.0.1" if host in {"0.0.0.0", "::", "localhost"} else host  # noqa: S104 - compared, not bound


def proxy_address(settings: Settings) -> str:
    """Where clients on this machine ask."""
    return f"{reachable(settings.host)}:{settings.http_proxy_port}"


def _proxy(settings: Settings, machine: Machine) -> ServiceSpec:
    argv = [machine.python, "-m", "twolane.disagg_prefill_proxy_server", "--host", settings.host]
    argv += ["--http-port", str(settings.http_proxy_port), "--discovery-port", str(settings.proxy_port)]
    argv += [f"{flag(key)}={getattr(settings, key)}" for key in PROXY_OPTIONS if _is_changed(settings, key)]
    return ServiceSpec(
        name="proxy",
        role="proxy",
        argv=tuple(argv),
        env={"PYTHONUNBUFFERED": "1"},
        host=reachable(settings.host),
        http_port=settings.http_proxy_port,
        log=str(settings.log_dir / "proxy.log"),
    )


def _is_changed(settings: Settings, key: str) -> bool:
    return bool(getattr(settings, key) != getattr(Settings, key))


def make_instance(
    settings: Settings,
    machine: Machine,
    model: ServedModel,
    *,
    role: InstanceRole,
    index: int,
    name: str,
    gpus: tuple[int, ...],
    place: Place = Place(),  # noqa: B008 - frozen
) -> ServiceSpec:
    """Number `index` of its role, from 0: its ports count on from the settings'."""
    prefill = role == "prefill"
    http_port = (settings.prefill_http_port if prefill else settings.decode_http_port) + PORT_STEP * index
    kv_port = (settings.prefill_kv_port if prefill else settings.decode_kv_port) + PORT_STEP * index
    argv = [machine.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model.source]
    argv += ["--served-model-name", *model.names, "--host", place.host, "--port", str(http_port)]
    argv += ["--kv-transfer-config", json.dumps(kv_config(settings, role, name, http_port, kv_port, place))]
    if len(gpus) > 1:
        argv += ["--tensor-parallel-size", str(len(gpus))]
    if share := memory_share(settings, gpus):
        argv += ["--gpu-memory-utilization", share]
    given = [*settings.vllm_args, *(settings.prefill_args if prefill else settings.decode_args)]
    argv += [*engine_args(settings, machine, model, role, given), *kv_args(settings, role, given), *given]
    return ServiceSpec(
        name=name,
        role=role,
        argv=tuple(argv),
        env=engine_env(settings, machine, model, gpus) | kv_env(settings.kv, kv_port),
        host=place.host,
        http_port=http_port,
        kv_port=kv_port,
        gpus=gpus,
        gpu_uuids=tuple(machine.gpu_uuids[gpu] for gpu in gpus if gpu in machine.gpu_uuids),
        log=str(Path(place.log_dir or settings.log_dir) / f"{name}.log"),
    )


class PortUse(NamedTuple):
    """`num_ports` from `port` on, of the service of that name. `variable` moves it."""

    service: str
    whose: str
    port: int
    num_ports: int
    host: str
    variable: str


def ports_of(plan: Plan) -> list[PortUse]:
    uses = [PortUse("proxy", "the proxy's discovery port", plan.discovery_port, 1, plan.discovery_host, "PROXY_PORT")]
    for spec in plan.services:
        http, kv = PORT_VARIABLES[spec.role]
        uses.append(PortUse(spec.name, f"{spec.name}'s HTTP port", spec.http_port, 1, spec.host, http))
        if spec.kv_port is not None:
            whose = f"{spec.name}'s KV port"
            uses.append(PortUse(spec.name, whose, spec.kv_port, RANKS_PER_INSTANCE, spec.host, kv))
    return uses


def _check_collisions(plan: Plan) -> None:
    if not plan.discovery_port or not plan.services[0].http_port:
        raise ConfigError("HTTP_PROXY_PORT and PROXY_PORT can't be 0 here: others must know them")
    uses = ports_of(plan)
    for a, b in itertools.combinations(uses, 2):
        if a.port < b.port + b.num_ports and b.port < a.port + a.num_ports:
            raise ConfigError(
                f"{a.whose} {a.port} and {b.whose} {b.port} are too close (a KV port takes {RANKS_PER_INSTANCE}): "
                "move one"
            )
    if highest := [use.whose for use in uses if use.port + use.num_ports > 65536]:
        raise ConfigError(f"{highest[0]} would lie above 65535: start lower")


def plan_file(state_path: Path) -> Path:
    return state_path.with_name("plan.json")


def save_plan(plan: Plan, path: Path) -> None:
    """Readers see the old or the new, never a part."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(plan, enc_hook=str)))
    fresh.replace(path)


def load_plan(path: Path) -> Plan:
    return msgspec.json.decode(path.read_bytes(), type=Plan, dec_hook=lambda kind, value: kind(value))
