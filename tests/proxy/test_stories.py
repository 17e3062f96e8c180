"""A request's story: what the engines tell over the real discovery socket, beside the proxy's own moments."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import msgspec
import pytest
from tests.proxy.scripted import Call, Cluster, answer, chunk, cluster
from tests.proxy.test_discovery import send_raw

from twolane.protocol import MAX_STORY_EVENTS, Story, StoryEvent, clock_identity, encode
from twolane.proxy.stats import RequestRecord
from twolane.proxy.stories import ENGINE_EVENTS, ORDER, Stories

P_EVENTS = ("scheduled", "launched", "computed", "announced", "pushed")
D_EVENTS = ("allocated", "announce_sent", "landed", "stepped", "ended")
OWN = {"received", "admitted", "prefill_sent", "decode_sent", "prefill_answered", "first_byte", "last_byte"}


def told(c: Cluster, role: str, transfer_id: str, *events: str, at_s: float | None = None, **changes: Any) -> Story:
    """What the engine of this role would say, all of it at once."""
    now = monotonic() if at_s is None else at_s
    instance = c.p if role == "P" else c.d
    made = [StoryEvent(transfer_id, event, now) for event in events]
    story = Story(instance.role, instance.address, clock_identity(), made)
    return msgspec.structs.replace(story, **changes)


async def story_of(c: Cluster, wanted: str) -> Any:
    answer = await c.http.get(f"/stats/requests/{wanted}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(story: Any) -> list[str]:
    return [event["name"] for event in story["events"]]


async def heard(c: Cluster) -> Any:
    return (await c.stats())["stories"]


async def until_heard(c: Cluster, what: str, count: int) -> None:
    async with asyncio.timeout(30):
        while (await heard(c))[what] < count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


def tell_while_running(c: Cluster) -> None:
    """P answers only when the engines' words have been taken in; D then. So all is known, in order, before the end."""
    p_told = asyncio.Event()

    async def prefill(call: Call) -> None:
        transfer_id = call.kv["transfer_id"]
        send_raw(c, encode(told(c, "P", transfer_id, *P_EVENTS)))
        await until_heard(c, "events", len(P_EVENTS))
        await answer(call)
        p_told.set()

    async def decode(call: Call) -> None:
        transfer_id = call.kv["transfer_id"]
        await p_told.wait()
        send_raw(c, encode(told(c, "D", transfer_id, *D_EVENTS)))
        await until_heard(c, "events", len(P_EVENTS) + len(D_EVENTS))
        await answer(call)

    c.p.behave, c.d.behave = prefill, decode


async def test_a_request_has_the_moments_of_all_three_in_order_of_time() -> None:
    async with cluster(1, 1) as c:
        tell_while_running(c)
        assert (await c.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "me"})).is_success
        story = await story_of(c, "me")
        assert story == await story_of(c, story["transfer_id"])
        assert set(names(story)) == set(ORDER)
        times_ms = [event["ms"] for event in story["events"]]
        assert times_ms == sorted(times_ms)
        assert times_ms[0] == 0.0
        assert story["outcome"] == "ok"
        assert story["prefill"] == c.p.address
        by = {event["name"]: event["by"] for event in story["events"]}
        assert {by[name] for name in OWN} == {"proxy"}
        assert {by[name] for name in ("prefill_accepted", "prefill_computed", "pushed")} == {"prefill"}
        assert {by[name] for name in ("allocated", "announced", "landed", "first_step", "last_token")} == {"decode"}


async def test_it_can_be_read_while_the_request_runs() -> None:
    async with cluster(1, 1) as c:
        go_on = asyncio.Event()

        async def wait(call: Call) -> None:
            await go_on.wait()
            await answer(call)

        c.d.behave = wait
        request = asyncio.create_task(c.complete())
        transfer_id = (await c.d.call()).kv["transfer_id"]
        running = await story_of(c, transfer_id)
        assert running["outcome"] == "open"
        assert {"received", "admitted", "prefill_sent", "decode_sent"} <= set(names(running))
        assert not {"first_byte", "last_byte"} & set(names(running))
        go_on.set()
        await request
        assert "last_byte" in names(await story_of(c, transfer_id))


