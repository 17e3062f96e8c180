"""Which paths there are, and what /stats tells."""

from __future__ import annotations

import pytest
from tests.proxy.scripted import MODEL, Call, cluster, paced


async def test_models_are_relayed_from_a_decode_instance() -> None:
    async with cluster() as c:
        answered = await c.http.get("/v1/models")
        assert answered.json()["data"][0]["id"] == MODEL
        head = await c.http.head("/v1/models")
        assert head.status_code == 200
        assert head.content == b""
        assert int(head.headers["content-length"]) == len(answered.content)
        posted = await c.http.post("/tokenize?x=1", json={"prompt": "x"})
        assert posted.json()["path"] == "/tokenize?x=1"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_other_generating_paths_go_to_decode_alone_if_it_has_them(path: str) -> None:
    async def old(call: Call) -> None:
        await call.reply(404, {"detail": "Not Found"})

    async def stream(call: Call) -> None:
        call.start_stream()
        await call.send(b"event: message_start\ndata: {}\n\n")
        await call.end_stream()

    async with cluster() as c:
        body = {"model": MODEL, "input": "x", "messages": [], "max_tokens": 5}
        assert (await c.http.post(path, json=body)).status_code == 200
        assert (await c.d.call()).json == body
        assert not c.p.calls
        c.d.behave = stream
        streamed = await c.http.post(path, json=body | {"stream": True})
        assert streamed.content == b"event: message_start\ndata: {}\n\ndata: [DONE]\n\n"
        c.d.behave = old
        answered = await c.http.post(path, json=body)
        assert (answered.status_code, answered.json()) == (404, {"detail": "Not Found"})
        assert (await c.http.get(path)).status_code == 405
        assert (await c.stats())["decode_alone"] == {"path": 3}


@pytest.mark.parametrize("path", ["/version", "/v1/models", "/tokenize", "/detokenize", "/v1/messages/count_tokens"])
async def test_what_needs_no_engine_is_relayed(path: str) -> None:
    async with cluster() as c:
        method = "GET" if path in ("/version", "/v1/models") else "POST"
        assert (await c.http.request(method, path, json={"prompt": "x"})).status_code == 200
        assert (await c.d.call()).path == path


async def test_unknown_path_is_a_clear_404() -> None:
    async with cluster() as c:
        answered = await c.http.post("/v1/embeddings", json={})
        assert answered.status_code == 404
        message = answered.json()["error"]["message"]
        assert "/v1/embeddings" in message
        assert "/v1/completions" in message


async def test_stats_tell_percentiles() -> None:
    async with cluster() as c:
        c.d.behave = paced(11)
        for _ in range(3):
            await c.complete(stream=True)
        latency = (await c.stats())["latency_ms"]
        assert {name: latency[name]["count"] for name in ("ttft", "handoff", "end_to_end")} == {
            "ttft": 3,
            "handoff": 3,
            "end_to_end": 3,
        }
        assert latency["itl"]["count"] >= 30
        assert latency["itl"]["p50"] > 15
        assert latency["ttft"]["p50"] < latency["end_to_end"]["p50"]
        assert latency["end_to_end"]["p99"] > 200
        assert latency["ttft"]["p50"] >= latency["handoff"]["p50"] > 0
