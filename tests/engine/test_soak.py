"""The short form of the soak, as `make soak` runs it: P and D killed and stopped, messages lost, blocks scarce."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twolane
from tests.engine.place import PORTS
from tests.ports import free_ports_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_under_fire_every_answer_is_right_and_nothing_is_lost_or_leaked(tmp_path: Path) -> None:
    env = {**os.environ, **free_ports_of(PORTS), "PYTHONPATH": str(Path(twolane.__file__).parent.parent)}
    argv = [sys.executable, "-m", "benchmarks.soak", "--phases", "short", "--requests", "60", "--prompts", "40"]
    argv += ["--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, env=env, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (phase,) = json.loads(done.stdout.splitlines()[-1])["phases"]
    assert phase["requests"] == 60
    # How many of each is the machine's doing, and so is whether a fault meets a transfer.
    assert phase["verdicts"]["right"] > 0
    assert phase["verdicts"]["left"] > 0
    assert (phase["faults"]["kill P"], phase["faults"]["kill D"]) == (1, 1)
    assert phase["faults"]["stop P"] > 0
    assert phase["counters"]["twolane_kv_received_transfers_total"] > 0
    assert phase["counters"]["twolane_kv_dropped_messages_total"] > 0
