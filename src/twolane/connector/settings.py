"""What the connector is configured with: `kv_connector_extra_config` and `kv_port`, parsed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from twolane.curve import Keys, derive_keys
from twolane.errors import ConfigError
from twolane.protocol import Transport


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of `kv_connector_extra_config`; an unknown one is an error.

    `host`: address the control socket binds, and by which the other side reaches it.
    `http_address`: this instance's own HTTP server, for the registration; empty: don't register.
    `name`: what people call this instance, such as decode-2; empty: its address does.
    `discovery_address`: the proxy's ZMQ socket, or several proxies' with commas; empty: don't register.
    `registration_secret_file`: the deployment's secret: with it this instance speaks only to those who know it too, and
    encrypts what it says (twolane.curve).
    `lease_s`: how long P keeps the blocks of a finished request without a word from D.
    `peer_timeout_s`: how long D waits for any word from P (handshake, pong, push) while a transfer is open.
    `transfer_timeout_s`: how long D waits for the next block of one transfer (covers P's queue and its prefill).
    `transport`: how KV moves; `auto` takes the best that both sides have: `cuda_ipc` or `shm` on one host, `nccl` or
    `tcp` between two.
    `slot_bytes`, `num_slots`: P's staging memory, and D's for `tcp`: what it may hold; 0: what suits the device.
    `head_start_ms`: D's engine takes a request up so long before its last byte is due, if it has nothing else to do,
    and if its scheduler is `twolane.connector.take_back.make_scheduler`; 0: never.
    `wait_on_gpu`: over `cuda_ipc` D's GPU waits for the last byte then, and not the engine's thread.
    `trace_file`: for benchmarks; see story.Story.
    `fault`: for tests only. `zero_kv` makes P send zeros in place of KV, to show that a comparison would notice;
    `drop_tenth` makes P lose every tenth message to D; `false_soon` makes it say that a prompt's end is due when D
    announces itself, and then wait.
    """

    host: str = "127.0.0.1"
    http_address: str = ""
    name: str = ""
    discovery_address: str = ""
    registration_secret_file: str = ""
    lease_s: float = 30.0
    peer_timeout_s: float = 20.0
    transfer_timeout_s: float = 300.0
    transport: Transport = "auto"
    slot_bytes: int = 0
    num_slots: int = 8
    head_start_ms: float = 8.0
    wait_on_gpu: bool = True
    trace_file: str = ""
    fault: Literal["", "zero_kv", "drop_tenth", "false_soon"] = ""


def read_secret(path: str) -> str:
    """The first line that isn't empty or a comment, as the proxy reads it. ConfigError names the file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"registration_secret_file {path}: {error.strerror}") from error
    secret = next((line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    if not secret:
        raise ConfigError(f"registration_secret_file {path} holds no secret: put one into its first line")
    return secret


def keys_of(settings: ConnectorSettings) -> Keys | None:
    """None: nothing is encrypted. Raises ConfigError."""
    path = settings.registration_secret_file
    return derive_keys(read_secret(path)) if path else None


def parse_settings(extra_config: dict[str, Any]) -> ConnectorSettings:
    """Raises ConfigError that names the key."""
    try:
        return msgspec.convert(extra_config, ConnectorSettings)
    except msgspec.ValidationError as error:
        keys = ", ".join(ConnectorSettings.__struct_fields__)
        raise ConfigError(f"kv_connector_extra_config: {error}. TwoLaneConnector knows these keys: {keys}.") from error
