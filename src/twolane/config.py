"""Settings, frozen: parsed once at the edge (flags, environment), trusted inside.

Defaults are the ports that followers of the old P2pNcclConnector recipe have in their scripts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twolane.errors import ConfigError
from twolane.protocol import Kind, Role

HTTP_PORT = 10001
DISCOVERY_PORT = 30001
PREFILL_PORT = 20003
DECODE_PORT = 20005
PREFILL_KV_PORT = 21001
DECODE_KV_PORT = 22001
Policy = Literal["least_loaded", "round_robin", "prefix_affinity"]
MAX_INSTANCES = 64  # of a role; see launch/plan.py for how ports are counted on


@dataclass(frozen=True)
class StaticInstance:
    """An instance named by a flag instead of a registration."""

    role: Role
    address: str  # host:port of its OpenAI server
    kind: Kind
    control_address: str = ""  # host:port; kind nixl needs none


@dataclass(frozen=True)
class ProxySettings:
    """What `twolane proxy` runs with. Every wait of the proxy has its deadline here."""

    host: str = "127.0.0.1"
    http_port: int = HTTP_PORT
    discovery_host: str = "127.0.0.1"  # apart from `host`: clients may be elsewhere while the instances are here
    discovery_port: int = DISCOVERY_PORT
    registration_secret: str = ""  # needed where `discovery_host` is not loopback
    allowed_networks: tuple[str, ...] = ("127.0.0.0/8", "::1/128")  # where a registered instance may be
    instances: tuple[StaticInstance, ...] = ()
    api_keys: tuple[str, ...] = ()  # of clients; empty: anyone may ask
    upstream_api_key: str = ""  # what the instances want to see in place of the client's key
    policy: Policy = "least_loaded"
    min_prefill_tokens: int = 0  # a shorter prompt goes to D alone; 0: never
    max_prefill_queue: int = 0  # all P have so many requests in flight: D alone; 0: never
    max_in_flight: int = 4096  # generating requests served at once
    max_queued: int = 1024  # more, that wait for their turn
    queue_timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    head_timeout_s: float = 15.0  # a client's request head, from its first byte
    body_timeout_s: float = 60.0  # a client's request body
    idle_timeout_s: float = 75.0  # a kept-alive client connection between requests
    prefill_timeout_s: float = 600.0  # P's whole leg
    first_byte_timeout_s: float = 600.0  # D's answer, sent to first byte
    stream_idle_timeout_s: float = 300.0  # the longest silence inside D's answer
    health_every_s: float = 1.0  # probes of an instance that is not ready
    health_ready_every_s: float = 5.0  # probes of one that is: a hung one refuses no connection
    registration_expiry_s: float = 15.0
    drain_timeout_s: float = 30.0  # SIGTERM to exit, while streams end
    health_timeout_s: float = 5.0  # one probe
    prefill_linger_s: float = 1.0  # P's answer, after D's has ended: later than that its leg is cut
    upstream_idle_s: float = 4.0  # a kept-alive connection to an instance; vLLM's server closes its own after 5 s
    linger_s: float = 2.0  # a refused client's unread bytes, so that it still reads why
    max_head_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    max_held_body_bytes: int = 8 * 1024 * 1024  # D's answer, if not a stream, is held until it is whole


# --- what the launcher runs with --------------------------------------------------------------------------------------

GPU_LIST = re.compile(r"\d+(,\d+)*")


@dataclass(frozen=True)
class Settings:
    """What `twolane up` runs with. Paths are as given: relative ones count from the working directory."""

    model: str | None = None  # None: the default model
    host: str = "127.0.0.1"  # of the proxy; instances are on loopback always
    http_port: int = HTTP_PORT
    discovery_port: int = DISCOVERY_PORT
    prefill_port: int = PREFILL_PORT
    decode_port: int = DECODE_PORT
    prefill_kv_port: int = PREFILL_KV_PORT
    decode_kv_port: int = DECODE_KV_PORT
    prefill_gpus: tuple[int, ...] = ()  # one instance a GPU; empty: GPUs are given out
    decode_gpus: tuple[int, ...] = ()
    num_prefill: int = 1
    num_decode: int = 1
    max_model_len: int | None = None  # None: the model's own, but 8192 at most without a GPU
    vllm_args: tuple[str, ...] = ()  # for every instance
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    start_timeout_s: float = 600.0
    log_dir: Path = Path("logs")
    state_dir: Path = Path(".twolane")
    cache_dir: Path = Path(".twolane/cache")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Reads upper-case variables of the fields' names. ConfigError names variable, value and what is allowed."""
        prefill_gpus, decode_gpus = _gpus(env, "PREFILL_GPUS"), _gpus(env, "DECODE_GPUS")
        max_model_len = _whole(env, "MAX_MODEL_LEN", 0, (1, 1 << 30))
        return cls(
            model=env.get("MODEL") or None,
            host=env.get("HOST") or "127.0.0.1",
            http_port=_port(env, "HTTP_PORT", HTTP_PORT),
            discovery_port=_port(env, "DISCOVERY_PORT", DISCOVERY_PORT),
            prefill_port=_port(env, "PREFILL_PORT", PREFILL_PORT),
            decode_port=_port(env, "DECODE_PORT", DECODE_PORT),
            prefill_kv_port=_port(env, "PREFILL_KV_PORT", PREFILL_KV_PORT),
            decode_kv_port=_port(env, "DECODE_KV_PORT", DECODE_KV_PORT),
            prefill_gpus=prefill_gpus,
            decode_gpus=decode_gpus,
            num_prefill=_count(env, "NUM_PREFILL", prefill_gpus),
            num_decode=_count(env, "NUM_DECODE", decode_gpus),
            max_model_len=max_model_len or None,
            vllm_args=_words(env, "VLLM_ARGS"),
            prefill_args=_words(env, "PREFILL_ARGS"),
            decode_args=_words(env, "DECODE_ARGS"),
            start_timeout_s=float(_whole(env, "START_TIMEOUT_S", 600, (1, 86400))),
            log_dir=Path(env.get("LOG_DIR") or "logs"),
            cache_dir=_cache_dir(env),
        )


