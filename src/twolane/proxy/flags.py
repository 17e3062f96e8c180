"""The settings of `twolane proxy`, made into the proxy's own. Raises ConfigError, which names flag and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from twolane.addresses import split_address
from twolane.config import ProxySettings, Settings, StaticInstance
from twolane.errors import ConfigError
from twolane.protocol import Kind, Role


def proxy_settings(settings: Settings, prefills: Sequence[str], decodes: Sequence[str]) -> ProxySettings:
    """Reads the files that the settings name."""
    secret_file = settings.registration_secret_file
    return ProxySettings(
        host=settings.host,
        http_port=settings.http_proxy_port,
        discovery_host=settings.discovery_host,
        discovery_port=settings.proxy_port,
        registration_secret=read_keys(secret_file)[0] if secret_file else "",
        allowed_networks=settings.allow_network,
        instances=parse_instances(prefills, decodes, settings.kv),
        api_keys=all_keys(settings.api_key, settings.api_key_file),
        upstream_api_key=settings.upstream_api_key,
        policy=settings.policy,
        min_prefill_tokens=settings.min_prefill_tokens,
        max_prefill_queue=settings.max_prefill_queue,
        max_in_flight=settings.max_in_flight,
        max_queued=settings.max_queued,
        queue_timeout_s=settings.queue_timeout,
        power_csv=settings.power_csv,
        power_every_s=settings.power_every,
        otlp_endpoint=settings.otlp_endpoint,
        log_dir=settings.log_dir,
    )


def parse_instances(prefills: Sequence[str], decodes: Sequence[str], kind: str) -> tuple[StaticInstance, ...]:
    """`--prefill`, `--decode` and `--kv`."""
    known: tuple[Kind, ...] = get_args(Kind)
    kinds = [k for k in known if k == kind]
    if not kinds:
        raise ConfigError(f"--kv {kind} is unknown; known are {', '.join(known)}")
    named: list[tuple[Role, str]] = [*(("P", url) for url in prefills), *(("D", url) for url in decodes)]
    instances = tuple(_parse_instance(role, text, kinds[0]) for role, text in named)
    if len({(i.role, i.address) for i in instances}) < len(instances):
        raise ConfigError("--prefill or --decode names the same instance twice; leave one of them out")
    return instances


def _parse_instance(role: Role, text: str, kind: Kind) -> StaticInstance:
    flag = "--prefill" if role == "P" else "--decode"
    url, _, control_address = text.partition("=")
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "http":
        raise ConfigError(f"{flag} {text}: instances are reached over http://, not {scheme}://")
    address = (rest if separator else url).removesuffix("/")
    if kind != "nixl" and not control_address:
        raise ConfigError(
            f"{flag} {text} needs the instance's control address for --kv {kind}, "
            f"such as {flag} http://127.0.0.1:20003=127.0.0.1:21001"
        )
    for part in (address, control_address):
        try:
            _ = part and split_address(part)
        except ValueError as error:
            raise ConfigError(f"{flag} {text}: {error}") from error
    return StaticInstance(role, address, kind, control_address)


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and those that begin with # are left out. ConfigError if there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of keys {path} can't be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"the file of keys {path} holds no key; write one a line")
    return keys


def all_keys(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    """Raises ConfigError for a key that can't be put into a header."""
    keys = (*given, *(read_keys(file) if file is not None else ()))
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ConfigError("a key is empty or holds characters other than printable ASCII")
    return keys
