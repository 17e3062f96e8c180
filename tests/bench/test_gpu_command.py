"""`python -m benchmarks.gpu` with the real launcher and proxy, and a small stand-in for vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import twolane
from tests.launch.test_terminal import heed_ctrl_c
from tests.ports import free_ports

ROOT = Path(__file__).parent.parent.parent
FAKE_VLLM = ROOT / "tests" / "launch" / "fake_vllm"
SMALL = ("--lengths", "16,32", "--requests", "3", "--output", "3", "--seed", "5")
LOAD = ("--load-rate", "50", "--load-requests", "4", "--push-prompts", "10", "--push-blocks", "2")
NO_LOAD = ("--load-rate", "0", "--push-prompts", "0")


class Place:
    """A folder with a model, and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        (self.base,) = free_ports(1, room=80)

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "benchmarks.gpu", "--model", str(self.folder / "model"), *SMALL, *words]
        argv += ["--port-base", str(self.base), "--out", str(self.folder / "out")]
        env = {**os.environ, "PYTHONPATH": f"{FAKE_VLLM}:{Path(twolane.__file__).parent.parent}"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, cwd=ROOT, env=env, preexec_fn=heed_ctrl_c, **pipes)  # noqa: PLW1509

    def nothing_runs(self) -> bool:
        """Each process that the command starts has the folder or one of its ports among its words."""
        mine = {str(self.base), str(self.base + 40)}
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return not any(mine & set(words) or str(self.folder) in " ".join(words) for words in commands)

    def saved(self) -> dict[str, Any]:
        (file,) = (self.folder / "out").glob("gpu-*.json")
        report: dict[str, Any] = json.loads(file.read_text())
        return report


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_setups_that_live_together_are_asked_in_turns(place: Place) -> None:
    run = place.start("--setups", "auto,plain,cuda_ipc", "--together", *LOAD)
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["skipped"] == {"cuda_ipc": "needs GPUs"}
    assert set(told["unloaded"]["auto, 32"]["above"]) == {"auto: D alone", "plain"}
    report = place.saved()
    order = [record["route"] for record in report["results"]["records"] if record["part"] == "unloaded"]
    assert order[:9] == ["auto", "auto: D alone", "plain"] * 2 + ["auto: D alone", "plain", "auto"]
    assert not any(record["sample"]["error"] for record in report["results"]["records"])
    assert {row["setup"] for row in report["figures"]["push"]} == {"auto"}
    assert report["results"]["proxied"]["unloaded-0-16-auto-0"]["transfer_id"]
    (table,) = (table for table in report["figures"]["stages"] if table["length"] == 32)
    assert table["route"] == "auto"
    assert {row["n"] for row in table["rows"]} == {3}
    assert [row["to"] for row in table["rows"] if row["critical"]][-1] == "first token"
    assert place.nothing_runs()


def test_the_budget_ends_it_with_what_there_is(place: Place) -> None:
    began_s = time.monotonic()
    run = place.start("--setups", "auto", "--requests", "100000", "--budget-s", "16", *NO_LOAD)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert time.monotonic() - began_s < 40
    told = json.loads(out.splitlines()[-1])
    assert told["unloaded"]["auto, 16"]["n"] > 10
    assert "of 100000 requests" in told["notes"][0]
    assert place.nothing_runs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_what_there_is_and_leaves_nothing(place: Place, number: signal.Signals) -> None:
    run = place.start("--setups", "auto", "--requests", "100000", *NO_LOAD)
    assert run.stderr is not None
    for line in run.stderr:
        if "pass 1 of" in line:
            break
    time.sleep(1.0)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    told = json.loads(out.splitlines()[-1])
    assert told["notes"] == ["interrupted"]
    assert place.saved()["results"]["proxied"]
    assert told["unloaded"]["auto, 16"]["n"] > 0
    assert place.nothing_runs()


def test_a_setup_that_does_not_start_is_told_with_the_reason(place: Place) -> None:
    run = place.start("--setups", "auto,plain", "--prefill-args=--port=none", *NO_LOAD)
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert "prefill" in told["skipped"]["auto"]
    assert told["unloaded"]["plain, 16"]["n"] == 3
    assert place.nothing_runs()
