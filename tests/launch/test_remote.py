"""What the driver makes of an instance on a Ray node that it hears from, or doesn't. Ray itself is in tests/cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.launch.test_plan import CPU, MODEL
from tests.launch.test_process import wait_for
from twolane.config import Settings
from twolane.launch import cluster
from twolane.launch.actor import InstanceActor, Report
from twolane.launch.cluster import RemoteService
from twolane.launch.kv import Place
from twolane.launch.phases import READY, SILENT
from twolane.launch.plan import make_instance

FIRST = Report("first", "10.0.0.2", "node2", 7, None, "hello\n", ())
NOTHING = msgspec.structs.replace(FIRST, log="")
SECOND = msgspec.structs.replace(FIRST, life="second", node="10.0.0.3", node_id="node3")


class RayError(Exception):
    pass


class GetTimeoutError(RayError):
    pass


class ActorUnavailableError(RayError):
    pass


class ActorDiedError(RayError):
    pass


class FakeRay:
    """Gives one answer after the other, and none from then on."""

    exceptions = SimpleNamespace(
        RayError=RayError, GetTimeoutError=GetTimeoutError, ActorUnavailableError=ActorUnavailableError
    )

    def __init__(self) -> None:
        self.script: Iterator[Report | RayError] = iter(())
        self.questions: list[tuple[str, int]] = []
        self.waited_for: list[object] = []
        self.is_used_up = threading.Event()
        self.over = threading.Event()

    def ask(self, life: str, num_heard: int) -> object:
        self.questions.append((life, num_heard))
        return object()

    def get(self, ref: object, timeout: float) -> Any:
        self.waited_for.append(ref)
        answer = next(self.script, None)
        if answer is None:
            self.is_used_up.set()
            self.over.wait(30.0)
            raise GetTimeoutError
        if isinstance(answer, RayError):
            raise answer
        return msgspec.to_builtins(answer)


class Driver:
    """A service whose actor answers what a test says."""

    def __init__(self, folder: Path) -> None:
        self.ray = FakeRay()
        self.alive = {"node2", "node3"}
        self.removed = 0
        place = Place("10.0.0.2", "10.0.0.1", "/run/secret", str(folder))
        spec = make_instance(
            Settings(ray="auto"), CPU, MODEL, role="decode", index=0, name="decode", gpus=(), place=place
        )
        self.service = RemoteService(spec, self)  # type: ignore[arg-type]
        self.log = Path(spec.log)

    def is_alive(self, node_id: str) -> bool:
        return node_id in self.alive

    def place(self, spec: Any) -> tuple[None, Any]:
        return None, SimpleNamespace(report=SimpleNamespace(remote=self.ray.ask))

    def remove(self, group: Any, actor: Any) -> None:
        self.removed += 1

    def hears(self, *answers: Report | RayError) -> None:
        self.ray.script = iter(answers)
        self.ray.is_used_up.clear()
        self.ray.over.clear()
        placed = self.place(None)
        self.service._placed = placed
        watching = threading.Thread(target=self.service._watch, args=(placed,))
        watching.start()
        wait_for(lambda: self.ray.is_used_up.is_set() or self.service.exit_code() is not None, 30.0)
        self.service._placed = None
        self.ray.over.set()
        watching.join()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(cluster, "REPORT_EVERY_S", 0.0)
    made = Driver(tmp_path)
    made.hears(FIRST)
    made.service.enter(READY)
    return made


@pytest.mark.parametrize("trouble", [GetTimeoutError(), ActorUnavailableError()])
def test_an_instance_that_nobody_hears_is_silent_and_not_ended(driver: Driver, trouble: RayError) -> None:
    driver.hears(trouble)
    assert (driver.service.state.phase, driver.service.exit_code()) == (SILENT, None)
    driver.hears(trouble, NOTHING)
    assert (driver.service.state.phase, driver.service.exit_code()) == (READY, None)


@pytest.mark.parametrize("trouble", [GetTimeoutError(), ActorUnavailableError()])
def test_it_ends_with_its_node(driver: Driver, trouble: RayError) -> None:
    driver.alive.remove("node2")
    driver.hears(trouble)
    assert driver.service.exit_code() is not None
    assert driver.service.ending() == "lost, with its actor or its node"


@pytest.mark.parametrize("end", [ActorDiedError(), SECOND])
def test_it_ends_with_its_actor(driver: Driver, end: Report | RayError) -> None:
    driver.hears(ActorUnavailableError(), end)
    assert driver.service.ending() == "lost, with its actor or its node"


def test_what_it_ended_with_is_told(driver: Driver) -> None:
    driver.hears(msgspec.structs.replace(NOTHING, exit_code=-9))
    assert driver.service.ending() == "killed by signal 9"


def test_only_one_question_waits_for_the_network(driver: Driver) -> None:
    driver.ray.waited_for.clear()
    driver.hears(GetTimeoutError(), GetTimeoutError(), NOTHING)
    assert len(set(driver.ray.waited_for[:3])) == 1


def test_what_the_log_said_is_asked_for_until_it_is_heard(driver: Driver) -> None:
    driver.ray.questions.clear()
    more = msgspec.structs.replace(FIRST, log="more\n")
    driver.hears(ActorUnavailableError(), more, NOTHING)
    assert driver.log.read_text() == "hello\nmore\n"
    assert driver.ray.questions[:3] == [("first", 6), ("first", 6), ("first", 11)]


def test_one_that_was_never_placed_can_be_placed_again_after_its_time_is_up(driver: Driver) -> None:
    driver.ray.over.clear()
    driver.service.start(Path(), 1000)  # Ray has no room for it
    assert driver.service.exit_code() is None
    driver.service.stop(0.0)
    driver.ray.over.set()
    assert driver.service.exit_code() is not None, "or the supervisor would wait for its end for ever"


def test_one_out_of_reach_is_not_waited_for_when_all_is_ended(driver: Driver) -> None:
    driver.hears(GetTimeoutError())
    driver.service._placed = (None, None)
    assert driver.service.stop(15.0) == "was out of reach: Ray ends it"
    assert driver.removed == 1


def test_the_actor_tells_again_what_was_not_heard() -> None:
    actor: Any = object.__new__(InstanceActor)
    lines = [["one\n"], ["two\n"], [], ["three\n"], []]
    actor.__dict__ |= {"_life": "first", "_node": "", "_node_id": "", "_gpus": (), "_child": None, "_problem": ""}
    actor.__dict__ |= {"_log": SimpleNamespace(read=lambda: lines.pop(0)), "_unheard": "", "_num_heard": 0}
    told = [actor.report(*heard)["log"] for heard in [("before", 99), ("first", 0), ("first", 4), ("first", 4)]]
    assert told == ["one\n", "one\ntwo\n", "two\n", "two\nthree\n"]
    assert actor.report("first", 14)["log"] == ""