def _whole(env: Mapping[str, str], name: str, default: int, limits: tuple[int, int]) -> int:
    """A whole number within `limits`; `default` where the variable is unset or empty."""
    text = env.get(name, "").strip()
    if not text:
        return default
    low, high = limits
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise ConfigError(f"{name}={text!r} is not a whole number from {low} to {high}")
    return int(text)


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    return _whole(env, name, default, (1024, 65535))


def _gpus(env: Mapping[str, str], name: str) -> tuple[int, ...]:
    text = env.get(name, "").replace(" ", "")
    if not text:
        return ()
    if not GPU_LIST.fullmatch(text):
        raise ConfigError(f"{name}={text!r} is not a list of GPU numbers such as 0 or 0,1 (one instance a GPU)")
    return tuple(int(number) for number in text.split(","))


def _count(env: Mapping[str, str], name: str, gpus: tuple[int, ...]) -> int:
    """How many instances of a role: NUM_..., or one for each GPU named."""
    count = _whole(env, name, len(gpus) or 1, (1, MAX_INSTANCES))
    if gpus and count != len(gpus):
        gpus_name = name.replace("NUM_", "") + "_GPUS"
        raise ConfigError(f"{name}={count} does not fit {gpus_name}, which names {len(gpus)}: leave one of them out")
    return count


def _words(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(env.get(name, "")))
    except ValueError as error:
        raise ConfigError(f"{name}={env[name]!r} can't be split into words: {error}") from error


def _cache_dir(env: Mapping[str, str]) -> Path:
    if env.get("TWOLANE_CACHE"):
        return Path(env["TWOLANE_CACHE"]).expanduser()
    base = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "twolane"
