"""Where settings come from, which wins, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.configuration import KEYS, VARIABLES, ConfigFile, Configuration, load, resolve
from twolane.launch.keys import HELP, toml_text
from twolane.launch.values import PARSERS


def from_env(**env: str) -> Settings:
    return resolve({}, env, None).settings


def from_file(text: str) -> Configuration:
    return resolve({}, {}, ConfigFile("twolane.toml", text))


def test_an_empty_environment_gives_one_prefill_and_one_decode_instance_on_the_recipes_ports() -> None:
    settings = from_env()
    assert (settings.prefill, settings.decode) == (1, 1)
    assert (settings.http_proxy_port, settings.proxy_port) == (10001, 30001)
    assert (settings.prefill_http_port, settings.decode_http_port) == (20003, 20005)
    assert (settings.prefill_kv_port, settings.decode_kv_port) == (21001, 22001)
    assert settings.timeout_seconds == 600
    assert settings.model is None
    assert settings.host == "127.0.0.1"


def test_the_recipes_variables_keep_their_names_and_the_others_have_the_prefix() -> None:
    bare = {name for name in VARIABLES if not name.startswith("TWOLANE_")}
    assert bare == {
        *("MODEL", "PREFILL_GPU", "DECODE_GPU", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT", "PREFILL_KV_PORT"),
        *("DECODE_KV_PORT", "HTTP_PROXY_PORT", "PROXY_PORT", "TIMEOUT_SECONDS"),
    }
    assert set(PARSERS) == set(KEYS) == set(HELP)


def test_values_are_read() -> None:
    settings = from_env(MODEL="/m", HTTP_PROXY_PORT="8080", PREFILL_GPU="0, 1", TWOLANE_VLLM_ARGS="--seed 1 --x 'a b'")
    assert settings.model == "/m"
    assert settings.http_proxy_port == 8080
    assert settings.prefill_gpu == ((0,), (1,))
    assert settings.prefill == 2
    assert settings.vllm_args == ("--seed", "1", "--x", "a b")


def test_a_plus_makes_one_instance_of_several_gpus() -> None:
    settings = from_env(PREFILL_GPU="0+1,2+3", DECODE_GPU="4+5")
    assert settings.prefill_gpu == ((0, 1), (2, 3))
    assert (settings.prefill, settings.decode) == (2, 1)


def test_opentelemetrys_own_variable_counts_and_ours_wins() -> None:
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}
    made = resolve({}, standard, None)
    assert made.settings.otlp_endpoint == "http://a:4318"
    assert made.origins["otlp_endpoint"] == "environment OTEL_EXPORTER_OTLP_ENDPOINT"
    assert from_env(**standard, TWOLANE_OTLP_ENDPOINT="http://b:4318").otlp_endpoint == "http://b:4318"


def test_flags_win_over_the_environment_over_the_file_over_defaults() -> None:
    file = ConfigFile(
        "twolane.toml", "# mine\nproxy_port = 31001\nprefill = 2\ndecode = 2\nvllm_args = ['--seed', '1']\n"
    )
    made = resolve({"decode": 4, "prefill": None}, {"PREFILL_HTTP_PORT": "", "TWOLANE_DECODE": "3", "MODEL": "m"}, file)
    settings = made.settings
    assert (settings.decode, settings.prefill, settings.proxy_port, settings.prefill_http_port) == (4, 2, 31001, 20003)
    assert settings.vllm_args == ("--seed", "1")
    origins = made.origins
    assert [origins[key] for key in ("decode", "prefill", "model", "kv")] == [
        *("flag --decode", "twolane.toml:3", "environment MODEL", "default"),
    ]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY_PORT", "abc"),
        ("PREFILL_HTTP_PORT", "80"),
        ("HTTP_PROXY_PORT", "65536"),
        ("TWOLANE_POLICY", "whim"),
        ("PROXY_PORT", "70000"),
        ("PREFILL_HTTP_PORT", "-1"),
        ("DECODE_KV_PORT", "²"),
        ("TWOLANE_PREFILL", "0"),
        ("TWOLANE_DECODE", "1.5"),
        ("PREFILL_GPU", "a"),
        ("PREFILL_GPU", "0+"),
        ("PREFILL_GPU", "1+1"),
        ("DECODE_GPU", "0,,1"),
        ("TWOLANE_MAX_MODEL_LEN", "0"),
        ("TIMEOUT_SECONDS", "soon"),
        ("TWOLANE_VLLM_ARGS", "'open"),
        ("TWOLANE_KV", "mooncake"),
        ("TWOLANE_RESTART_MINUTES", "nan"),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_env(**{variable: value})
    assert f"{variable}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nprefil_gpu = 0\n", "twolane.toml:2: 'prefil_gpu' is no setting: did you mean prefill_gpu?"),
        ("a = 1\nport", "twolane.toml is not valid TOML: Expected '=' after a key"),
        ("model = 'm'\n[decode_arg]\n", "twolane.toml:2: 'decode_arg' is no setting: did you mean decode_args?"),
        ("\n\nproxy_port = 'x'\n", "proxy_port='x' is not a whole number from 0 to 65535 (twolane.toml:3)"),
        ("model = 3\n", "model=3 is not a text"),
        ("prefill = true\n", "prefill=True is not a whole number"),
        ("vllm_args = 3\n", "vllm_args=3 is not a list of texts"),
        ("prefill = 1\nprefill_gpu = '0,1'\n", "prefill=1 (twolane.toml:1) does not fit prefill_gpu, which names 2"),
    ],
)
def test_a_wrong_file_is_told_with_line_and_nearest_word(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_file(text)
    assert words in str(error.value)


def test_what_config_write_makes_may_be_uncommented_as_it_stands() -> None:
    made = from_file("prefill = 2\nvllm_args = ['--seed', '1']\n")
    text = "\n".join(line.removeprefix("# ") if " = " in line else line for line in toml_text(made).splitlines())
    assert from_file(text).settings == made.settings


def test_toml_errors_name_the_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        from_file("prefill = 1\nport\n")


def test_an_unknown_variable_with_the_prefix_is_an_error_and_a_near_miss_without_it_a_warning() -> None:
    with pytest.raises(ConfigError, match="TWOLANE_VLLM_ARG, which is no setting: did you mean TWOLANE_VLLM_ARGS"):
        from_env(TWOLANE_VLLM_ARG="x")
    made = resolve({}, {"PREFILL_GPUS": "0", "PREFILL_SERVICE_HOST": "10.0.0.1"}, None)
    assert made.warnings == ("PREFILL_GPUS in the environment is no setting; PREFILL_GPU is",)


def test_a_file_that_is_not_there_is_no_error_and_one_that_cannot_be_read_is(tmp_path: Path) -> None:
    assert load({}, {}, tmp_path / "twolane.toml").settings.prefill == 1
    (tmp_path / "twolane.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="can't be read"):
        load({}, {}, tmp_path / "twolane.toml")


def test_the_cache_folder_follows_the_environment() -> None:
    assert from_env(TWOLANE_CACHE_DIR="/c").cache_dir == Path("/c")
    assert from_env(XDG_CACHE_HOME="/x").cache_dir == Path("/x/twolane")
    assert from_env().cache_dir == Path.home() / ".cache/twolane"
