"""The instances' own numbers: asked for, filtered, kept, and never in anybody's way."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import pytest
from tests.proxy.pages import ENGINE_PAGE, scrape, tell_engine_page
from tests.proxy.scripted import Behaviour, Call, Cluster, cluster, eventually, hang, tell_nothing

from twolane.proxy.engine_numbers import EngineNumbers, read_page
from twolane.proxy.engines import with_rate


def fields(page: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for some in read_page(page):
        told |= some
    return told


def test_the_few_lines_that_count_are_found() -> None:
    numbers = EngineNumbers(at=0.0, epoch="", **fields(ENGINE_PAGE))
    assert numbers == EngineNumbers(
        at=0.0,
        epoch="",
        running=2.0,
        waiting=1.0,
        kv_usage=0.25,
        prompt_tokens=1800.0,
        prompt_tokens_by_source={"local_compute": 3.0, "external_kv_transfer": 1797.0},
        generated_tokens=60.0,
        preemptions=0.0,
        kv_sent_transfers=0.0,
        kv_sent_tokens=0.0,
        kv_sent_bytes=0.0,
        kv_send_failures={"peer_died": 0.0},
        kv_leases_expired=0.0,
        kv_received_transfers=3.0,
        kv_received_tokens=1797.0,
        kv_received_bytes=88473600.0,
        kv_receive_failures={"peer_died": 4.0, "timed_out": 1.0},
        kv_recomputed_tokens=600.0,
        kv_refused_peers=0.0,
    )


def test_engines_of_one_instance_are_added_up_but_their_usage_is_a_mean() -> None:
    page = b'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.4\n'
    page += b'vllm:generation_tokens_total{engine="0"} 1.0\nvllm:generation_tokens_total{engine="1"} 2e3'
    assert fields(page) == {"kv_usage": pytest.approx(0.3), "generated_tokens": 2001.0}


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"\x00\xff\xfe" * 1000,
        b"<html><body>no such page</body></html>",
        b"vllm:generation_tokens_total",
        b"vllm:generation_tokens_total{} \n",
        b"vllm:generation_tokens_total{} many\n",
        b"vllm:generation_tokens_total{} NaN\nvllm:prompt_tokens_total +Inf\nvllm:num_requests_running -1\n",
        b"# vllm:generation_tokens_total{} 5\nxvllm:generation_tokens_total{} 5\nvllm:generation_tokens_totals 5\n",
    ],
)
def test_what_makes_no_sense_tells_nothing(page: bytes) -> None:
    assert fields(page) == {}


def test_no_page_makes_many_labels_or_an_error() -> None:
    flood = b"".join(b'twolane_kv_send_failures_total{cause="c%d"} 1\n' % number for number in range(10_000))
    assert len(fields(flood)["kv_send_failures"]) == 32
    rng = random.Random(3)
    for _ in range(300):
        page = bytearray(ENGINE_PAGE)
        for _ in range(rng.randrange(1, 60)):
            page[rng.randrange(len(page))] = rng.randrange(256)
        EngineNumbers(at=0.0, epoch="", **fields(bytes(page)))


def test_kv_bytes_a_second_are_between_two_answers_of_one_engine() -> None:
    first = EngineNumbers(at=10.0, epoch="a", kv_received_bytes=1000.0)
    then = EngineNumbers(at=12.0, epoch="a", kv_received_bytes=5000.0)
    assert with_rate(then, first).kv_bytes_per_s == 2000.0
    for other in (
        None,
        msgspec.structs.replace(first, epoch="b"),
        msgspec.structs.replace(first, kv_received_bytes=9e9),
    ):
        assert with_rate(then, other).kv_bytes_per_s is None
    assert with_rate(EngineNumbers(at=12.0, epoch="a", prompt_tokens=1.0), first).kv_bytes_per_s is None


async def engine_of(c: Cluster, role: str) -> Any:
    return next(i["engine"] for i in (await c.stats())["instances"] if i["role"] == role)


async def test_numbers_are_asked_for_by_themselves_and_shown_in_stats() -> None:
    async with cluster(engines_every_s=0.05) as c:
        c.d.tell = tell_engine_page
        await eventually(lambda: c.service.engines.latest(c.view(c.d)) is not None)
        told = await engine_of(c, "D")
        assert (told["prompt_tokens"], told["generated_tokens"], told["running"]) == (1800, 60, 2)
        assert told["kv_receive_failures"] == {"peer_died": 4, "timed_out": 1}
        assert told["age_s"] >= 0
        assert await engine_of(c, "P") is None


async def test_a_scrape_asks_at_once_and_shows_what_was_told_and_nothing_else() -> None:
    async with cluster(engines_every_s=3600) as c:
        c.d.tell = tell_engine_page
        page = await scrape(c)
        assert page.value("engine_kv_received_bytes_total", lane="decode") == 88473600
        assert page.value("engine_kv_receive_failures_total", lane="decode", cause="peer_died") == 4
        assert page.value("engine_kv_usage_ratio", lane="decode") == 0.25
        assert page.values("engine_kv_sent_bytes_total", lane="decode") == []  # D sends none
        assert page.values("engine_prompt_tokens_total", lane="prefill") == []  # it told nothing
        assert page.values("engine_kv_bytes_per_second") == []  # there was no look before


async def test_p2pnccl_tells_of_no_transfers_and_none_are_made_up() -> None:
    async def tell(call: Call) -> None:
        own = b"".join(line for line in ENGINE_PAGE.splitlines(keepends=True) if not line.startswith(b"twolane_"))
        await call.reply(200, own)

    async with cluster(kind="p2pnccl") as c:
        c.d.tell = tell
        page = await scrape(c)
        told = await engine_of(c, "D")
    assert page.value("engine_generated_tokens_total", lane="decode") == 60
    assert [s.name for s in page.samples if "engine_kv_" in s.name] == ["twolane_proxy_engine_kv_usage_ratio"]
    assert {name for name, value in told.items() if name.startswith("kv_") and value is not None} == {"kv_usage"}


async def pour(call: Call) -> None:
    """50 MB of something like a page."""
    call.head(200, {"content-type": "text/plain", "transfer-encoding": "chunked"})
    for _ in range(50):
        await call.send(ENGINE_PAGE * (1_000_000 // len(ENGINE_PAGE)))
    call.writer.write(b"0\r\n\r\n")


async def garbage(call: Call) -> None:
    await call.reply(200, bytes(range(256)) * 400)


async def break_off(call: Call) -> None:
    call.head(200, {"content-length": "100000"})
    call.writer.write(ENGINE_PAGE)
    await call.writer.drain()
    call.reset()


@pytest.mark.parametrize("trouble", [hang, garbage, pour, break_off, tell_nothing])
async def test_an_instance_in_trouble_keeps_its_old_numbers_and_holds_up_nobody(trouble: Behaviour) -> None:
    wait_s = 2.0 if trouble is hang else 30.0
    async with cluster(1, 2, engines_every_s=3600, engines_watched_every_s=0.0, engines_wait_s=wait_s) as c:
        good, bad = c.decodes
        good.tell = bad.tell = tell_engine_page
        await scrape(c)
        first = c.service.engines.latest(c.view(bad))
        assert first is not None
        bad.tell = trouble
        page = await scrape(c)
        assert c.service.engines.latest(c.view(bad)) is first
        newer = c.service.engines.latest(c.view(good))
        assert newer is not None
        assert newer.at > first.at
        assert page.value("engine_generated_tokens_total", address=bad.address) == 60
        ages = [page.value("engine_numbers_age_seconds", address=d.address) for d in (good, bad)]
        assert ages[0] < ages[1]
        assert (await c.complete(stream=True)).status_code == 200
        assert c.view(bad).state.value == "ready"  # what it tells of itself says nothing about its health
        bad.tell = tell_engine_page
        assert (await scrape(c)).values("engine_generated_tokens_total") == [60, 60]


async def test_a_hung_instance_is_asked_one_question_at_a_time() -> None:
    async with cluster(0, 1, engines_every_s=0.02, engines_wait_s=0.05, engines_timeout_s=600) as c:
        c.d.tell = hang
        for _ in range(5):
            await scrape(c)
        assert c.d.num_told == 1


async def test_a_hung_instance_is_asked_again_when_the_deadline_is_over() -> None:
    async with cluster(0, 1, engines_every_s=0.02, engines_timeout_s=0.1) as c:
        c.d.tell = hang
        await eventually(lambda: c.d.num_told >= 3)


async def test_watching_asks_often_and_only_while_somebody_watches() -> None:
    async with cluster(0, 1, engines_every_s=3600, engines_watched_every_s=0.05) as c:
        c.d.tell = tell_engine_page
        await scrape(c)
        asked = c.d.num_told
        engines = c.service.engines
        with engines.watching(), engines.watching():
            await eventually(lambda: c.d.num_told >= asked + 3)
        await asyncio.sleep(0.5)  # what was under way
        asked = c.d.num_told
        await asyncio.sleep(0.3)
        assert c.d.num_told == asked


async def test_a_restarted_instance_has_told_nothing_yet() -> None:
    async with cluster(0, 1, engines_every_s=3600) as c:
        c.d.tell = tell_engine_page
        await scrape(c)
        assert await engine_of(c, "D") is not None
        c.d.tell = tell_nothing
        c.d.register(c.service.discovery_port, epoch="second")
        await eventually(lambda: c.view(c.d).epoch == "second")
        assert await engine_of(c, "D") is None
        assert (await scrape(c)).values("engine_generated_tokens_total") == []


async def test_the_proxy_stops_at_once_though_an_instance_hangs() -> None:
    async with cluster(0, 1, engines_every_s=0.02, engines_timeout_s=600) as c:
        c.d.tell = hang
        await eventually(lambda: c.d.num_told == 1)
        stopping_at = time.monotonic()
    assert time.monotonic() - stopping_at < 60


async def test_an_instances_own_page_by_name_and_by_address() -> None:
    async with cluster() as c:
        c.d.tell = tell_engine_page
        c.d.register(c.service.discovery_port, name="decode-2")
        await eventually(lambda: c.view(c.d).name == "decode-2")
        for name in ("decode-2", c.d.address, c.d.address.replace(":", "%3A")):
            answered = await c.http.get(f"/instances/{name}/metrics")
            assert (answered.status_code, answered.content) == (200, ENGINE_PAGE)
            assert answered.headers["content-type"].startswith("text/plain; version=0.0.4")
        unknown = await c.http.get("/instances/decode-9/metrics")
        assert unknown.status_code == 404
        assert "decode-2" in unknown.json()["error"]["message"]
        assert c.p.address in unknown.json()["error"]["message"]
        assert (await c.http.get("/instances/decode-2/secrets")).status_code == 404


@pytest.mark.parametrize(
    ("trouble", "status", "words"),
    [(hang, 504, "did not answer within"), (tell_nothing, 502, "answered 404"), (pour, 502, "exceeds")],
)
async def test_an_instance_that_gives_no_page_is_a_bad_gateway(trouble: Behaviour, status: int, words: str) -> None:
    async with cluster(engines_timeout_s=0.5, engines_every_s=3600) as c:
        c.d.tell = trouble
        answered = await c.http.get(f"/instances/{c.d.address}/metrics")
        assert answered.status_code == status
        assert words in answered.json()["error"]["message"]
