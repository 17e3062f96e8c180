"""Clients that leave and instances that die: right tokens for whoever stays, and every block back."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import (
    Instance,
    Stack,
    all_free,
    complete,
    completion_body,
    on_port,
    wait_for,
)
from tests.ports import free_ports
from twolane.addresses import split_address

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LONG = 3000  # tokens: seconds of prefill, six chunks
# The proxy loses P's leg and takes D's back, or D sees P's death itself: whoever is first.
NOTICED_BY = ("peer_died", "cancelled")


def prefilling(prefill: Instance) -> bool:
    """In mid-prefill: the first chunks are through, more are to come."""
    return prefill.running() == 1 and prefill.used_blocks() > 0


def http_request(path: str, body: dict[str, object]) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: twolane\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


@pytest.mark.matrix
def test_a_client_that_leaves_in_mid_prefill_frees_both_sides(
    stack: Stack, prefill: Instance, decode: Instance
) -> None:
    wait_for("idle engines", lambda: all_free([prefill, decode]), 10)
    (prompt,) = make_prompts(seed=3, lengths=[LONG])
    body = completion_body(stack, prompt, 8)
    with socket.create_connection(split_address(stack.plan.proxy_address)) as client:
        client.sendall(http_request("/v1/completions", body))
        wait_for("a prefill", lambda: prefilling(prefill), 30)
        assert decode.used_blocks() > 0.05, "D's blocks wait for the KV"
    wait_for("all blocks back", lambda: all_free([prefill, decode]), 2.0)


def test_a_client_that_leaves_in_mid_stream_frees_both_sides(stack: Stack, prefill: Instance, decode: Instance) -> None:
    wait_for("idle engines", lambda: all_free([prefill, decode]), 10)
    (prompt,) = make_prompts(seed=4, lengths=[300])
    body = completion_body(stack, prompt, 4000, stream=True)
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: {"))
        for _ in range(3):
            assert json.loads(next(events)[6:])["choices"]
        assert decode.running() == 1
    wait_for("all blocks back", lambda: all_free([prefill, decode]), 2.0)


@pytest.fixture
def second_prefill(stack: Stack) -> Iterator[Instance]:
    """Another P, to be killed; the session's own P stays as the one to take over."""
    http_port, kv_port = free_ports(2)
    stack.start(on_port(stack.spec("prefill"), "second", http_port=http_port, kv_port=kv_port))
    yield stack.instances["second"]
    stack.instances.pop("second").child.stop(10.0)


def test_p_killed_in_mid_prefill_with_another_p(
    stack: Stack, prefill: Instance, decode: Instance, second_prefill: Instance, single_url: str
) -> None:
    """Two long prompts go to the two P; one P dies; both clients get the right tokens."""
    bodies = [completion_body(stack, prompt, 8) for prompt in make_prompts(seed=5, lengths=[LONG, LONG])]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(complete, stack.url, body) for body in bodies]
        wait_for("a prefill on each", lambda: prefilling(prefill) and prefilling(second_prefill), 30)
        second_prefill.kill()
        got = [answer.result() for answer in answers]
    assert got == [complete(single_url, body) for body in bodies]
    wait_for("all blocks back", lambda: all_free([prefill, decode]), 5)


@pytest.mark.matrix
def test_the_only_p_killed_in_mid_prefill_and_d_computes_alone(
    stack: Stack, prefill: Instance, decode: Instance, single_url: str
) -> None:
    """Last of all: the session's P is gone afterwards, and comes back at the end."""
    (prompt,) = make_prompts(seed=6, lengths=[LONG])
    body = completion_body(stack, prompt, 8)
    computed = decode.tokens_by_source()["local_compute"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, stack.url, body)
        wait_for("a prefill", lambda: prefilling(prefill), 30)
        prefill.kill()
        got = answer.result()
    assert got == complete(single_url, body)
    assert decode.tokens_by_source()["local_compute"] - computed > 1, "D computed what P didn't send"
    failed = [decode.metrics()[f'twolane_kv_receive_failures_total{{cause="{cause}"}}'] for cause in NOTICED_BY]
    assert sum(failed) >= 1
    wait_for("all blocks back", lambda: all_free([decode]), 5)
    health = httpx.get(f"{stack.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    prefill.child.stop(1.0)
    stack.start(stack.spec("prefill"))
    (again,) = make_prompts(seed=7, lengths=[500])
    computed = decode.tokens_by_source()["local_compute"]
    assert complete(stack.url, completion_body(stack, again, 8)) == complete(
        single_url, completion_body(stack, again, 8)
    )
    assert decode.tokens_by_source()["local_compute"] - computed == 1, "the P that came back is used"
