from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.launch.fakes import IGNORES_SIGTERM, LEAVES_A_GRANDCHILD, make_spec
from twolane.launch.process import (
    GONE,
    Child,
    group_members,
    identify,
    last_lines,
    shared_memory,
    start_ticks,
    stop_group,
)

LEAVES_SHARED_MEMORY = """
import time
from multiprocessing import shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
print(segment.name, flush=True)
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def first_line(child_log: Path) -> str:
    wait_for(lambda: bool(last_lines(child_log, 1)))
    return last_lines(child_log, 1)[0]


def test_a_child_has_its_own_group_and_log(tmp_path: Path) -> None:
    child = Child(make_spec(tmp_path, "import os; print(os.getpgid(0), flush=True); input()"), {})
    wait_for(lambda: child.exit_code() is not None)  # its standard input is empty
    assert first_line(tmp_path / "prefill.log") != ""
    assert (tmp_path / "prefill.log").read_text().startswith(f"{child.pgid}\n")
    assert child.exit_code() == 1
    child.stop(1.0)


def test_the_log_of_the_last_start_is_kept(tmp_path: Path) -> None:
    for word in ("first", "second"):
        child = Child(make_spec(tmp_path, f"print('{word}')"), {})
        wait_for(lambda: child.exit_code() is not None)  # noqa: B023 - called at once
        child.stop(1.0)
    assert (tmp_path / "prefill.log").read_text() == "second\n"
    assert (tmp_path / "prefill.log.1").read_text() == "first\n"


def test_stop_kills_a_child_that_ignores_sigterm_and_its_grandchild(tmp_path: Path) -> None:
    child = Child(make_spec(tmp_path, IGNORES_SIGTERM), {})
    grandchild = identify(int(first_line(tmp_path / "prefill.log")))
    assert grandchild is not None
    assert child.stop(term_wait_s=0.3) == "killed"
    assert child.exit_code() == -signal.SIGKILL
    assert not grandchild.alive()
    assert group_members(child.pgid) == []


def test_stop_ends_what_a_dead_leader_left_behind(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, LEAVES_A_GRANDCHILD + "\nimport time; time.sleep(600)")
    child = Child(spec, {})
    grandchild = identify(int(first_line(tmp_path / "prefill.log")))
    assert grandchild is not None
    child.look()
    os.kill(child.pgid, signal.SIGKILL)
    wait_for(lambda: child.exit_code() is not None)
    assert grandchild.alive()
    assert child.stop(term_wait_s=2.0) == "stopped"
    assert not grandchild.alive()


def test_a_recycled_pid_another_program_and_another_boot_are_never_signalled() -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        now = identify(stranger.pid)
        assert now is not None
        earlier = msgspec.structs.replace(now, start_ticks=now.start_ticks - 1)
        other_program = msgspec.structs.replace(now, program="/usr/bin/other")
        before_a_reboot = msgspec.structs.replace(now, boot="another")
        for not_it in (earlier, other_program, before_a_reboot):
            assert not not_it.alive()
            assert stop_group(stranger.pid, [not_it], term_wait_s=0.1) == GONE
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: start_ticks(child.pid) is None)
    child.wait()


def test_a_kill_leaves_no_shared_memory(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LEAVES_SHARED_MEMORY
    child = Child(make_spec(tmp_path, code), {})
    segment = Path("/dev/shm") / first_line(tmp_path / "prefill.log")  # noqa: S108 - where Linux has it
    assert segment.exists()
    assert str(segment) in shared_memory(child.look())
    assert child.stop(term_wait_s=0.2) == "killed"
    assert not segment.exists()


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    parent = f"""
import time
from pathlib import Path
from tests.launch.fakes import make_spec
from twolane.launch.process import Child
print(Child(make_spec(Path({str(tmp_path)!r}), "import time; time.sleep(600)"), {{}}).pgid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = identify(int(process.stdout.readline()))
    assert child is not None
    process.kill()
    process.communicate()
    wait_for(lambda: not child.alive())
