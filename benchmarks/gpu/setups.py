"""Setups -> plans of TwoLane's launcher. Pure.

A setup is one way to serve: a pair with one of TwoLane's transports or with one of vLLM's connectors, one instance, or
two behind the proxy. Its ports count from a base of its own, so that several can live at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
from benchmarks.gpu.options import Options

from twolane.bench.lanes import without_connector
from twolane.config import Kv, Settings
from twolane.errors import ConfigError
from twolane.launch.engine import CAPTURE
from twolane.launch.kv import check_kv
from twolane.launch.plan import Machine, Plan, ServedModel, ServiceSpec, make_plan

Kind = Literal["twolane", "nixl", "p2pnccl", "plain", "aggregated"]
TRANSPORTS = ("auto", "cuda_ipc", "nccl", "shm", "tcp")
KINDS: dict[str, Kind] = {
    **dict.fromkeys(TRANSPORTS, "twolane"),
    "nixl": "nixl",
    "p2pnccl": "p2pnccl",
    "plain": "plain",
    "plain_graphs": "plain",
    "aggregated": "aggregated",
}
PORTS_A_SETUP = 40
BATCH = ("--max-num-batched-tokens", "8192")


@dataclass(frozen=True)
class Setup:
    """`extra`: more keys of `kv_connector_extra_config`."""

    name: str
    kind: Kind
    transport: str = ""
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def hands_over(self) -> bool:
        return self.kind in ("twolane", "nixl", "p2pnccl")


@dataclass(frozen=True)
class Route:
    """One way to ask. `baseline`: the route whose TTFT its own is held against; empty: it is one."""

    name: str
    setup: str
    address: str
    baseline: str = ""


def parse_setup(name: str) -> Setup:
    """`NAME` or `NAME@KEY=VALUE@KEY=VALUE`. ConfigError if there is no such setup."""
    word, *pairs = name.split("@")
    if word not in KINDS:
        raise ConfigError(f"--setups {name}: there is no such setup; known are {', '.join(KINDS)}")
    if pairs and KINDS[word] != "twolane":
        raise ConfigError(f"--setups {name}: only TwoLane's own connector takes these keys")
    extra = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    return Setup(name, KINDS[word], word if word in TRANSPORTS else "", extra)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def why_not(setup: Setup, options: Options, machine: Machine, vllm: Path | None) -> str:
    """Why this machine can't do it; empty if nothing is known against it. `vllm`: where its package lies."""
    if machine.engine == "cpu" and setup.transport in ("cuda_ipc", "nccl"):
        return "needs GPUs"
    shared = bool(gpus_of(options.prefill_gpu) & gpus_of(options.decode_gpu))
    if shared and (setup.transport == "nccl" or setup.kind == "p2pnccl"):
        return "NCCL takes no two ranks on one GPU"
    if setup.hands_over:
        try:
            check_kv(kv_of(setup), machine.engine, vllm)
        except ConfigError as error:
            return str(error)
    return ""


def gpus_of(groups: tuple[tuple[int, ...], ...]) -> set[int]:
    return {gpu for group in groups for gpu in group}


def kv_of(setup: Setup) -> Kv:
    """Instances without a connector are registered by the supervisor, as it does for those of NixlConnector."""
    return setup.kind if setup.kind in ("twolane", "p2pnccl") else "nixl"


def max_model_len(options: Options) -> int:
    return options.longest + max(options.output, options.output_alone or 0) + 64


def settings_of(setup: Setup, options: Options, machine: Machine, index: int, memory_args: tuple[str, ...]) -> Settings:
    """`index`: of the setup among those that live at once. `memory_args`: vLLM's options."""
    base = options.port_base + PORTS_A_SETUP * index
    vllm_args = options.vllm_args if options.vllm_args is not None else BATCH if machine.engine == "cuda" else ()
    return Settings(
        model=options.model,
        prefill_gpu=options.prefill_gpu,
        decode_gpu=options.decode_gpu,
        http_proxy_port=base,
        proxy_port=base + 1,
        prefill_http_port=base + 2,
        decode_http_port=base + 3,
        prefill_kv_port=base + 10,
        decode_kv_port=base + 20,
        kv=kv_of(setup),
        max_model_len=max_model_len(options),
        vllm_args=("--no-enable-prefix-caching", *vllm_args, *memory_args),
        prefill_args=options.prefill_args if setup.hands_over else options.decode_args,
        decode_args=options.decode_args,
        log_dir=options.out / "logs" / setup.name,
        state_dir=options.out / "state" / setup.name,
    )


