"""No line of a log is lost or cut: not when it is rotated, not when its writer or the supervisor is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.launch.fakes import make_spec
from tests.launch.test_process import wait_for
from twolane.launch.logpipe import LogPipe
from twolane.launch.logs import Follower
from twolane.launch.process import Child, group_members, identify, last_lines

COUNTS = "for n in range({}): print(n, 'x' * 40)"


PIPE_BYTES = 65_536


def numbers(text: str) -> list[int]:
    return [int(line.partition(" ")[0]) for line in text.splitlines()]


def test_rotation_loses_no_line_and_a_follower_sees_them_all(tmp_path: Path) -> None:
    log = tmp_path / "prefill.log"
    child = Child(make_spec(tmp_path, "import time\n" + COUNTS.format(2000) + "; time.sleep(0.0002)"), {}, 60_000)
    follower = Follower("", log, from_start=True)
    seen: list[str] = []
    while child.exit_code() is None:
        seen += follower.read()
    seen += follower.read()
    follower.close()
    child.stop(1.0)
    assert numbers("".join(seen)) == list(range(2000))
    kept = numbers(log.with_name("prefill.log.1").read_text() + log.read_text())
    assert kept == list(range(kept[0], 2000))
    # A writer that had to wait for its turn finds a whole pipe full, and moves it at once.
    assert log.stat().st_size <= 60_000 + PIPE_BYTES
    assert log.with_name("prefill.log.1").stat().st_size <= 60_000 + PIPE_BYTES


def test_after_a_childs_end_its_log_holds_all(tmp_path: Path) -> None:
    child = Child(make_spec(tmp_path, COUNTS.format(20_000)), {})
    wait_for(lambda: child.exit_code() is not None)
    assert numbers((tmp_path / "prefill.log").read_text()) == list(range(20_000))
    child.stop(0.0)


def writers_of(log: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"logwriter.py {log}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_killed_writer_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "prefill.log"
    code = "import time\nfor n in range(300): print(n, flush=True); time.sleep(0.005)"
    child = Child(make_spec(tmp_path, code), {})
    wait_for(lambda: len(log.read_text()) > 20)
    os.kill(writers_of(log)[0], signal.SIGKILL)
    while child.exit_code() is None:
        child.look()
    child.stop(1.0)
    assert numbers(log.read_text()) == list(range(300))


def test_a_child_goes_on_writing_when_its_parent_is_killed(tmp_path: Path) -> None:
    """It neither dies of the pipe nor waits for it: more than a pipe holds comes after the parent's end."""
    code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "parent = os.getppid(); print(-1, flush=True)\n"
    code += "while os.getppid() == parent: time.sleep(0.01)\n" + COUNTS.format(10_000)
    parent = f"""
import time
from pathlib import Path
from tests.launch.fakes import make_spec
from twolane.launch.process import Child
print(Child(make_spec(Path({str(tmp_path)!r}), {code!r}), {{}}).pgid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = identify(int(process.stdout.readline()))
    assert child is not None
    wait_for(lambda: bool(last_lines(tmp_path / "prefill.log", 1)))
    process.kill()
    process.communicate()
    wait_for(lambda: not child.alive() and not writers_of(tmp_path / "prefill.log"))
    assert numbers((tmp_path / "prefill.log").read_text()) == list(range(-1, 10_000))
    assert group_members(child.pid) == []


def test_a_pipe_that_somebody_else_holds_is_not_waited_for(tmp_path: Path) -> None:
    pipe = LogPipe(tmp_path / "x.log")
    other = os.dup(pipe.write_end)
    pipe.close_write_end()
    assert not pipe.drain(0.05)
    os.close(other)
    assert pipe.drain(5.0)
    pipe.close()
