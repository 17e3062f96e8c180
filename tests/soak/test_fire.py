"""What is killed and stopped: real small processes in place of instances."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from benchmarks.soak.fire import Fire
from benchmarks.soak.phases import Fault
from benchmarks.soak.service import Service

from tests.launch.test_process import wait_for
from twolane.launch.process import identify
from twolane.launch.state import ServiceState


class Instances:
    """Stands in for a service with so many D."""

    def __init__(self, count: int) -> None:
        self.children = [subprocess.Popen(["sleep", "60"]) for _ in range(count)]

    def ready(self, role: str) -> list[ServiceState]:
        if role != "decode":
            return []
        members = [identify(child.pid) for child in self.children if child.poll() is None]
        return [ServiceState("decode", "decode", 1, "log", pid=one.pid, members=[one]) for one in members if one]

    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.children[0].pid}/stat").read_text().split()[2] == "T"

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture
def instances() -> Iterator[Instances]:
    made = Instances(2)
    yield made
    made.end()


def fire(instances: Instances, seen: list[int], *, spare_last: bool) -> Fire:
    return Fire(cast(Service, instances), 1, lambda state: seen.append(state.pid), spare_last)


async def test_kills_are_counted_and_the_last_one_is_spared(instances: Instances) -> None:
    seen: list[int] = []
    one = fire(instances, seen, spare_last=True)
    await one.run([Fault(0.0, "kill D")])
    await one.run([Fault(0.0, "kill D"), Fault(0.0, "kill P")])
    assert one.injected == {"kill D": 1, "left out: 1 D ready to kill": 1, "left out: 0 P ready to kill": 1}
    assert [child.pid for child in instances.children if child.poll() == -9] == seen, "it was looked at a last time"


async def test_without_sparing_all_may_be_killed(instances: Instances) -> None:
    one = fire(instances, [], spare_last=False)
    for _ in range(2):
        await one.run([Fault(0.0, "kill D")])
    assert one.injected == {"kill D": 2}
    assert [child.wait(1) for child in instances.children] == [-9, -9]


async def test_what_was_stopped_goes_on_also_when_the_phase_ends(instances: Instances) -> None:
    instances.children[1].kill()
    instances.children[1].wait()
    running = asyncio.create_task(fire(instances, [], spare_last=True).run([Fault(0.0, "stop D")]))
    await asyncio.sleep(0)
    await asyncio.to_thread(wait_for, instances.is_stopped)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.to_thread(wait_for, lambda: not instances.is_stopped())