async def until_told(c: Cluster, transfer_id: str, *wanted: str) -> None:
    async with asyncio.timeout(30):
        while not set(wanted) <= set(names(await story_of(c, transfer_id))):  # noqa: ASYNC110 - it is asked for
            await asyncio.sleep(0.01)


async def test_what_has_come_of_a_stream_is_in_its_story_at_once() -> None:
    async with cluster(1, 1) as c:
        go_on = asyncio.Event()

        async def begin(call: Call) -> None:
            call.start_stream()
            await call.event(chunk("a", chat=False))
            await go_on.wait()
            await call.event(chunk("b", chat=False))
            await call.end_stream()

        c.d.behave = begin
        request = asyncio.create_task(c.complete(stream=True))
        transfer_id = (await c.d.call()).kv["transfer_id"]
        await until_told(c, transfer_id, "first_byte", "prefill_answered")
        go_on.set()
        assert (await request).status_code == 200


async def test_another_attempt_has_moments_of_its_own() -> None:
    async with cluster(1, 2) as c:
        go_on = asyncio.Event()
        failed: list[str] = []

        async def wait_the_second_time(call: Call) -> None:
            if len(c.p.calls) > 1:
                await go_on.wait()
            await answer(call)

        async def die_the_first_time(call: Call) -> None:
            if not failed:
                failed.append(call.kv["transfer_id"])
                await until_told(c, failed[0], "prefill_answered")
                call.reset()
            else:
                await go_on.wait()
                await answer(call)

        c.p.behave = wait_the_second_time
        for d in c.decodes:
            d.behave = die_the_first_time
        request = asyncio.create_task(c.complete())
        await c.p.call()
        transfer_id = (await c.p.call(1)).kv["transfer_id"]
        running = await story_of(c, transfer_id)
        assert running["attempts"] == 2
        assert {"prefill_sent", "decode_sent"} <= set(names(running))
        assert "prefill_answered" not in names(running)
        go_on.set()
        assert (await request).status_code == 200


async def test_both_legs_ask_for_the_story_only_of_instances_that_register_here() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        assert c.p.calls[0].kv["story"] is c.d.calls[0].kv["story"] is True
        for instance in (c.p, c.d):
            c.view(instance).epoch = ""  # as one that a flag named, which may register elsewhere
        await c.complete()
        assert c.p.calls[1].kv["story"] is c.d.calls[1].kv["story"] is False


async def test_a_strangers_story_changes_nothing() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        transfer_id = (await c.stats())["recent"][0]["transfer_id"]
        before = await story_of(c, transfer_id)
        false = [
            told(c, "D", "f" * 32, "landed"),  # no such transfer
            told(c, "D", transfer_id, "exploded", "reported"),  # not understood, or of no interest
            told(c, "D", transfer_id, "scheduled"),  # not D's to say
            told(c, "D", transfer_id, "landed", http_address="127.0.0.1:1"),  # not the instance that has it
            told(c, "D", transfer_id, "landed", at_s=monotonic() - 3600),  # before the request came
            told(c, "D", transfer_id, "landed", at_s=monotonic() + 3600),
            told(c, "D", transfer_id, "landed", at_s=float("nan")),
            told(c, "D", transfer_id, "landed", clock="another machine"),
        ]
        send_raw(c, *map(encode, false))
        await until_heard(c, "other_clock", 1)
        assert await heard(c) == {
            "events": 0,
            "unknown": 2,
            "impossible": 3,
            "other_clock": 1,
            "dropped_by_engines": 0,
            "kept": 1,
        }
        assert await story_of(c, transfer_id) == before


async def test_garbage_and_what_is_too_large_is_refused_and_the_next_word_is_heard() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        transfer_id = (await c.stats())["recent"][0]["transfer_id"]
        good = told(c, "D", transfer_id, "landed")
        fields = msgspec.to_builtins(good)
        bad = [
            fields | {"events": "all"},
            fields | {"events": [[transfer_id]]},
            fields | {"events": [[transfer_id, "landed", "noon"]]},
            fields | {"events": [[transfer_id, "landed", 1.0]] * (MAX_STORY_EVENTS + 1)},
            fields | {"role": "X"},
            fields | {"num_dropped": -1},
            {"type": "story"},
        ]
        send_raw(c, *map(msgspec.msgpack.encode, bad))
        send_raw(c, b"x" * 200_000)  # ZMQ itself cuts that one off
        send_raw(c, encode(good))
        await until_heard(c, "events", 1)
        assert (await c.stats())["registrations_refused"] == len(bad)
        assert "landed" in names(await story_of(c, transfer_id))


