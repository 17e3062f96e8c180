from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.launch.fakes import DIES_AT_ONCE, make_run, make_spec, server_spec
from tests.launch.test_process import wait_for
from twolane.config import Settings
from twolane.errors import StartError
from twolane.launch import commands, probes
from twolane.launch.control import (
    Files,
    ask_restart,
    await_ready,
    await_start,
    exclusive,
    running,
    start_supervisor,
    stop_all,
)
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


@pytest.mark.parametrize(("prefill", "decode"), [((0,), (0,)), ((0, 1), (1, 0))])
def test_instances_that_share_a_gpu_start_one_after_the_other(
    files: Files, tmp_path: Path, prefill: tuple[int, ...], decode: tuple[int, ...]
) -> None:
    pair = [
        msgspec.structs.replace(server_spec(tmp_path, "prefill", "prefill"), gpus=prefill),
        msgspec.structs.replace(server_spec(tmp_path, "decode", "decode"), gpus=decode),
    ]
    start(make_run(tmp_path, *pair), files)

    def events() -> list[str]:
        found = re.findall(r"service=(\w+) pid=\d+ event=(started|ready)", files.supervisor_log.read_text())
        return [event for name, event in found if name != "proxy"]

    wait_for(lambda: len(events()) == 4)  # the log has a writer of its own
    assert events() == ["started", "ready", "started", "ready"]


def test_a_child_that_dies_while_starting_ends_the_start_with_its_last_words(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "decode", "decode"), make_spec(tmp_path, DIES_AT_ONCE))
    began_s = time.monotonic()
    with pytest.raises(StartError) as error:
        start(plan, files)
    assert time.monotonic() - began_s < 25
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


def with_limits(plan: Plan, tries: int, log_max_bytes: int = 1 << 30) -> Plan:
    return msgspec.structs.replace(plan, restart_tries=tries, log_max_bytes=log_max_bytes)


def test_what_keeps_dying_is_given_up_with_its_reason_and_comes_back_when_asked(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"), server_spec(tmp_path, "decode", "decode"))
    start(with_limits(plan, tries=1), files)
    for restarts in (1, 2):
        os.kill(service(files, "prefill").pid, signal.SIGKILL)
        wait_for(lambda n=restarts: service(files, "prefill").restarts == n)  # type: ignore[misc]
        wait_for(lambda: service(files, "prefill").phase in {"ready", "given up"})
    given_up = service(files, "prefill")
    assert given_up.phase == "given up"
    assert given_up.reason == "ended killed by signal 9"
    assert service(files, "decode").phase == "ready"
    state = running(files)
    assert state is not None
    ask_restart(files, state, ["prefill"], 0.1)
    await_ready(files, {"prefill"}, {"prefill": given_up.pid}, lambda _: None)
    back = service(files, "prefill")
    assert (back.phase, back.reason) == ("ready", "")


def test_a_restart_on_request_replaces_the_process_of_that_service_only(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"), server_spec(tmp_path, "decode", "decode"))
    state = start(plan, files)
    pids = {entry.name: entry.pid for entry in state.services}
    ask_restart(files, state, ["decode"], 0.1)
    await_ready(files, {"decode"}, pids, lambda _: None)
    assert service(files, "decode").pid != pids["decode"]
    assert service(files, "prefill").pid == pids["prefill"]
    assert not (files.folder / "wish.json").exists()


def test_a_log_that_grows_too_large_moves_aside(files: Files, tmp_path: Path) -> None:
    talker = server_spec(tmp_path, "prefill", "prefill")
    code = "import threading, time\ndef talk():\n  while True: print('x' * 999, flush=True); time.sleep(0.01)\n"
    code += "threading.Thread(target=talk, daemon=True).start()\n" + talker.argv[2]
    talker = msgspec.structs.replace(talker, argv=(sys.executable, "-c", code, str(talker.http_port)))
    start(with_limits(make_run(tmp_path, talker), tries=1, log_max_bytes=50_000), files)
    log = Path(talker.log)
    wait_for(log.with_name("prefill.log.1").exists)
    wait_for(lambda: 0 < log.stat().st_size < 50_000)


def test_up_starts_only_what_is_not_running(files: Files, tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "prefill", "prefill"), server_spec(tmp_path, "decode", "decode"))
    start(with_limits(plan, tries=1), files)
    for restarts in (1, 2):
        os.kill(service(files, "decode").pid, signal.SIGKILL)
        wait_for(lambda n=restarts: service(files, "decode").restarts == n)  # type: ignore[misc]
        wait_for(lambda: service(files, "decode").phase in {"ready", "given up"})
    kept = service(files, "prefill").pid
    output = io.StringIO()
    settings = Settings(state_dir=files.folder, log_dir=tmp_path / "logs")
    commands.up(settings, Console(file=output, soft_wrap=True))
    assert "starting what isn't running: decode\n" in output.getvalue()
    assert service(files, "decode").phase == "ready"
    assert service(files, "prefill").pid == kept
