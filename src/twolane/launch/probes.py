"""Questions over HTTP to services on this machine, each with a deadline. Blocking: event loops run them in a thread."""

from __future__ import annotations

import http.client
import json
from typing import Any

from twolane.launch.plan import ServiceSpec

PROBE_TIMEOUT_S = 5.0
# What an engine has to do; blocks in the prefix cache alone count as free.
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
TOKEN_TIMEOUT_S = 120.0  # the first token of a cold engine


def request(
    address: str, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[int, bytes]:
    """One request on a connection of its own. OSError or http.client.HTTPException if there is no whole answer."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def get_json(address: str, path: str) -> Any:
    """The parsed body of a 200, None for anything else."""
    try:
        status, body = request(address, "GET", path)
        return json.loads(body) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def is_healthy(spec: ServiceSpec) -> bool:
    try:
        return request(spec.address, "GET", "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def serves_a_token(spec: ServiceSpec, model_name: str) -> bool:
    """Asks the instance itself, not the proxy, for one token. True if one came."""
    body = {"model": model_name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    try:
        status, answer = request(spec.address, "POST", "/v1/completions", body, TOKEN_TIMEOUT_S)
        return status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 1
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return False


def is_idle(spec: ServiceSpec) -> bool:
    """Whether its engine has no request and holds no KV blocks for others (P does, until D has them). True if it
    doesn't say."""
    try:
        status, body = request(spec.address, "GET", "/metrics")
    except (OSError, http.client.HTTPException):
        return True
    lines = body.decode(errors="replace").splitlines() if status == 200 else []
    return not any(line.startswith(BUSY) and float(line.rpartition(" ")[2]) > 0 for line in lines)


def instances(proxy_address: str) -> list[dict[str, Any]] | None:
    """What the proxy knows of its instances; None if it doesn't answer."""
    stats = get_json(proxy_address, "/stats")
    return stats.get("instances", []) if isinstance(stats, dict) else None


def known_instances(proxy_address: str) -> list[str]:
    """In words."""
    return [f"{entry.get('address')} ({entry.get('state')})" for entry in instances(proxy_address) or []]


def is_registered(proxy_address: str, spec: ServiceSpec) -> bool:
    """Whether the proxy would send requests to this instance."""
    known = instances(proxy_address) or []
    return any(entry.get("address") == spec.address and entry.get("state") == "ready" for entry in known)


def proxy_answers(proxy_address: str) -> bool:
    return isinstance(get_json(proxy_address, "/stats"), dict)