def plan_of(setup: Setup, options: Options, settings: Settings, machine: Machine, model: ServedModel) -> Plan:
    """What the supervisor runs for it. Nothing is started again: a restart would be measured as a slow request."""
    plan = msgspec.structs.replace(make_plan(settings, machine, model), restart_tries=0)
    services = list(plan.services)
    if setup.kind == "plain":
        services = [spec for spec in services if spec.role != "prefill"]
    if not setup.hands_over:
        services = [without_connector(spec) for spec in services]
    if setup.name == "plain_graphs":
        services = [with_args(spec, *CAPTURE) for spec in services]
    if setup.kind == "twolane":
        services = [with_extra(spec, _extra(setup, options, spec)) for spec in services]
    return msgspec.structs.replace(plan, services=tuple(services))


def starting_at_once(plan: Plan, options: Options, setup: Setup, machine: Machine, num_instances: int) -> Plan:
    """For instances that start at the same time on this machine's GPUs, `num_instances` in all.

    Each compiles for itself, into a folder of its own: vLLM's cache has a file (vllm_compile_cache.py) that isn't
    written in one piece, and whoever starts late would find it while others write it. Inductor's default is as many
    compiling processes as there are cores, an instance. No GPU in the plan: no turns are taken.
    """
    if machine.engine == "cpu":
        return plan
    threads = str(max(1, machine.num_cpus // num_instances))

    def alone(spec: ServiceSpec) -> ServiceSpec:
        if spec.role == "proxy":
            return spec
        cache = str((options.out / "cache" / f"{setup.name}-{spec.name}").absolute())
        env = spec.env | {"VLLM_CACHE_ROOT": cache, "TORCHINDUCTOR_COMPILE_THREADS": threads}
        return msgspec.structs.replace(spec, env=env, gpus=())

    return msgspec.structs.replace(plan, services=tuple(alone(spec) for spec in plan.services))


def _extra(setup: Setup, options: Options, spec: ServiceSpec) -> dict[str, object]:
    extra = dict(setup.extra)
    if setup.transport != "auto":
        extra["transport"] = setup.transport
    if options.trace:
        extra["trace_file"] = str(trace_file(options, setup, spec.role).absolute())
    return extra


def trace_file(options: Options, setup: Setup, role: str) -> Path:
    """Workers put side, rank and an ending behind it."""
    return options.out / "traces" / f"{setup.name}-{role}"


def with_extra(spec: ServiceSpec, extra: dict[str, object]) -> ServiceSpec:
    """The same instance with more keys in `kv_connector_extra_config`."""
    if spec.role == "proxy":
        return spec
    at = spec.argv.index("--kv-transfer-config") + 1
    config = json.loads(spec.argv[at])
    config["kv_connector_extra_config"].update(extra)
    return msgspec.structs.replace(spec, argv=(*spec.argv[:at], json.dumps(config), *spec.argv[at + 1 :]))


def with_args(spec: ServiceSpec, *args: str) -> ServiceSpec:
    return spec if spec.role == "proxy" else msgspec.structs.replace(spec, argv=(*spec.argv, *args))


def routes_of(setup: Setup, plan: Plan) -> list[Route]:
    """How a setup is asked: a pair through the proxy and its D alone, which is its baseline."""
    decode = next(spec for spec in plan.services if spec.role == "decode")
    if setup.kind == "plain":
        return [Route(setup.name, setup.name, decode.address)]
    if setup.kind == "aggregated":
        return [Route(setup.name, setup.name, plan.proxy_address)]
    return pair_routes(setup, plan.proxy_address, decode.address)


def pair_routes(setup: Setup, proxy: str, decode: str) -> list[Route]:
    through = Route(setup.name, setup.name, proxy, baseline=f"{setup.name}: D alone")
    if setup.kind == "p2pnccl":  # its D understands no request without both addresses
        return [Route(setup.name, setup.name, proxy)]
    return [through, Route(through.baseline, setup.name, decode)]
