"""Resolves requirements/*.in into the locks that bootstrap.py installs: `make lock`. Needs a package index only.

uv does the resolving, in a temporary virtual environment of its own. The result holds for Linux on x86_64 and aarch64
and for every Python that pyproject.toml admits; it names no index, so that pip's own configuration decides.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
UV_PROJECT = """\
[project]
name = "lock"
version = "0"
requires-python = ">=3.11,<3.14"
[tool.uv]
environments = [
    "sys_platform == 'linux' and platform_machine == 'x86_64'",
    "sys_platform == 'linux' and platform_machine == 'aarch64'",
]
"""
HEADER = "# Made by `make lock` from {sources}. Don't edit: change those and run it again.\n"
# Every package that has these markers has them because of `environments`, so they say nothing on a Linux machine.
BOTH_MACHINES = re.compile(r"\(platform_machine == 'aarch64' or platform_machine == 'x86_64'\)")
EITHER_MACHINE = re.compile(
    r"\(\(platform_machine == 'aarch64' and sys_platform == 'linux'\)"
    r" or \(platform_machine == 'x86_64' and sys_platform == 'linux'\)\)"
)


def plain_line(line: str) -> str:
    """One line of uv's output without the markers that are true wherever TwoLane runs. CPython on Linux is a given."""
    name, sep, marker = line.partition(" ; ")
    if not sep:
        return line
    if "platform_python_implementation" in marker or "implementation_name" in marker:
        return name
    marker = EITHER_MACHINE.sub("LINUX", BOTH_MACHINES.sub("LINUX", marker))
    marker = marker.replace("sys_platform == 'linux'", "LINUX")
    terms = [term for term in marker.split(" and ") if term != "LINUX"]
    if any("LINUX" in term for term in terms):
        raise SystemExit(f"scripts/lock.py does not understand this marker, teach plain_line() to read it: {line}")
    return f"{name} ; {' and '.join(terms)}" if terms else name


def compile_lock(uv: Path, work: Path, sources: list[str], target: str, options: list[str]) -> None:
    """Writes requirements/`target`; versions already in it stay, as far as they still fit (`make lock UPGRADE=1`)."""
    out = work / target
    previous = REQUIREMENTS / target
    if previous.exists() and not os.environ.get("UPGRADE"):
        out.write_text(previous.read_text())
    command = [str(uv), "pip", "compile", "--universal", "--python-version", "3.11", "--quiet", "--no-header"]
    command += ["--no-annotate", "--no-emit-index-url"]
    command += [*options, "--output-file", str(out), *(str(ROOT / source) for source in sources)]
    subprocess.run(command, check=True, cwd=work)
    lines = [plain_line(line) for line in out.read_text().splitlines() if line and not line.startswith("#")]
    previous.write_text(HEADER.format(sources=", ".join(sources)) + "\n".join(lines) + "\n")
    sys.stdout.write(f"requirements/{target}: {len(lines)} packages\n")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="twolane-lock-") as folder:
        work = Path(folder)
        (work / "pyproject.toml").write_text(UV_PROJECT)  # uv reads it as the folder's settings
        venv.create(work / "venv", with_pip=True)
        subprocess.run([work / "venv/bin/pip", "install", "--quiet", "uv"], check=True)
        uv = work / "venv/bin/uv"
        overrides = ["--overrides", str(REQUIREMENTS / "cpu.overrides")]
        compile_lock(uv, work, ["requirements/cpu.in", "pyproject.toml"], "cpu.lock", overrides)
        compile_lock(uv, work, ["requirements/dev.in"], "dev.lock", ["--constraints", str(REQUIREMENTS / "cpu.lock")])


if __name__ == "__main__":
    main()
