"""A soak that somebody ends: with the real supervisor and proxy, and a small stand-in for vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from benchmarks.soak.phases import SHORT
from benchmarks.soak.workload import make_prompts

from tests.launch.test_terminal import ROOT, Place
from twolane.config import Settings
from twolane.launch.benchmark import versions
from twolane.launch.control import Files, stop_all


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    stop_all(Files(Settings(state_dir=tmp_path / SHORT.slug / "state", log_dir=tmp_path / "logs")))


def test_ctrl_c_ends_it_with_a_report_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    count = len(make_prompts(seed=1, count=3, max_tokens=9))
    key = {"seed": 1, "prompts": count, "versions": versions(), "model": place.env["MODEL"]}
    (tmp_path / "reference.json").write_text(json.dumps({"key": key, "tokens": [[1, 2, 3]] * count}))
    words = ("-m", "benchmarks.soak", "--phases", "short", "--prompts", "3", "--out", str(tmp_path))
    path = f"{place.env['PYTHONPATH']}:{ROOT}"
    terminal = place.terminal(*words, command=(sys.executable,), PYTHONPATH=path, COLUMNS="200")
    terminal.expect(r"[1-9]\d* requests \{")
    terminal.sendintr()
    terminal.expect("ended early: blocks and growth weren't looked at")
    terminal.expect(pexpect.EOF)
    report = json.loads(terminal.before.splitlines()[-1])
    terminal.close()
    assert terminal.exitstatus == 1
    assert report["phases"][0]["interrupted"]
    assert report["phases"][0]["requests"] > 0
    assert place.nothing_listens()
