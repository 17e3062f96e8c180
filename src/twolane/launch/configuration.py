"""Settings from flags, environment, twolane.toml and defaults, in this order, with the place each came from.

Pure but for `load`. A key's name is the field's in config.Settings; `prefill_gpu` is the flag --prefill-gpu, the
environment's PREFILL_GPU and the file's prefill_gpu. Keys outside the old recipe have TWOLANE_ before their variable.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.values import PARSERS, WrongValueError

FILE_NAME = "twolane.toml"
PREFIX = "TWOLANE_"
# The recipe's own variables; the others carry the prefix.
BARE = frozenset(
    (
        *("model", "prefill_gpu", "decode_gpu", "prefill_http_port", "decode_http_port", "prefill_kv_port"),
        *("decode_kv_port", "http_proxy_port", "proxy_port", "timeout_seconds"),
    )
)
KEYS = tuple(field.name for field in fields(Settings) if field.name != "state_dir")
DEFAULT = "default"
# Of those, what the proxy reads.
PROXY_KEYS = (
    *("host", "http_proxy_port", "proxy_port", "kv", "policy", "min_prefill_tokens", "max_prefill_queue"),
    *("max_in_flight", "max_queued", "queue_timeout", "discovery_host", "registration_secret_file", "allow_network"),
    *("power_csv", "power_every"),
    *("api_key", "api_key_file", "upstream_api_key", "otlp_endpoint", "log_dir", "log_max_mb"),
)
SECRET = frozenset(("api_key", "upstream_api_key"))  # not shown
ALIASES = {"http_proxy_port": "--http-port", "proxy_port": "--discovery-port"}  # more flags for the same


def variable(key: str) -> str:
    """The environment variable of a key."""
    return key.upper() if key in BARE else PREFIX + key.upper()


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


VARIABLES = {variable(key): key for key in KEYS}
STANDARD = {"OTEL_EXPORTER_OTLP_ENDPOINT": "otlp_endpoint"}  # everybody's; our own variable wins


@dataclass(frozen=True)
class Configuration:
    """`origins`: for each key where its value came from. `warnings`: what looks like a slip of the pen."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigFile:
    """twolane.toml as it stands; `name` is what errors call it."""

    name: str
    text: str


def load(flags: Mapping[str, object], env: Mapping[str, str] | None = None, path: Path | None = None) -> Configuration:
    """Reads environment and file of this process unless others are given. ConfigError names place and remedy."""
    path = path or Path(FILE_NAME)
    try:
        file = ConfigFile(path.name, path.read_text()) if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    return resolve(flags, os.environ if env is None else env, file)


def resolve(flags: Mapping[str, object], env: Mapping[str, str], file: ConfigFile | None) -> Configuration:
    """Pure. `flags`: by key, None where it wasn't given."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys(KEYS, DEFAULT)
    layers = [*_from_file(file), *_from_env(env), *_from_flags(flags)]
    for key, raw, origin, label in layers:
        try:
            values[key] = PARSERS[key](raw)
        except WrongValueError as error:
            raise ConfigError(f"{label}={raw!r} {error}{_where(origin)}") from error
        origins[key] = origin
    if "cache_dir" not in values:
        values["cache_dir"] = default_cache_dir(env)
    _fit_counts(values, origins)
    return Configuration(Settings(**values), origins, _slips(env))


Layer = tuple[str, object, str, str]  # key, raw value, origin, what the user called it


def _from_flags(flags: Mapping[str, object]) -> list[Layer]:
    return [(key, raw, f"flag {flag(key)}", flag(key)) for key, raw in flags.items() if raw is not None]


def _from_env(env: Mapping[str, str]) -> list[Layer]:
    """An empty variable is as good as none."""
    unknown = [name for name in env if name.startswith(PREFIX) and name not in VARIABLES]
    if unknown:
        raise ConfigError(f"the environment has {unknown[0]}, which is no setting{nearest(unknown[0], VARIABLES)}")
    found = [(key, name) for name, key in (STANDARD | VARIABLES).items() if env.get(name, "").strip()]
    return [(key, env[name].strip(), f"environment {name}", name) for key, name in found]


def _from_file(file: ConfigFile | None) -> list[Layer]:
    if file is None:
        return []
    try:
        table = tomllib.loads(file.text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file.name} is not valid TOML: {error}") from error
    layers: list[Layer] = []
    for key, raw in table.items():
        place = f"{file.name}:{line_of(key, file.text)}"
        if key not in KEYS:
            raise ConfigError(f"{place}: {key!r} is no setting{nearest(key, KEYS)}")
        if raw != "":  # as good as none, as in the environment
            layers.append((key, raw, place, key))
    return layers


def line_of(key: str, text: str) -> int:
    """The line, from 1, on which a top-level key or table begins."""
    pattern = re.compile(rf"""^\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)


def nearest(word: str, words: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The end of a sentence about an unknown word."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else "; `twolane config` lists them all"


def _where(origin: str) -> str:
    return f" ({origin})" if ":" in origin else ""


def _fit_counts(values: dict[str, Any], origins: dict[str, str]) -> None:
    """As many instances as GPU groups are named. ConfigError if a count that stands as high says something else."""
    for role in ("prefill", "decode"):
        groups = values.get(f"{role}_gpu", ())
        count = values.get(role)
        if not groups or count == len(groups):
            continue
        if count is not None:
            raise ConfigError(
                f"{role}={count} ({origins[role]}) does not fit {role}_gpu, which names {len(groups)} instances "
                f"({origins[role + '_gpu']}): leave one of them out"
            )
        values[role], origins[role] = len(groups), origins[f"{role}_gpu"]


def _slips(env: Mapping[str, str]) -> tuple[str, ...]:
    """Variables without our prefix that look like a setting misspelt. Only a warning: they may be another program's."""
    mine = [name for name in env if name.startswith(("PREFILL_", "DECODE_")) and name not in VARIABLES]
    close = {name: difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.85) for name in mine}
    return tuple(f"{name} in the environment is no setting; {near[0]} is" for name, near in close.items() if near)


def default_cache_dir(env: Mapping[str, str]) -> Path:
    base = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "twolane"
