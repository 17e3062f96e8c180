"""A group whose starter is gone is ended, though it ignores SIGTERM; a stranger's is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from twolane.launch import reaper
from twolane.launch.process import start_ticks

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"


def test_a_group_whose_starter_is_gone_is_ended_and_its_folder_goes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True) as group:
        assert group.stdout
        group.stdout.readline()
        quick = f"import runpy, sys; sys.argv = sys.argv[1:]; m = runpy.run_path({reaper.__file__!r});"
        quick += "m['main'].__globals__['GRACE_S'] = 0.2; m['main']()"
        argv = [sys.executable, "-c", quick, "reaper", str(group.pid), str(start_ticks(group.pid)), str(folder)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE) as ended:
            assert ended.stdin
            ended.stdin.write(b".")
            ended.stdin.flush()
            assert group.poll() is None
            ended.stdin.close()
            assert ended.wait(30) == 0
        assert group.wait(30) == -9
    assert not folder.exists()


def test_a_group_that_was_never_ours_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as stranger:
        reaper.reap(stranger.pid, {(stranger.pid, 1)})
        assert stranger.poll() is None
        stranger.kill()
