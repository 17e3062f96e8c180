"""Instances of vLLM's own connectors: P first, then D."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
import pytest
from tests.proxy.scripted import MODEL, Call, Cluster, ScriptedInstance, answer, cluster, completion, eventually, hang
from tests.proxy.test_discovery import send_raw
from tests.proxy.test_failover import once

from twolane.config import ProxySettings, StaticInstance
from twolane.errors import ConfigError
from twolane.protocol import Kind
from twolane.proxy.flags import parse_instances
from twolane.proxy.pool import State
from twolane.proxy.service import Service

KINDS: list[Kind] = ["nixl", "p2pnccl"]
REMOTE = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e",
    "remote_block_ids": [[1, 2, 3]],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}
DO_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


async def nixl_prefill(call: Call) -> None:
    await call.reply(200, completion("one", "chat" in call.path) | {"kv_transfer_params": REMOTE})


@pytest.mark.parametrize("kind", KINDS)
async def test_decode_gets_its_leg_when_prefill_is_done(kind: Kind) -> None:
    release = asyncio.Event()

    async def slow_prefill(call: Call) -> None:
        await release.wait()
        await nixl_prefill(call)

    async with cluster(kind=kind) as c:
        c.p.behave = slow_prefill
        asking = asyncio.create_task(c.complete(max_tokens=7))
        await c.p.call()
        await asyncio.sleep(0.05)
        assert not c.d.calls
        release.set()
        assert (await asking).json()["choices"][0]["text"] == "one two three"
        assert (await c.p.call()).json["max_tokens"] == 1
        assert (await c.d.call()).json["max_tokens"] == 7


async def test_nixl_decode_gets_prefills_parameters_unchanged() -> None:
    async with cluster(kind="nixl") as c:
        c.p.behave = nixl_prefill
        assert (await c.complete(stream=True)).content.endswith(b"data: [DONE]\n\n")
        assert (await c.p.call()).kv == DO_REMOTE_DECODE
        assert (await c.p.call()).json["ignore_eos"] is True
        assert (await c.d.call()).kv == REMOTE
        record = (await c.stats())["recent"][0]
        assert record["prefill_done_ms"] <= record["first_byte_ms"]


@pytest.mark.parametrize("params", [None, "absent"])
async def test_nixl_prefill_that_kept_nothing_leaves_the_prompt_to_decode(params: str | None) -> None:
    async def keep_nothing(call: Call) -> None:
        await call.reply(200, completion("one", chat=False) | ({} if params else {"kv_transfer_params": None}))

    async with cluster(kind="nixl") as c:
        c.p.behave = keep_nothing
        assert (await c.complete()).status_code == 200
        assert "kv_transfer_params" not in (await c.d.call()).json


async def test_nixl_prefill_that_makes_no_sense_is_tried_elsewhere() -> None:
    async def nonsense(call: Call) -> None:
        await call.reply(200, b"[1]")

    async with cluster(kind="nixl") as c:
        c.p.behave = nonsense
        assert (await c.complete()).status_code == 200
        assert "kv_transfer_params" not in (await c.d.call()).json
        assert (await c.stats())["decode_alone"] == {"prefill_failed": 1}


async def test_p2pnccl_request_id_holds_both_addresses_on_both_legs() -> None:
    async with cluster(kind="p2pnccl") as c:
        headers = {"X-Request-Id": "mine"}
        body = {"model": MODEL, "prompt": "x", "max_tokens": 5, "max_completion_tokens": 5}
        answered = await c.http.post("/v1/completions", json=body, headers=headers)
        assert answered.headers["x-request-id"] == "mine"
        p, d = (await c.p.call()), (await c.d.call())
        form = rf"___prefill_addr_{c.p.control_address}___decode_addr_{c.d.control_address}_[0-9a-f]{{32}}"
        assert re.fullmatch(form, p.headers["x-request-id"])
        assert d.headers["x-request-id"] == p.headers["x-request-id"]
        assert (p.json["max_tokens"], p.json["max_completion_tokens"]) == (1, 1)
        assert d.json == body
        assert p.kv is None
        record = (await c.stats())["recent"][0]
        assert record["request_id"] == "mine"
        assert record["transfer_id"] == p.headers["x-request-id"]


async def test_p2pnccl_body_that_cannot_be_split_goes_through_both_with_all_its_prompts() -> None:
    async with cluster(kind="p2pnccl") as c:
        body = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 9, "stream": True, "stream_options": {}}
        assert (await c.http.post("/v1/completions", json=body)).status_code == 200
        assert (await c.p.call()).json == {
            "model": MODEL,
            "prompt": ["a", "b"],
            "n": 2,
            "max_tokens": 1,
            "stream": False,
        }
        assert (await c.d.call()).json == body


async def test_p2pnccl_decode_without_prefill_is_503_since_it_would_wait_for_ever() -> None:
    async with cluster(0, 1, kind="p2pnccl") as c:
        answered = await c.complete()
        assert answered.status_code == 503
        assert "prefill" in answered.json()["error"]["message"]
        assert not c.d.calls
        health = await c.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")
        assert (await c.http.get("/v1/models")).status_code == 200  # takes no engine


async def test_registration_without_a_kind_is_p2pnccl() -> None:
    async with cluster(0, 0) as c:
        old = {"type": "P", "http_address": "127.0.0.1:1", "zmq_address": "127.0.0.1:2"}
        send_raw(c, msgspec.msgpack.encode(old))
        await eventually(lambda: len(c.service.pool) == 1)
        (instance,) = (await c.stats())["instances"]
        assert instance["kind"] == "p2pnccl"


async def reset(call: Call) -> None:
    call.reset()


async def refuse(call: Call) -> None:
    await call.reply(400, {"error": {"message": "too long"}})


async def fail(call: Call) -> None:
    await call.reply(500, {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behave", [reset, fail, hang])
async def test_prefill_failure_moves_to_another_prefill(kind: Kind, behave: Any) -> None:
    async with cluster(2, 1, kind=kind, prefill_timeout_s=0.3) as c:
        c.prefills[0].behave = behave
        c.prefills[1].behave = nixl_prefill
        for number in range(2):  # one of the two begins with the bad one
            assert (await c.complete(user=str(number))).status_code == 200
        assert len(c.d.calls) == 2  # D is asked when a P is done, and never in vain
        assert {len(p.calls) for p in c.prefills} <= {1, 2}


@pytest.mark.parametrize("kind", KINDS)
async def test_decode_failure_takes_the_prefill_leg_again(kind: Kind) -> None:
    async with cluster(1, 2, kind=kind) as c:
        c.p.behave = nixl_prefill
        once(reset, *c.decodes)
        assert (await c.complete()).status_code == 200
        assert len(c.p.calls) == 2
        assert [len(d.calls) for d in c.decodes] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
async def test_prefills_rejection_is_the_answer_and_decode_never_hears_of_it(kind: Kind) -> None:
    async with cluster(kind=kind) as c:
        c.p.behave = refuse
        answered = await c.complete()
        assert (answered.status_code, answered.json()) == (400, {"error": {"message": "too long"}})
        assert not c.d.calls


@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_leaves_during_prefill_ends_its_leg(kind: Kind) -> None:
    async with cluster(kind=kind) as c:
        c.p.behave = hang
        _, writer = await c.connect()
        body = json.dumps({"prompt": "x"}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        leg = await c.p.call()
        writer.close()
        async with asyncio.timeout(0.1):
            await leg.gone.wait()
        assert not c.d.calls
        await eventually(lambda: c.view(c.p).in_flight == 0)


async def load(c: Cluster, num_requests: int) -> set[int]:
    gate = asyncio.Semaphore(16)

    async def one() -> int:
        async with gate:
            return (await c.complete()).status_code

    return set(await asyncio.gather(*(one() for _ in range(num_requests))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["P", "D"])
async def test_one_of_two_killed_under_load_loses_no_request(kind: Kind, role: str) -> None:
    async def slow(call: Call) -> None:
        await asyncio.sleep(0.01)
        await answer(call)

    async with cluster(2, 2, kind=kind) as c:
        for instance in (*c.prefills, *c.decodes):
            instance.behave = slow
        victim = (c.prefills if role == "P" else c.decodes)[0]
        loading = asyncio.create_task(load(c, 150))
        await victim.call(20)
        await victim.kill()
        assert await loading == {200}
        assert c.view(victim).state is State.EJECTED


async def test_static_instances_are_probed_and_served_without_a_registration() -> None:
    p, d = await ScriptedInstance("P", nixl_prefill).start(), await ScriptedInstance("D").start()
    instances = parse_instances([f"http://{p.address}"], [f"http://{d.address}/"], "nixl")
    settings = ProxySettings(
        http_port=0, discovery_port=0, health_every_s=0.05, registration_expiry_s=0.1, instances=instances
    )
    async with Service(settings) as service:
        await eventually(lambda: len(service.pool.ready("P")) == len(service.pool.ready("D")) == 1)
        await asyncio.sleep(0.3)  # longer than an expiry
        c = Cluster(service, [p], [d], http=None)  # type: ignore[arg-type]
        reader, writer = await c.connect()
        writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{"prompt":"x"}')
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert (await d.call()).kv == REMOTE
        await p.kill()
        await d.kill()
        writer.close()
    await p.stop()
    await d.stop()


def test_flags_name_static_instances() -> None:
    assert parse_instances(["http://h:1=h:2"], ["h:3=h:4"], "p2pnccl") == (
        StaticInstance("P", "h:1", "p2pnccl", "h:2"),
        StaticInstance("D", "h:3", "p2pnccl", "h:4"),
    )
    assert parse_instances([], ["http://h:3/"], "nixl") == (StaticInstance("D", "h:3", "nixl", ""),)


@pytest.mark.parametrize(
    ("prefill", "kind", "word"),
    [
        ("http://h:1", "twolane", "control address"),
        ("https://h:1=h:2", "twolane", "https"),
        ("http://h", "nixl", "host:port"),
        ("http://h:1=nowhere", "p2pnccl", "nowhere"),
        ("http://h:1", "mooncake", "mooncake"),
    ],
)
def test_wrong_flags_are_named(prefill: str, kind: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_instances([prefill], [], kind)
    with pytest.raises(ConfigError, match="twice"):
        parse_instances(["h:1", "http://h:1"], [], "nixl")
