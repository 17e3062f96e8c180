"""Settings, frozen: parsed once at the edge (flags, environment), trusted inside.

Defaults are the ports that followers of the old P2pNcclConnector recipe have in their scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twolane.protocol import Kind, Role, Transport

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
    """What the proxy runs with. Every wait of the proxy has its deadline here."""

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
    health_ready_every_s: float = 2.0  # probes of one that is: so long may the death of an idle one go unnoticed
    registration_expiry_s: float = 15.0
    drain_timeout_s: float = 30.0  # SIGTERM to exit, while streams end
    health_timeout_s: float = 5.0  # one probe
    engines_every_s: float = 5.0  # each instance's own /metrics is read
    engines_watched_every_s: float = 1.0  # the same while somebody watches; older numbers are no answer to a scrape
    engines_timeout_s: float = 5.0  # one such page
    engines_wait_s: float = 1.0  # a scrape of ours waits so long for new numbers
    prefill_linger_s: float = 1.0  # P's answer, after D's has ended: later than that its leg is cut
    upstream_idle_s: float = 4.0  # a kept-alive connection to an instance; vLLM's server closes its own after 5 s
    linger_s: float = 2.0  # a refused client's unread bytes, so that it still reads why
    max_engine_page_bytes: int = 2 * 1024 * 1024  # of an instance's /metrics
    power_csv: Path | None = None  # where the GPUs' power is recorded
    power_every_s: float = 0.1  # how often they are asked, while it is recorded or watched
    otlp_endpoint: str = ""  # of an OpenTelemetry collector, OTLP over HTTP; empty: no spans
    max_head_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    log_dir: Path | None = None  # where the launcher keeps the instances' logs, for the dashboard
    max_held_body_bytes: int = 8 * 1024 * 1024  # D's answer, if not a stream, is held until it is whole


# --- what the launcher runs with --------------------------------------------------------------------------------------

Kv = Literal["twolane", "nixl", "p2pnccl"]
KV_KINDS: tuple[Kv, ...] = ("twolane", "nixl", "p2pnccl")
GpuGroups = tuple[tuple[int, ...], ...]  # a group an instance: its GPUs, one a tensor-parallel rank


@dataclass(frozen=True)
class Settings:
    """What `twolane up` runs with. Paths are as given: relative ones count from the working directory.

    A field's name is its key in twolane.toml and, with dashes, its flag; launch/configuration.py has the rest.
    """

    model: str | None = None  # None: the default model
    prefill_gpu: GpuGroups = ()  # empty: GPUs are given out
    decode_gpu: GpuGroups = ()
    prefill: int = 1  # how many instances
    decode: int = 1
    prefill_http_port: int = PREFILL_PORT
    decode_http_port: int = DECODE_PORT
    prefill_kv_port: int = PREFILL_KV_PORT
    decode_kv_port: int = DECODE_KV_PORT
    http_proxy_port: int = HTTP_PORT  # where clients ask
    proxy_port: int = DISCOVERY_PORT  # where instances register
    timeout_seconds: float = 600.0  # for a start
    host: str = "127.0.0.1"  # of the proxy; instances are on loopback, or at their Ray node's address
    kv: Kv = "twolane"
    transport: Transport = "auto"  # of TwoLane's connector
    max_model_len: int | None = None  # None: the model's own, but 8192 at most without a GPU
    vllm_args: tuple[str, ...] = ()  # for every instance
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    restart_tries: int = 5  # an instance that ends more often than this ...
    restart_minutes: float = 10.0  # ... within this time is given up
    drain_seconds: float = 60.0  # what an instance has for its requests, before `restart` and `scale` stop it
    log_max_mb: int = 100  # a log that grows larger moves to NAME.log.1
    # The proxy's own; ProxySettings says more of each.
    policy: Policy = ProxySettings.policy
    min_prefill_tokens: int = ProxySettings.min_prefill_tokens
    max_prefill_queue: int = ProxySettings.max_prefill_queue
    max_in_flight: int = ProxySettings.max_in_flight
    max_queued: int = ProxySettings.max_queued
    queue_timeout: float = ProxySettings.queue_timeout_s
    power_csv: Path | None = None
    power_every: float = ProxySettings.power_every_s
    discovery_host: str = ProxySettings.discovery_host
    registration_secret_file: Path | None = None
    allow_network: tuple[str, ...] = ProxySettings.allowed_networks
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    upstream_api_key: str = ""
    otlp_endpoint: str = ProxySettings.otlp_endpoint
    log_dir: Path = Path("logs")
    cache_dir: Path = Path(".twolane/cache")
    ray: str = ""  # address of a Ray cluster that instances are placed on, or `auto`; empty: this machine
    state_dir: Path = Path(".twolane")  # not a key: it says where to look for what runs
