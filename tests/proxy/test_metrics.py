"""What Prometheus reads at /metrics: right after known requests, whole, and never more with more requests."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.proxy.pages import Scrape, scrape, tell_engine_page
from tests.proxy.scripted import MODEL, Behaviour, Cluster, cluster, eventually, hang, paced
from tests.proxy.test_failover import fail_with_500 as fail
from tests.proxy.test_failover import once, reset, wait_for_kv

from twolane.proxy.histogram import BOUNDS_S
from twolane.proxy.pool import State

HISTOGRAMS = ("time_to_first_token", "inter_token_latency", "handoff", "request_duration")


async def test_everything_has_help_and_type_and_a_name_as_prometheus_wants_it() -> None:
    async with cluster() as c:
        c.d.tell = c.p.tell = tell_engine_page
        await c.complete(stream=True)
        page = await scrape(c)
    assert len(page.families) > 35
    for family in page.families.values():
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.name.startswith("twolane_proxy_")
        assert f"# HELP {family.name}" in page.text
        for sample in family.samples:
            assert not {"instance", "job"} & set(sample.labels), "Prometheus sets these itself"
            if family.type == "counter":
                assert sample.name.endswith("_total")
    series = [(s.name, tuple(sorted(s.labels.items()))) for s in page.samples]
    assert len(series) == len(set(series))


async def leave(c: Cluster) -> None:
    """A client that goes while D computes."""
    c.d.behave = hang
    _, writer = await c.connect()
    body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await eventually(lambda: c.view(c.d).in_flight == 1)
    writer.close()
    await eventually(lambda: c.view(c.d).in_flight == 0)


async def test_counts_by_route_and_outcome_after_known_requests() -> None:
    async with cluster() as c:
        before = await scrape(c)
        assert before.value("requests_total", route="/v1/completions", outcome="ok") == 0  # from the first scrape on
        for stream in (True, True, False):
            assert (await c.complete(stream=stream)).status_code == 200
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        await c.http.post("/v1/chat/completions", json=chat)
        await c.http.post("/v1/completions", content=b"no JSON")
        for number in range(3):
            await c.http.post(f"/v1/nothing-{number}", json={})
        c.d.behave = fail
        assert (await c.complete()).status_code == 502
        await leave(c)
        page = await scrape(c)
    outcomes = {
        (s.labels["route"], s.labels["outcome"]): s.value
        for s in page.samples
        if s.name == "twolane_proxy_requests_total" and s.value
    }
    assert outcomes == {
        ("/v1/completions", "ok"): 3,
        ("/v1/chat/completions", "ok"): 1,
        ("/v1/completions", "rejected"): 1,
        ("/v1/completions", "upstream_failed"): 1,
        ("/v1/completions", "client_left"): 1,
        ("unknown", "rejected"): 3,
    }
    assert page.value("request_duration_seconds_count") == 4
    assert page.value("time_to_first_token_seconds_count") == 2


async def test_histograms_are_whole() -> None:
    async with cluster() as c:
        c.d.behave = paced(4)
        for _ in range(3):
            await c.complete(stream=True)
        page = await scrape(c)
    for name in HISTOGRAMS:
        buckets = {s.labels["le"]: s.value for s in page.samples if s.name == f"twolane_proxy_{name}_seconds_bucket"}
        assert [float(le) for le in buckets] == [*BOUNDS_S, float("inf")]
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets["+Inf"] == page.value(f"{name}_seconds_count")
    assert page.value("request_duration_seconds_count") == 3
    assert page.value("request_duration_seconds_sum") >= 3 * 4 * 0.02
    assert page.value("request_duration_seconds_bucket", le="0.05") == 0
    assert page.value("time_to_first_token_seconds_sum") >= 3 * 0.02
    assert page.value("inter_token_latency_seconds_sum") >= 3 * 2 * 0.02


async def test_retries_are_counted_by_lane_and_cause() -> None:
    async with cluster(1, 2) as c:
        once(fail, *c.decodes)
        assert (await c.complete()).status_code == 200
        c.p.behave = fail  # D alone in the end
        for d in c.decodes:
            d.behave = wait_for_kv
        assert (await c.complete()).status_code == 200
        page = await scrape(c)
        stats = await c.stats()
    assert page.value("retries_total", lane="decode", cause="answer") == 1
    assert page.value("retries_total", lane="prefill", cause="answer") == 1
    assert sum(page.values("retries_total")) == 2
    assert stats["retries"] == {"decode": {"answer": 1}, "prefill": {"answer": 1}}
    assert page.value("requests_total", route="/v1/completions", outcome="ok") == 2
    assert page.value("decode_alone_total", reason="prefill_failed") == 1


@pytest.mark.parametrize(("behave", "cause"), [(hang, "timeout"), (reset, "stale_connection")])
async def test_retries_tell_silence_from_a_kept_connection_that_ended(behave: Behaviour, cause: str) -> None:
    async with cluster(0, 2, first_byte_timeout_s=0.3) as c:
        once(behave, *c.decodes)
        assert (await c.complete()).status_code == 200
        assert (await scrape(c)).value("retries_total", lane="decode", cause=cause) == 1


async def test_a_refused_connection_is_a_cause_of_its_own() -> None:
    async with cluster(0, 2) as c:
        await min(c.decodes, key=lambda d: d.address).kill()  # the one whose turn it is
        assert (await c.complete()).status_code == 200
        assert (await scrape(c)).value("retries_total", lane="decode", cause="connection") == 1


async def test_a_failure_after_which_nobody_is_left_is_no_retry() -> None:
    async with cluster(0, 1) as c:
        c.d.behave = fail
        assert (await c.complete()).status_code == 502
        page = await scrape(c)
    assert sum(page.values("retries_total")) == 0
    assert page.value("decode_alone_total", reason="no_prefill") == 1


def states(page: Scrape, lane: str) -> dict[str, float]:
    found = [s for s in page.samples if s.name == "twolane_proxy_instance_state" and s.labels["lane"] == lane]
    return {s.labels["state"]: s.value for s in found}


async def test_that_nobody_is_left_can_be_seen() -> None:
    async with cluster(1, 1, registration_expiry_s=0.5) as c:
        for _ in range(500):
            page = await scrape(c)
            if set(page.values("instances")) == {0}:
                break
            await asyncio.sleep(0.02)
        assert not page.values("instance_state")
        assert set(page.values("instances")) == {0}
        assert len(page.values("instances")) == 8


async def test_an_instances_state_is_one_of_four_and_changes() -> None:
    async with cluster() as c:
        ready = {"starting": 0, "ready": 1, "ejected": 0, "leaving": 0}
        assert states(await scrape(c), "decode") == states(await scrape(c), "prefill") == ready
        await c.d.kill()
        await c.complete()
        await eventually(lambda: c.view(c.d).state is State.EJECTED)
        page = await scrape(c)
        assert states(page, "decode") == ready | {"ready": 0, "ejected": 1}
        assert states(page, "prefill") == ready
        assert page.value("instances", lane="prefill", state="ready") == 1
        assert page.value("instances", lane="decode", state="ejected") == 1
        assert page.value("instance_connection_failures_total", lane="decode") >= 1


async def test_load_is_told_while_it_is_there() -> None:
    async with cluster(max_in_flight=1, max_queued=5) as c:
        c.d.behave = c.p.behave = hang
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(c.complete()) for _ in range(3)]
            await c.d.call()
            await eventually(lambda: c.view(c.d).in_flight == 1)
            for _ in range(100):
                page = await scrape(c)
                if page.value("queued_requests") == 2:
                    break
            assert (page.value("in_flight_requests"), page.value("queued_requests")) == (1, 2)
            assert page.value("instance_in_flight_requests", lane="decode") == 1
            assert page.value("instance_in_flight_requests", lane="prefill", name=c.p.address) == 1
            for task in waiting:
                task.cancel()


async def test_refused_registrations_are_counted() -> None:
    async with cluster() as c:
        c.d.register(c.service.discovery_port, http_address="10.9.9.9:1")
        for _ in range(200):
            page = await scrape(c)
            if page.value("registrations_refused_total"):
                break
            await asyncio.sleep(0.02)
        assert page.value("registrations_refused_total") == 1


async def test_more_requests_make_no_more_series() -> None:
    async def say_so(c: Cluster, number: int) -> None:
        headers = {"X-Request-Id": f"id-{number}"}
        body = {"model": f"model-{number}", "prompt": f"prompt {number}", "user": f"user-{number}"}
        await c.http.post(f"/v1/completions?x={number}", json=body, headers=headers)
        await c.http.get(f"/nowhere/{number}")
        await c.http.get(f"/instances/none-{number}/metrics")

    async with cluster() as c:
        await say_so(c, 0)
        before = await scrape(c)
        for number in range(1, 30):
            await say_so(c, number)
        after = await scrape(c)
    assert {(s.name, *sorted(s.labels.items())) for s in before.samples} == {
        (s.name, *sorted(s.labels.items())) for s in after.samples
    }


async def test_metrics_follow_the_rule_of_keys() -> None:
    async with cluster(api_keys=("sesame",)) as c:
        for path in ("/metrics", f"/instances/{c.d.address}/metrics"):
            assert (await c.http.get(path)).status_code == 401
            c.d.tell = tell_engine_page
            assert (await c.http.get(path, headers={"Authorization": "Bearer sesame"})).status_code == 200
        assert (await c.http.post("/metrics", headers={"Authorization": "Bearer sesame"})).status_code == 405
