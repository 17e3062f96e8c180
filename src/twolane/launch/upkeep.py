"""What the supervisor does beside starting and stopping: wishes, registrations on behalf of instances."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from twolane.launch.phases import DRAINING, READY, REGISTERING, RESTARTING
from twolane.launch.plan import Plan
from twolane.launch.registrar import make_registrar
from twolane.launch.service import Service

REGISTER_TICK_S = 0.2


def wishes_file(state_path: Path) -> Path:
    """Names of services that a command wants started again. The command writes it, the supervisor removes it."""
    return state_path.with_name("restart")


def take_wishes(state_path: Path, services: Sequence[Service]) -> None:
    """Called on SIGHUP."""
    path = wishes_file(state_path)
    try:
        names = path.read_text().split()
        path.unlink()
    except OSError:
        return
    for service in services:
        if service.spec.name in names:
            service.restart_wanted.set()


async def register(plan: Plan, services: Sequence[Service]) -> None:
    """For instances whose connector doesn't tell all. Returns at once if there are none."""
    made = [(service, make_registrar(plan, service.spec)) for service in services]
    mine = [(service, registrar) for service, registrar in made if registrar is not None]
    try:
        while mine:
            for service, registrar in mine:
                if service.state.phase in {REGISTERING, READY, DRAINING}:
                    registrar.tick()
                elif service.state.phase == RESTARTING:
                    registrar.renew()
            await asyncio.sleep(REGISTER_TICK_S)
    finally:
        for _, registrar in mine:
            registrar.close()
