"""Pure: how vLLM's connector of an instance is configured, for TwoLane's own and for vLLM's."""

from __future__ import annotations

from pathlib import Path

import msgspec

from twolane.config import Kv, Settings
from twolane.errors import ConfigError

# Where a vLLM that has the connector keeps it, below its package's folder.
FILES: dict[Kv, tuple[str, ...]] = {
    "twolane": (),
    "nixl": ("nixl", "nixl_connector.py"),
    "p2pnccl": ("p2p", "p2p_nccl_connector.py"),
}
SCHEDULER = "twolane.connector.take_back.make_scheduler"
CONNECTORS = "distributed/kv_transfer/kv_connector/v1"


class Place(msgspec.Struct, frozen=True):
    """Where an instance is. The default: on one machine, where all are on loopback.

    `host`: what it binds, and where others reach it; empty: not known yet. `secret_file`: the deployment's secret;
    empty: there is none. `log_dir`: in place of the settings'.
    """

    host: str = "127.0.0.1"
    discovery_host: str = "127.0.0.1"
    secret_file: str = ""
    log_dir: str = ""


def check_kv(kv: Kv, engine: str, vllm_folder: Path | None) -> None:
    """ConfigError if this vLLM has no such connector, or no use for it. Looks at file names only."""
    if kv == "twolane":
        return
    if engine == "cpu":
        raise ConfigError(f"--kv {kv} needs the GPU engine, but the CPU engine is installed: use --kv twolane")
    folder = vllm_folder / CONNECTORS if vllm_folder else Path("/nonexistent")
    if not any((folder / name).exists() for name in FILES[kv]):
        why = "vLLM removed it after 0.23" if kv == "p2pnccl" else "it is not in this build"
        raise ConfigError(f"--kv {kv}: this vLLM has no such connector ({why}): use --kv twolane")


def kv_config(
    settings: Settings, role: str, name: str, http_port: int, kv_port: int, place: Place
) -> dict[str, object]:
    """`--kv-transfer-config` of one instance."""
    discovery = (place.discovery_host, settings.proxy_port)
    kv = settings.kv
    kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
    address = f"{place.host}:{http_port}"
    if kv == "nixl":
        return {"kv_connector": "NixlConnector", "kv_role": kv_role}
    if kv == "p2pnccl":
        extra = {"proxy_ip": discovery[0], "proxy_port": str(discovery[1]), "http_port": str(http_port)}
        return {
            "kv_connector": "P2pNcclConnector",
            "kv_role": kv_role,
            "kv_port": str(kv_port),
            "kv_buffer_size": "1e9" if role == "prefill" else "8e9",
            "kv_connector_extra_config": extra | {"send_type": "PUT_ASYNC"},
        }
    extra = {} if settings.transport == "auto" else {"transport": settings.transport}
    if place.secret_file:
        extra["registration_secret_file"] = place.secret_file
    return {
        "kv_connector": "TwoLaneConnector",
        "kv_connector_module_path": "twolane.connector",
        "kv_role": kv_role,
        "kv_port": kv_port,
        "kv_load_failure_policy": "recompute",  # vLLM's default fails the request
        "kv_connector_extra_config": {
            "host": place.host,
            "http_address": address,
            "name": name,
            "discovery_address": f"{discovery[0]}:{discovery[1]}",
            **extra,
        },
    }


def kv_args(settings: Settings, role: str, given: list[str]) -> list[str]:
    """What belongs to the connector beside its configuration. `given`: the user's own arguments, which come first."""
    if settings.kv != "twolane" or role == "prefill" or any(word.startswith("--scheduler-cls") for word in given):
        return []
    return ["--scheduler-cls", SCHEDULER]  # without it D gives no head start


def without_kv(argv: tuple[str, ...]) -> tuple[str, ...]:
    """An instance's command line without its connector: vLLM as it is without us."""
    kept, words = [], iter(argv)
    for word in words:
        if word in ("--kv-transfer-config", "--scheduler-cls"):
            next(words)
        else:
            kept.append(word)
    return tuple(kept)


def kv_env(kv: Kv, kv_port: int) -> dict[str, str]:
    """What the connector reads from the environment."""
    if kv == "nixl":
        return {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port)}
    if kv == "p2pnccl":
        return {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return {}
