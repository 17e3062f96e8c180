from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.launch.fakes import DIES_AT_ONCE, make_run, make_spec, server_spec
from tests.launch.test_process import wait_for
from twolane.config import Settings
from twolane.errors import StartError
from twolane.launch import probes
from twolane.launch.control import Files, await_start, exclusive, running, start_supervisor, stop_all
from twolane.launch.plan import Plan
from twolane.launch.state import ServiceState, State, read_state


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(Settings(state_dir=tmp_path / "state", log_dir=tmp_path / "logs"))
    files.folder.mkdir()
    yield files
    stop_all(files)


def start(plan: Plan, files: Files) -> State:
    start_supervisor(plan, files)
    return await_start(files, lambda _: None)


def service(files: Files, name: str) -> ServiceState:
    state = read_state(files.state)
    assert state is not None
    return next(service for service in state.services if service.name == name)


def test_all_start_and_a_stop_leaves_nothing(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"), server_spec(tmp_path, "decode", "decode"))
    state = start(plan, files)
    assert [entry.phase for entry in state.services] == ["ready", "ready", "ready"]
    assert probes.proxy_answers(plan.proxy_address)
    assert stop_all(files) == ["proxy: stopped", "prefill: stopped", "decode: stopped"]
    assert not any(member.alive() for entry in state.services for member in entry.members)
    assert not Path(state.run_dir).exists()
    assert running(files) is None
    assert stop_all(files) == []


def test_a_child_that_dies_while_starting_ends_the_start_with_its_last_words(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "decode", "decode"), make_spec(tmp_path, DIES_AT_ONCE))
    began_s = time.monotonic()
    with pytest.raises(StartError) as error:
        start(plan, files)
    assert time.monotonic() - began_s < 10
    assert "prefill ended while it was starting, with exit code 7" in str(error.value)
    assert "the reason why" in str(error.value)
    report = stop_all(files)
    assert "decode: stopped" in report
    assert not probes.proxy_answers(plan.proxy_address)


def test_a_program_that_is_not_there_ends_the_start(files: Files, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "")
    missing = msgspec.structs.replace(spec, argv=("/no/such/program",))
    with pytest.raises(StartError, match="prefill can't be started"):
        start(make_run(tmp_path, missing), files)


def test_a_child_that_dies_later_is_started_again(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"))
    start(plan, files)
    before = service(files, "prefill")
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: service(files, "prefill").restarts == 1 and service(files, "prefill").phase == "ready")
    after = service(files, "prefill")
    assert after.pid != before.pid
    assert after.exit_code == -signal.SIGKILL
    assert service(files, "proxy").restarts == 0


def test_a_killed_supervisor_leaves_nothing_that_down_does_not_end(files: Files, tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    instance = server_spec(tmp_path, "prefill", "prefill")
    code = stubborn + instance.argv[2]
    instance = msgspec.structs.replace(instance, argv=(sys.executable, "-c", code, str(instance.http_port)))
    state = start(make_run(tmp_path, instance), files)
    os.kill(state.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not state.supervisor.alive())
    leader = next(entry for entry in state.services if entry.name == "prefill")
    assert any(member.alive() for member in leader.members)  # it ignores SIGTERM
    report = stop_all(files)
    assert "prefill: killed" in report
    assert not any(member.alive() for entry in state.services for member in entry.members)
    assert not Path(state.run_dir).exists()


def test_two_at_once_the_second_says_so(files: Files) -> None:
    with exclusive(files), pytest.raises(StartError, match="at work in this folder"), exclusive(files):
        pass


def test_a_state_file_of_a_dead_run_stops_nobody(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"))
    state = start(plan, files)
    saved = files.state.read_bytes()
    stop_all(files)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        pid = str(state.services[1].pid).encode()
        files.state.write_bytes(saved.replace(b'"pid": ' + pid, b'"pid": %d' % stranger.pid))
        stop_all(files)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
