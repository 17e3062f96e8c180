"""What each setting is for, the table of settings, and the commented file that `twolane config --write` makes."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from twolane.errors import ConfigError
from twolane.launch.configuration import DEFAULT, KEYS, SECRET, Configuration, variable
from twolane.launch.values import shown

HELP = {
    "model": "the model's folder, or its name on the hub",
    "prefill_gpu": "GPUs of prefill instances: 0,1 is two instances, 0+1 one with tensor parallelism 2",
    "decode_gpu": "the same of decode instances; where nothing is said, GPUs are given out",
    "prefill": "how many prefill instances",
    "decode": "how many decode instances",
    "prefill_http_port": "HTTP port of the first prefill instance; the next count on by 10",
    "decode_http_port": "the same of decode instances",
    "prefill_kv_port": "KV port of the first prefill instance, one more for each rank; the next count on by 10",
    "decode_kv_port": "the same of decode instances",
    "http_proxy_port": "the proxy's OpenAI server",
    "proxy_port": "where instances register at the proxy",
    "timeout_seconds": "how long a start may take",
    "host": "address at which the proxy listens",
    "kv": "twolane, or vLLM's own connector where this vLLM has it: nixl, p2pnccl",
    "transport": "how TwoLane's connector moves KV: auto (the best that both sides have), cuda_ipc, shm, nccl or tcp",
    "max_model_len": "longest prompt and answer together, in tokens",
    "vllm_args": "more options for every vLLM instance",
    "prefill_args": "more options for prefill instances",
    "decode_args": "more options for decode instances",
    "restart_tries": "an instance that ends more often than this is given up ...",
    "restart_minutes": "... within so many minutes",
    "drain_seconds": "seconds that `restart` and `scale` leave an instance to end its requests",
    "log_max_mb": "a log that grows larger moves to NAME.log.1",
    "policy": "how the proxy chooses: least_loaded, round_robin or prefix_affinity",
    "min_prefill_tokens": "prompts shorter than this go to a decode instance alone; 0: never",
    "max_prefill_queue": "so do all, while every prefill instance has so many requests; 0: never",
    "max_in_flight": "requests served at once",
    "max_queued": "requests that may wait for their turn; more get 429",
    "queue_timeout": "seconds that a request waits for its turn",
    "power_csv": "file into which the power of the GPUs is recorded; beyond 100 MB it moves to NAME.1",
    "power_every": "seconds between two looks at it, while it is recorded or a dashboard shows it",
    "discovery_host": "address at which instances register",
    "registration_secret_file": "file with the secret that all instances share; needed off loopback",
    "allow_network": "networks (CIDR) in which registered instances may be",
    "api_key": "clients need one of these keys",
    "api_key_file": "file with more of them, one a line",
    "upstream_api_key": "what the instances were given as --api-key",
    "otlp_endpoint": "OpenTelemetry collector (OTLP over HTTP) that gets a span tree a request, as http://127.0.0.1:4318",
    "log_dir": "folder of the logs",
    "cache_dir": "folder of the converted default model",
    "ray": "place the instances on a Ray cluster: its address, or auto (docs/CLUSTER.md)",
}


def visible(made: Configuration, key: str) -> str:
    """The value as it would be written, but no secret."""
    value = shown(getattr(made.settings, key))
    return "(hidden)" if key in SECRET and value else value


def table(made: Configuration) -> list[str]:
    """Key, value, where it came from; where that is the default, the variable that changes it."""
    rows = []
    for key in KEYS:
        origin = made.origins[key]
        value = visible(made, key) or "-"
        rows.append((key, value, f"{origin} ({variable(key)})" if origin == DEFAULT else origin))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for key, value, origin in rows]


def as_dict(made: Configuration) -> dict[str, dict[str, str]]:
    return {key: {"value": visible(made, key), "from": made.origins[key]} for key in KEYS}


def toml_text(made: Configuration) -> str:
    """Every setting with its comment; those that are at their default stand as comments themselves."""
    lines = [
        "# TwoLane's settings. Flags and environment variables win over what stands here; `twolane config` shows all."
    ]
    for key in KEYS:
        line = f"{key} = {_toml(key, '' if key in SECRET else getattr(made.settings, key))}"
        lines += ["", f"# {HELP[key]} ({variable(key)})", ("# " if made.origins[key] == DEFAULT else "") + line]
    return "\n".join(lines) + "\n"


def _toml(key: str, value: object) -> str:
    if isinstance(value, tuple) and (not value or isinstance(value[0], str)) and not key.endswith("_gpu"):
        return json.dumps(list(value))
    text = shown(value)
    return text if isinstance(value, int | float) else json.dumps(text, ensure_ascii=False)


def write(made: Configuration, path: Path, console: Console) -> None:
    """ConfigError if there is one already."""
    try:
        with path.open("x") as file:
            file.write(toml_text(made))
    except FileExistsError:
        raise ConfigError(f"{path} is there already: edit it, or move it away first") from None
    console.print(f"wrote {path}", markup=False)
