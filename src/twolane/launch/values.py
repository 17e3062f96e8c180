"""Pure: one raw value (a word of the command line or environment, or what TOML holds) -> what config.Settings takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from twolane.config import KV_KINDS, MAX_INSTANCES, GpuGroups, Policy
from twolane.protocol import Transport

GPU_LIST = re.compile(r"\d+(\+\d+)*(,\d+(\+\d+)*)*")


class WrongValueError(ValueError):
    """Ends a sentence that begins with the setting and its value."""


def whole(low: int, high: int) -> Callable[[object], int]:
    def parse(raw: object) -> int:
        text = str(raw).strip()
        if isinstance(raw, bool) or not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise WrongValueError(f"is not a whole number from {low} to {high}")
        return int(text)

    return parse


def seconds(raw: object) -> float:
    return float(whole(1, 86400)(raw))


def number(raw: object) -> float:
    try:
        value = float(str(raw))
    except ValueError:
        value = 0.0
    if isinstance(raw, bool) or not 0 < value < 1e6:
        raise WrongValueError("is not a number above 0")
    return value


def pace(raw: object) -> float:
    value = number(raw)
    if not 0.01 <= value <= 60:
        raise WrongValueError("is not a number of seconds from 0.01 to 60")
    return value


def gpus(raw: object) -> GpuGroups:
    """`0,1`: two instances. `0+1`: one with tensor parallelism 2."""
    text = str(raw).replace(" ", "")
    if isinstance(raw, bool) or not GPU_LIST.fullmatch(text):
        raise WrongValueError("is not a list of GPU numbers: 0,1 is two instances, 0+1 one with tensor parallelism 2")
    groups = tuple(tuple(int(part) for part in group.split("+")) for group in text.split(","))
    for group in groups:
        if len(set(group)) < len(group):
            raise WrongValueError(f"names GPU {group[0]} twice in one instance")
    return groups


def string(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise WrongValueError('is not a text, such as "abc"')
    return raw


def words(raw: object) -> tuple[str, ...]:
    """A list of texts, or one text that is split as a shell does."""
    if isinstance(raw, list | tuple) and all(isinstance(word, str) for word in raw):
        return tuple(raw)
    if not isinstance(raw, str):
        raise WrongValueError('is not a list of texts, such as ["--seed", "1"]')
    try:
        return tuple(shlex.split(raw))
    except ValueError as error:
        raise WrongValueError(f"can't be split into words: {error}") from error


def kv(raw: object) -> str:
    if raw not in KV_KINDS:
        raise WrongValueError(f"is none of {', '.join(KV_KINDS)}")
    return str(raw)


def transport(raw: object) -> str:
    if raw not in get_args(Transport):
        raise WrongValueError(f"is none of {', '.join(get_args(Transport))}")
    return str(raw)


def policy(raw: object) -> str:
    if raw not in get_args(Policy):
        raise WrongValueError(f"is none of {', '.join(get_args(Policy))}")
    return str(raw)


def path(raw: object) -> Path:
    return Path(string(raw)).expanduser()


port = whole(1024, 65535)
count = whole(1, MAX_INSTANCES)
PARSERS: dict[str, Callable[[object], Any]] = {
    "model": string,
    "prefill_gpu": gpus,
    "decode_gpu": gpus,
    "prefill": count,
    "decode": count,
    "prefill_http_port": port,
    "decode_http_port": port,
    "prefill_kv_port": port,
    "decode_kv_port": port,
    "http_proxy_port": whole(0, 65535),  # 0: any that is free, for a proxy that stands alone
    "proxy_port": whole(0, 65535),
    "timeout_seconds": seconds,
    "host": string,
    "kv": kv,
    "transport": transport,
    "max_model_len": whole(1, 1 << 30),
    "vllm_args": words,
    "prefill_args": words,
    "decode_args": words,
    "restart_tries": whole(1, 1000),
    "restart_minutes": number,
    "drain_seconds": seconds,
    "log_max_mb": whole(1, 100_000),
    "policy": policy,
    "min_prefill_tokens": whole(0, 1 << 30),
    "max_prefill_queue": whole(0, 1 << 30),
    "max_in_flight": whole(1, 1 << 20),
    "max_queued": whole(0, 1 << 20),
    "queue_timeout": number,
    "power_csv": path,
    "power_every": pace,
    "discovery_host": string,
    "registration_secret_file": path,
    "allow_network": words,
    "api_key": words,
    "api_key_file": path,
    "upstream_api_key": string,
    "otlp_endpoint": string,
    "log_dir": path,
    "cache_dir": path,
    "ray": string,
}


def shown(value: object) -> str:
    """A value as it would be written on the command line; empty for none."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return ",".join("+".join(str(gpu) for gpu in group) for group in value)
        return shlex.join(str(word) for word in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
