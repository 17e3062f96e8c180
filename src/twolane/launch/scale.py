"""Pure: a plan with other numbers of instances. What runs stays as it is; the highest numbers go first, the lowest free
ones come next.

Names stay: an instance that was alone is called `prefill`, and keeps that name when `prefill-2` comes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import msgspec

from twolane.config import MAX_INSTANCES
from twolane.errors import ConfigError
from twolane.launch.plan import UNPLACED, InstanceRole, Machine, Plan, ServiceSpec, check_plan, make_instance

ROLES: tuple[InstanceRole, ...] = get_args(InstanceRole)


def index_of(name: str) -> int:
    """From 0. The one without a number is the first."""
    number = name.rpartition("-")[2]
    return int(number) - 1 if number.isdigit() else 0


def in_order(spec: ServiceSpec) -> tuple[int, int]:
    """Key of the order in which services are listed."""
    return ("proxy", *ROLES).index(spec.role), index_of(spec.name)


def scaled(plan: Plan, machine: Machine, prefill: int | None, decode: int | None) -> Plan:
    """With so many instances of each role (None: as many as there are). ConfigError says what is in the way."""
    counts = {"prefill": prefill, "decode": decode}
    wanted = {role: check_count(role, count) or len(plan.of_role(role)) for role, count in counts.items()}
    kept: list[ServiceSpec] = [*plan.of_role("proxy")]
    for role in ROLES:
        kept += sorted(plan.of_role(role), key=in_order)[: wanted[role]]
    if plan.kv == "p2pnccl" and len(kept) < len(plan.services):
        raise ConfigError(
            "--kv p2pnccl: its instances can't say that they leave, so requests would be lost: "
            "`twolane down`, then `twolane up` with fewer"
        )
    added: list[ServiceSpec] = []
    for role in ROLES:
        taken = {index_of(spec.name) for spec in kept if spec.role == role}
        numbers = [index for index in range(wanted[role]) if index not in taken]
        for index in numbers[: wanted[role] - len(taken)]:
            added.append(_added(plan, machine, wanted, role, index, [*kept, *added]))
    changed = msgspec.structs.replace(plan, services=tuple(sorted([*kept, *added], key=in_order)))
    check_plan(changed)
    return changed


def check_count(role: str, count: int | None) -> int | None:
    if count is not None and count < 1:
        remedy = "decode instances would compute the prompts" if role == "prefill" else "nobody would answer"
        raise ConfigError(f"--{role} {count}: one has to stay, or {remedy}; `twolane down` stops everything")
    if count is not None and count > MAX_INSTANCES:
        raise ConfigError(f"--{role} {count}: there can be {MAX_INSTANCES} instances of a role at most")
    return count


def _added(
    plan: Plan, machine: Machine, wanted: dict[str, int], role: InstanceRole, index: int, others: list[ServiceSpec]
) -> ServiceSpec:
    settings = replace(plan.settings, prefill=wanted["prefill"], decode=wanted["decode"])
    name = f"{role}-{index + 1}"
    given = (settings, machine, plan.model)
    if settings.ray:
        return make_instance(*given, role=role, index=index, name=name, gpus=(), place=UNPLACED)
    gpus = _gpus_for(plan, machine, role, index, name, others)
    return make_instance(*given, role=role, index=index, name=name, gpus=gpus)


def _gpus_for(
    plan: Plan, machine: Machine, role: InstanceRole, index: int, name: str, others: list[ServiceSpec]
) -> tuple[int, ...]:
    """Those that the settings name for this instance, else the first that nobody has; as many as its lane's others."""
    if machine.engine == "cpu":
        return ()
    named = plan.settings.prefill_gpu if role == "prefill" else plan.settings.decode_gpu
    if index < len(named):
        return named[index]
    width = max(1, len(plan.of_role(role)[0].gpus))
    taken = {gpu: spec.name for spec in others for gpu in spec.gpus}
    free = [gpu for gpu in machine.gpus if gpu not in taken]
    if len(free) < width:
        holders = ", ".join(f"{gpu} ({who})" for gpu, who in sorted(taken.items()))
        raise ConfigError(
            f"{name} needs {'a GPU' if width == 1 else f'{width} GPUs'}, but {len(free)} are free; taken: {holders}. "
            "Ask for fewer, or let some share a GPU: `twolane down`, then `up` with PREFILL_GPU and DECODE_GPU"
        )
    return tuple(free[:width])
