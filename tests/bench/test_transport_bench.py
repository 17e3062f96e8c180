"""`python -m benchmarks.transport`, with two processes and no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import twolane

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--device", "cpu", "--tokens", "32,64", "--layers", "2", "--kv-heads", "1", "--pushes", "3")


def test_each_transport_has_its_process_and_one_that_fails_is_told(tmp_path: Path) -> None:
    out = tmp_path / "link.json"
    argv = [sys.executable, "-m", "benchmarks.transport", *SMALL, "--transport", "nccl,shm@SOME=1", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(twolane.__file__).parent.parent)}
    run = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
    failed, shm = json.loads(out.read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == [failed, shm]
    assert failed == {"transport": "nccl", "error": "its process ended without a result"}
    assert shm["transport"] == "shm@SOME=1"
    assert [push["tokens"] for push in shm["pushes"]] == [32, 64]
    assert shm["pushes"][-1]["GB/s"] > 0
    assert "running GB/s" in shm["pushes"][-1]