async def test_late_and_double_words_are_fine() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        transfer_id = (await c.stats())["recent"][0]["transfer_id"]
        story = encode(told(c, "D", transfer_id, *D_EVENTS, num_dropped=7))
        send_raw(c, story, story)
        await until_heard(c, "events", 2 * len(D_EVENTS))
        told_names = names(await story_of(c, transfer_id))
        assert len(told_names) == len(set(told_names))
        assert {"landed", "last_token"} <= set(told_names)
        assert (await heard(c))["dropped_by_engines"] == 14


async def test_a_failed_attempts_story_is_not_the_requests() -> None:
    async with cluster(1, 2) as c:
        failed: list[str] = []

        async def die(call: Call) -> None:
            if not failed:
                failed.append(call.kv["transfer_id"])
                call.reset()
            else:
                await answer(call)

        for d in c.decodes:
            d.behave = die
        assert (await c.complete()).status_code == 200
        story = await story_of(c, (await c.stats())["recent"][0]["transfer_id"])
        assert story["attempts"] == 2
        assert story["transfer_id"] not in failed
        assert (await c.http.get(f"/stats/requests/{failed[0]}")).status_code == 404


async def test_an_unknown_request_is_404_and_says_how_many_are_kept() -> None:
    async with cluster(1, 1) as c:
        await c.complete()
        answer = await c.http.get("/stats/requests/nobody")
        assert answer.status_code == 404
        assert "the last 1000 requests are kept, and 1 are there" in answer.json()["error"]["message"]
        assert (await c.http.post("/stats/requests/nobody")).status_code == 405


async def test_a_story_needs_the_key_as_stats_do() -> None:
    async with cluster(1, 1, api_keys=("k",)) as c:
        assert (await c.http.get("/stats/requests/x")).status_code == 401
        assert (await c.http.get("/stats/requests/x", headers={"authorization": "Bearer k"})).status_code == 404


def record(transfer_id: str, started_at: float = 0.0) -> RequestRecord:
    return RequestRecord("/v1/completions", f"r-{transfer_id}", started_at, transfer_id=transfer_id, prefill="p")


def test_memory_is_bounded() -> None:
    stories = Stories(num_kept=3)
    records = [record("") for _ in range(10)]
    for number, one in enumerate(records):
        stories.begins(one, f"t{number}")
        stories.ended(one)
    assert [one.transfer_id for one in stories.recent(100)] == ["t7", "t8", "t9"]
    assert stories.find("t6") is None
    assert stories.find("t7") is records[7]
    for _ in range(100):
        events = [StoryEvent("t9", event, 1.0) for _, event in ENGINE_EVENTS]
        stories.hear(Story("P", "p", clock_identity(), events), 2.0)
    assert len(records[9].engine_moments or ()) == len(P_EVENTS)


@pytest.mark.parametrize(("told_events", "computed_ms"), [(("launched",), 1500.0), (("launched", "computed"), 1500.0)])
def test_where_no_transport_knows_better_the_last_chunk_was_computed_when_launched(
    told_events: tuple[str, ...], computed_ms: float
) -> None:
    stories, one = Stories(), record("")
    stories.begins(one, "t")
    for at_s in (1.5, 1.0):  # chunks, and words out of order
        stories.hear(Story("P", "p", clock_identity(), [StoryEvent("t", e, at_s) for e in told_events]), 2.0)
    events = {event["name"]: event["ms"] for event in stories.story("t")["events"]}
    assert events == {"received": 0.0, "prefill_computed": computed_ms}


def test_milliseconds_come_in_hundredths() -> None:
    record = RequestRecord("/v1/completions", "a", 100.0)
    moments = (None, 100.0, 100.0123456, 100.0123556, 112.3456789)
    assert [record.ms(moment) for moment in moments] == [None, 0.0, 12.35, 12.36, 12345.68]
