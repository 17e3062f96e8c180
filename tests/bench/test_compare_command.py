"""`twolane bench --compare` with the real supervisor and proxy, and a small stand-in for vLLM."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import twolane
from tests.launch.test_terminal import FAKE_VLLM, heed_ctrl_c
from twolane.bench import command
from twolane.bench.options import Given
from twolane.bench.sweep import SIDES
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

SMALL = ("--input-len", "8", "--output-len", "3", "--num-prompts", "10", "--rates", "50,100", "--rounds", "2")
WAIT_S = 120


class Place:
    """A folder with a model, and the comparison in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "twolane.cli", "bench", "--compare", *words]
        path = f"{FAKE_VLLM}:{Path(twolane.__file__).parent.parent}"
        env = {**os.environ, "PYTHONPATH": path, "MODEL": str(self.folder / "model"), "PYTHONUNBUFFERED": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, cwd=self.folder, env=env, preexec_fn=heed_ctrl_c, **pipes)  # noqa: PLW1509

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=WAIT_S)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return found

    def raw(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "raw.jsonl").read_text().splitlines()]

    def nothing_runs(self) -> bool:
        """Each process that the command starts has the folder among its words."""
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return not any(str(self.folder) in " ".join(words) for words in commands)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    for side in SIDES:
        stop_all(Files(Settings(state_dir=tmp_path / "out" / "state" / side, log_dir=tmp_path / "logs")))


def steps_of(lines: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    return [(line["step"]["side"], line["step"]["round"], line["step"]["rate"]) for line in lines if "step" in line]


ALL_STEPS = [(side, number, rate) for side in SIDES for number in (0, 1) for rate in (50.0, 100.0)]


def test_both_sides_are_asked_the_same_and_the_folder_has_it_all(place: Place) -> None:
    run = place.run(*SMALL, "--out", "out", "--seed", "7")
    assert run.returncode == 0, run.stdout + run.stderr
    assert place.nothing_runs()
    lines, report = place.raw(), place.report()
    assert sorted(steps_of(lines)) == ALL_STEPS
    assert len([line for line in lines if line["kind"] == "request" and line["round"] >= 0]) == 80
    assert not any(line.get("error") for line in lines)
    assert report["left_out"] == []
    assert report["asked"]["seed"] == 7
    assert report["headline"] in run.stdout
    assert report["headline"] in (place.out / "report.html").read_text().replace("&#x27;", "'")
    assert report["counted"]["lanes"]["moved_tokens"] > 0
    roles = {side: [argv for argv in commands if "--model" in argv] for side, commands in report["commands"].items()}
    assert {side: len(argvs) for side, argvs in roles.items()} == {"aggregated": 2, "lanes": 2}
    assert not any("--kv-transfer-config" in argv for argv in roles["aggregated"])
    assert {path.name for path in place.out.iterdir()} == {"raw.jsonl", "report.json", "report.html", "logs"}


def test_sides_that_do_not_fit_together_are_up_one_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{FAKE_VLLM}:{Path(twolane.__file__).parent.parent}")
    monkeypatch.setattr(command, "room_for", lambda *_: False)
    given = Given(input_len=8, output_len=3, num_prompts=10, rates=(50.0,), rounds=2)
    settings = Settings(model=str(place.folder / "model"), log_dir=place.folder, cache_dir=place.folder)
    assert command.compare_command(settings, given, 5.0, place.out, None, Console(file=io.StringIO()))
    order = [(side, number) for side, number, _ in steps_of(place.raw())]
    assert order == [("aggregated", 0), ("lanes", 0), ("lanes", 1), ("aggregated", 1)]
    assert [side for side, _ in place.report()["starts_s"]] == ["aggregated", "lanes", "aggregated"]
    assert place.nothing_runs()


def test_ctrl_c_leaves_nothing_and_it_goes_on_where_it_was(place: Place) -> None:
    run = place.start(*SMALL, "--out", "out")
    assert run.stdout is not None
    for line in run.stdout:
        if "round 1: the two lanes, 50 requests/s" in line:
            break
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=WAIT_S)
    assert run.returncode == 130, out + err
    assert place.nothing_runs()
    before = place.raw()
    assert 0 < len(steps_of(before)) < len(ALL_STEPS)
    assert place.report()["left_out"]
    assert "--resume out` goes on there" in out

    (place.folder / "twolane.toml").write_text("max_model_len = 999\n")
    refused = place.run("--resume", "out")
    assert (refused.returncode, "configuration.max_model_len is '999' now and was 'None'" in refused.stderr) == (
        2,
        True,
    )
    (place.folder / "twolane.toml").unlink()
    killed = place.start("--resume", "out")
    assert killed.stdout is not None
    for line in killed.stdout:
        if "is ready" in line:
            break
    killed.kill()
    killed.communicate(timeout=WAIT_S)
    again = place.run("--resume", "out")
    assert again.returncode == 0, again.stdout + again.stderr
    assert place.raw()[: len(before)] == before
    assert sorted(steps_of(place.raw())) == ALL_STEPS
    assert place.report()["left_out"] == []
    assert "It was interrupted, and went on later" in place.report()["notes"]
    assert place.nothing_runs()


def test_the_budget_ends_it_with_what_there_is(place: Place) -> None:
    words = ("--rates", "2", "--num-prompts", "40", "--budget-minutes", "0.3")
    run = place.run(*SMALL, *words, "--out", "out")
    assert run.returncode == 1, run.stdout + run.stderr  # one side only
    report = place.report()
    assert "the budget was spent before everything was measured" in report["notes"]
    assert "left out: " in run.stdout
    assert place.nothing_runs()


def test_a_side_that_does_not_start_is_told_and_the_other_is_measured(place: Place) -> None:
    run = place.run(*SMALL, "--out", "out", "--prefill-args=--nope", "--aggregated-args=--seed 7")
    assert run.returncode == 1, run.stdout + run.stderr
    report = place.report()
    assert report["headline"].startswith("Only aggregated instances were measured")
    assert any("unrecognized arguments: --nope" in note or "prefill" in note for note in report["notes"])
    assert len(report["points"]["aggregated"]) == 2
    assert place.nothing_runs()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--input-len", "9000"), "an instance takes 8192: ask for less, or raise --max-model-len"),
        (("--rates", "x"), "give requests a second with commas"),
        (("--request-rate", "2"), "--request-rate has no meaning with --compare"),
        (("--resume", "nowhere"), "holds no comparison that can go on"),
        (("--resume", "nowhere", "--out", "x"), "--out has no meaning with --resume"),
    ],
)
def test_what_can_not_be_is_told_before_anything_starts(place: Place, words: tuple[str, ...], told: str) -> None:
    run = place.run(*words)
    assert run.returncode == 2
    assert told in run.stderr


def test_a_comparisons_flags_need_it(place: Place) -> None:
    argv = [sys.executable, "-m", "twolane.cli", "bench", "--rounds", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(twolane.__file__).parent.parent)}
    done = subprocess.run(argv, cwd=place.folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "--rounds has no meaning without --compare" in done.stderr) == (2, True)
