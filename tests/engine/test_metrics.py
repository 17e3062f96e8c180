"""What real engines tell of themselves, by way of the proxy."""

from __future__ import annotations

import time

import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import Stack, complete, completion_body
from tests.proxy.pages import Scrape
from twolane.launch.probes import request
from twolane.proxy.engine_numbers import EngineNumbers, read_page

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def page(stack: Stack, path: str) -> str:
    status, body = request(stack.plan.proxy_address, "GET", path)
    assert status == 200, body
    return body.decode()


def test_a_request_through_both_lanes_moves_the_numbers_of_both_engines(stack: Stack) -> None:
    before = Scrape(page(stack, "/metrics"))
    (prompt,) = make_prompts(77, [300])
    complete(stack.url, completion_body(stack, prompt, 8))
    for name in ("prefill", "decode"):
        told = {field for fields in read_page(page(stack, f"/instances/{name}/metrics").encode()) for field in fields}
        assert told == set(EngineNumbers.__struct_fields__) - {"at", "epoch", "kv_bytes_per_s"}

    def moved(after: Scrape, metric: str, **labels: str) -> float:
        return after.value(metric, **labels) - before.value(metric, **labels)

    # Engines pass their counters on between steps, and the proxy asks again when its numbers are a second old.
    for _ in range(60):
        after = Scrape(page(stack, "/metrics"))
        if moved(after, "engine_kv_received_tokens_total") and moved(after, "engine_kv_sent_tokens_total"):
            break
        time.sleep(0.5)
    assert moved(after, "engine_kv_received_transfers_total", name="decode", lane="decode") == 1
    assert moved(after, "engine_kv_received_tokens_total", name="decode") == 299
    assert moved(after, "engine_kv_received_bytes_total", name="decode") > 0
    assert moved(after, "engine_kv_sent_tokens_total", name="prefill", lane="prefill") == 299
    assert moved(after, "engine_generated_tokens_total", name="decode") == 8
    assert moved(after, "engine_prompt_tokens_by_source_total", name="decode", source="local_compute") == 1
    assert moved(after, "engine_prompt_tokens_by_source_total", name="prefill", source="local_compute") == 300
    assert moved(after, "requests_total", route="/v1/completions", outcome="ok") == 1
    assert after.value("instance_state", name="decode", state="ready") == 1
    engine = next(i["engine"] for i in stack.stats()["instances"] if i["role"] == "D")
    assert engine["kv_bytes_per_s"] is not None
    assert 0 <= engine["kv_usage"] <= 1
