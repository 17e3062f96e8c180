from __future__ import annotations

from pathlib import Path

import pytest

from twolane.config import Settings
from twolane.errors import ConfigError


def test_an_empty_environment_gives_one_prefill_and_one_decode_instance_on_the_usual_ports() -> None:
    settings = Settings.from_env({})
    assert (settings.num_prefill, settings.num_decode) == (1, 1)
    assert (settings.http_port, settings.discovery_port) == (10001, 30001)
    assert (settings.prefill_port, settings.decode_port) == (20003, 20005)
    assert settings.model is None
    assert settings.host == "127.0.0.1"


def test_values_are_read() -> None:
    settings = Settings.from_env(
        {"MODEL": "/m", "HTTP_PORT": "8080", "PREFILL_GPUS": "0, 1", "VLLM_ARGS": "--seed 1 --x 'a b'"}
    )
    assert settings.model == "/m"
    assert settings.http_port == 8080
    assert settings.prefill_gpus == (0, 1)
    assert settings.num_prefill == 2
    assert settings.vllm_args == ("--seed", "1", "--x", "a b")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PORT", "abc"),
        ("HTTP_PORT", "80"),
        ("HTTP_PORT", "70000"),
        ("HTTP_PORT", "-1"),
        ("HTTP_PORT", "²"),
        ("NUM_PREFILL", "0"),
        ("NUM_DECODE", "1.5"),
        ("PREFILL_GPUS", "a"),
        ("DECODE_GPUS", "0,,1"),
        ("MAX_MODEL_LEN", "0"),
        ("START_TIMEOUT_S", "soon"),
        ("VLLM_ARGS", "'open"),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        Settings.from_env({variable: value})
    assert variable in str(error.value)
    assert repr(value) in str(error.value)


def test_a_count_that_does_not_fit_the_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="NUM_PREFILL=3 does not fit PREFILL_GPUS"):
        Settings.from_env({"NUM_PREFILL": "3", "PREFILL_GPUS": "0,1"})


def test_the_cache_folder_follows_the_environment() -> None:
    assert Settings.from_env({"TWOLANE_CACHE": "/c"}).cache_dir == Path("/c")
    assert Settings.from_env({"XDG_CACHE_HOME": "/x"}).cache_dir == Path("/x/twolane")
    assert Settings.from_env({}).cache_dir == Path.home() / ".cache/twolane"
