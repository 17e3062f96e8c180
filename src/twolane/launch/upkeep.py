"""What the supervisor does beside starting and stopping: wishes, registrations on behalf of instances."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from twolane.launch.phases import DRAINING, READY, REGISTERING
from twolane.launch.plan import Plan
from twolane.launch.registrar import Registrar, make_registrar
from twolane.launch.service import Service

REGISTER_TICK_S = 0.2
SERVING = {REGISTERING, READY, DRAINING}


class Wish(msgspec.Struct, frozen=True):
    """What a command wants of the supervisor: services started again, or another plan."""

    id: str
    drain_s: float
    restart: tuple[str, ...] = ()
    target: Plan | None = None


def wish_file(state_path: Path) -> Path:
    """The command writes it, the supervisor removes it."""
    return state_path.with_name("wish.json")


def leave_wish(wish: Wish, state_path: Path) -> None:
    path = wish_file(state_path)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(wish, enc_hook=str))
    fresh.replace(path)


def take_wish(state_path: Path) -> Wish | None:
    """None if there is none, or none that this version understands."""
    path = wish_file(state_path)
    try:
        data = path.read_bytes()
        path.unlink()
        return msgspec.json.decode(data, type=Wish, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.MsgspecError):
        return None


async def register(plan: Plan, services: Sequence[Service]) -> None:
    """For instances whose connector doesn't tell all; `services` may change meanwhile. Returns if there are none."""
    registrars: dict[int, Registrar] = {}  # by pid: each life of an instance has its own
    try:
        while plan.kv != "twolane":
            serving = {s.state.pid: s for s in services if s.state.phase in SERVING and s.is_instance}
            for pid in registrars.keys() - serving.keys():
                registrars.pop(pid).close()
            for pid, service in serving.items():
                if pid not in registrars and (made := make_registrar(plan, service.spec)):
                    registrars[pid] = made
                registrars[pid].tick()
            await asyncio.sleep(REGISTER_TICK_S)
    finally:
        for registrar in registrars.values():
            registrar.close()
