"""`twolane trace` against a real proxy with scripted instances."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

from tests.proxy.scripted import Cluster, answer, cluster
from tests.proxy.test_discovery import send_raw
from tests.proxy.test_stories import D_EVENTS, P_EVENTS, tell_while_running, told, until_heard

from twolane.protocol import encode


@dataclass
class Result:
    code: int
    out: str
    err: str


async def trace(c: Cluster | int, *words: str) -> Result:
    port = c if isinstance(c, int) else c.service.http_port
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "twolane.cli", "trace", "--http-proxy-port", str(port), *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Result(process.returncode or 0, out.decode(), err.decode())


async def test_it_draws_the_newest_request_with_every_moment() -> None:
    async with cluster(1, 1) as c:
        tell_while_running(c)
        assert (await c.complete()).is_success
        c.d.behave = answer
        assert (await c.http.get("/v1/models")).is_success  # newer, but nothing was computed for it
        shown = await trace(c)
        assert shown.code == 0, shown.err
        lines = shown.out.splitlines()
        assert c.p.calls[0].kv["transfer_id"] in lines[0]
        assert f"prefill {c.p.address}, decode {c.d.address}" in lines[1]
        assert lines[2].startswith("ok, status 200")
        positions = [shown.out.index(f" {name} ") for name in ("received", "prefill_computed", "landed", "last_byte")]
        assert positions == sorted(positions)
        for stage in ("queue", "prefill", "handoff", "first token", "decode"):
            assert any(line.startswith(stage) for line in lines), shown.out


async def test_json_is_what_the_proxy_says() -> None:
    async with cluster(1, 1) as c:
        await c.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "a/b c"[:3]})
        shown = await trace(c, "a/b", "--json")
        assert shown.code == 0, shown.err
        assert json.loads(shown.out) == (await c.http.get("/stats/requests/a%2Fb")).json()


async def test_d_alone_and_silent_engines_have_a_timeline_too() -> None:
    async with cluster(0, 1) as c:
        await c.complete()
        shown = await trace(c)
        assert "D alone because: no_prefill" in shown.out, shown.out
        assert "to first byte" in shown.out


async def test_late_words_are_shown_the_next_time() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        transfer_id = c.p.calls[0].kv["transfer_id"]
        assert "landed" not in (await trace(c, transfer_id)).out
        for role, events in (("P", P_EVENTS), ("D", D_EVENTS)):
            send_raw(c, encode(told(c, role, transfer_id, *events)))
        await until_heard(c, "events", len(P_EVENTS) + len(D_EVENTS))
        assert "landed" in (await trace(c, transfer_id)).out


async def test_each_error_says_what_to_do() -> None:
    async with cluster(1, 1) as c:
        nothing = await trace(c)
        assert (nothing.code, nothing.out) == (1, "")
        assert "no request yet" in nothing.err
        assert "twolane test" in nothing.err
        await c.complete()
        unknown = await trace(c, "nobody")
        assert unknown.code == 1
        assert "the last 1000 requests are kept" in unknown.err
        assert "without an id shows the newest" in unknown.err
        port = c.service.http_port
    gone = await trace(port)
    assert gone.code == 1
    assert f"no proxy answers at 127.0.0.1:{port}" in gone.err
    assert "twolane up" in gone.err


async def test_a_proxy_with_keys_wants_one() -> None:
    async with cluster(1, 1, api_keys=("k",)) as c:
        await c.http.post("/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer k"})
        assert "--api-key" in (await trace(c)).err
        assert (await trace(c, "--api-key", "k")).code == 0
