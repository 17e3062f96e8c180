from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from twolane.config import Settings
from twolane.errors import ConfigError, StartError
from twolane.launch import model
from twolane.launch.model import resolve_model
from twolane.launch.progress import Progress


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(quiet=True))


def test_a_folder_is_served_under_its_path_and_its_name(tmp_path: Path, progress: Progress) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    served = resolve_model(Settings(model=str(folder)), "cpu", progress)
    assert served.source == str(folder)
    assert served.names == (str(folder), "my-model")
    assert served.max_len == 4096


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "does not exist"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: path.write_text("x"), "is not a folder"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "config.json can't be read"),
        (lambda path: (path.mkdir(), (path / "config.json").mkdir()), "config.json can't be read"),
    ],
)
def test_a_wrong_model_is_told_in_one_sentence(tmp_path: Path, progress: Progress, make: object, words: str) -> None:
    assert callable(make)
    make(tmp_path / "m")
    with pytest.raises(ConfigError) as error:
        resolve_model(Settings(model=str(tmp_path / "m")), "cpu", progress)
    assert words in str(error.value)
    assert f"MODEL={tmp_path / 'm'}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_passed_through_on_a_machine_with_gpus(progress: Progress) -> None:
    served = resolve_model(Settings(model="Qwen/Qwen3-4B"), "cuda", progress)
    assert (served.source, served.names, served.local) == ("Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", "Qwen3-4B"), False)


def test_without_a_model_a_machine_with_gpus_asks_for_one(progress: Progress) -> None:
    with pytest.raises(ConfigError, match="MODEL="):
        resolve_model(Settings(), "cuda", progress)


@pytest.fixture
def broken_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"no model")
    monkeypatch.setattr(model, "find_gguf", lambda: gguf)
    return Settings(cache_dir=tmp_path / "cache", log_dir=tmp_path / "logs")


def test_no_space_for_the_default_model_is_told_before_the_work(
    broken_gguf: Settings, monkeypatch: pytest.MonkeyPatch, progress: Progress
) -> None:
    monkeypatch.setattr(model, "CONVERT_SPACE_BYTES", 1 << 60)
    with pytest.raises(StartError, match="TWOLANE_CACHE_DIR"):
        resolve_model(broken_gguf, "cpu", progress)


def test_a_conversion_that_fails_leaves_no_folder(broken_gguf: Settings, progress: Progress) -> None:
    with pytest.raises(StartError, match="converting the model failed with exit code"):
        resolve_model(broken_gguf, "cpu", progress)
    assert [path.suffix for path in (broken_gguf.cache_dir / "models").iterdir()] == [".lock"]
