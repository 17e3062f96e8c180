"""What is compared: the two lanes as `up` would run them, and as many plain instances of vLLM in their places.

Both stand behind the same proxy, on the same GPUs (without GPUs: with as many threads), so that only the division into
prefill and decode differs. Pure but for the search of free ports.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from twolane.bench.sweep import SIDES, Side
from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.doctor import Finding, examine
from twolane.launch.engine import CPU_MAX_MODEL_LEN, without_lane
from twolane.launch.facts import Facts
from twolane.launch.options import option
from twolane.launch.plan import PORT_STEP, Machine, Plan, ServedModel, ServiceSpec, make_plan
from twolane.launch.ports import taken_ports

PORTS = range(13_000, 32_000, PORT_STEP)  # below those that the system gives to outgoing connections
TRIES = 200
SHORT_OF = ("GPU memory", "model size", "memory", "shared memory")  # findings of the doctor that forbid a start


def side_settings(settings: Settings, folder: Path, side: Side, base: int) -> Settings:
    """The same settings with ports from `base` on, and logs and state of its own."""
    most, x, y = max(settings.prefill, settings.decode), settings.prefill, settings.decode
    prefill_kv = base + PORT_STEP * (most + 1)
    assert prefill_kv + PORT_STEP * (x + y) <= base + num_ports(settings)
    return replace(
        settings,
        http_proxy_port=base,
        proxy_port=base + 1,
        prefill_http_port=base + 2,
        decode_http_port=base + 3,
        prefill_kv_port=prefill_kv,
        decode_kv_port=prefill_kv + PORT_STEP * x,
        host="127.0.0.1",
        power_csv=None,  # the comparison records it itself
        log_dir=folder / "logs" / side,
        state_dir=folder / "state" / side,
    )


def num_ports(settings: Settings) -> int:
    """Of one side, with room for the ranks' ports."""
    return PORT_STEP * (max(settings.prefill, settings.decode) + settings.prefill + settings.decode + 2)


def side_plan(side: Side, settings: Settings, args: tuple[str, ...], machine: Machine, model: ServedModel) -> Plan:
    """`args`: more vLLM options for plain instances. Nothing is started again: that would be measured as slowness."""
    if side == "lanes":
        return msgspec.structs.replace(make_plan(settings, machine, model), restart_tries=0)
    plain = replace(settings, prefill_args=args, decode_args=args, kv="nixl")  # the supervisor registers these
    plan = make_plan(plain, machine, model)
    instances = [
        renamed(without_connector(spec), f"instance-{number}") for number, spec in enumerate(plan.instances(), 1)
    ]
    return msgspec.structs.replace(plan, services=(plan.services[0], *instances), restart_tries=0)


def without_connector(spec: ServiceSpec) -> ServiceSpec:
    """An instance as vLLM is without us. The proxy is told that it decodes, and so computes prompts by itself."""
    if spec.role == "proxy":
        return spec
    return msgspec.structs.replace(spec, argv=without_lane(spec.argv), role="decode")


def renamed(spec: ServiceSpec, name: str) -> ServiceSpec:
    return msgspec.structs.replace(spec, name=name, log=str(Path(spec.log).with_name(f"{name}.log")))


def both_plans(
    settings: Settings, args: tuple[str, ...], folder: Path, machine: Machine, model: ServedModel
) -> dict[Side, tuple[Settings, Plan]]:
    """On ports that are free now. ConfigError if none are found, or if the settings can't be planned."""
    span = num_ports(settings)
    for base in _bases(span):
        given = {side: side_settings(settings, folder, side, base + i * span) for i, side in enumerate(SIDES)}
        plans = {side: (mine, side_plan(side, mine, args, machine, model)) for side, mine in given.items()}
        if not any(taken_ports(plan) for _, plan in plans.values()):
            return plans
    raise ConfigError(f"no {2 * span} free ports in a row between {PORTS[0]} and {PORTS[-1]}: end what takes them")


def _bases(span: int) -> Iterator[int]:
    for _ in range(TRIES):
        base = random.choice(PORTS)  # noqa: S311 - two runs at once should look in different places, no more
        if base + 2 * span < PORTS[-1]:
            yield base


def merged(plans: list[Plan]) -> Plan:
    """As if all were one, for whoever adds up what they need."""
    return msgspec.structs.replace(plans[0], services=tuple(spec for plan in plans for spec in plan.services))


def short_of(facts: Facts) -> list[Finding]:
    """What there isn't enough of for the facts' plan."""
    return [finding for finding in examine(facts) if finding.level == "error" and finding.name in SHORT_OF]


def check_room(findings: list[Finding]) -> None:
    """ConfigError with a remedy if one side alone can't be started."""
    if findings:
        first = findings[0]
        raise ConfigError(f"{first.text}: {first.remedy}; `twolane down` stops what `twolane up` runs in this folder")


def check_length(plan: Plan, machine: Machine, model: ServedModel, num_tokens: int) -> None:
    """ConfigError if prompt and answer don't fit into what an instance takes."""
    given = [option(spec.argv, "--max-model-len") for spec in plan.instances()]
    longest = [int(text) for text in given if text and text.isdigit()]
    longest += [model.max_len] if model.max_len else []
    longest += [CPU_MAX_MODEL_LEN] if machine.engine == "cpu" and not longest else []
    if longest and num_tokens > min(longest):
        raise ConfigError(
            f"--input-len and --output-len together are {num_tokens} tokens, an instance takes {min(longest)}: ask for "
            "less, or raise --max-model-len"
        )
