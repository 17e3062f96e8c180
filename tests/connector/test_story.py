"""What the connector notes of a transfer, and how the proxy and the trace file get to know it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from tests.connector.agents import Decode, Prefill, start_decode, start_prefill, wait_for
from tests.connector.test_register import receive
from tests.ports import free_port
from twolane.connector.plan import Ended, StepPlan
from twolane.connector.scheduler import DecodeScheduler
from twolane.connector.settings import ConnectorSettings
from twolane.connector.story import Outbox
from twolane.protocol import (
    MAX_STORY_EVENTS,
    MAX_STORY_ID_LENGTH,
    Registration,
    Story,
    StoryEvent,
    clock_identity,
    decode_from_instance,
)

CAUSAL = [  # each of these can't come before the one above it
    ("P", "offered"),
    ("P", "scheduled"),
    ("P", "launched"),
    ("P", "pushed"),
    ("D", "landed"),
    ("D", "reported"),
    ("D", "stepped"),
    ("D", "ended"),
]
CAUSAL_IN_D = [("D", "allocated"), ("D", "announce_sent"), ("P", "announced"), ("P", "pushed"), ("D", "landed")]


class Proxy:
    """The discovery socket of a proxy, as far as these tests need one."""

    def __init__(self, port: int = 0) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.address = f"127.0.0.1:{port or free_port()}"
        self.socket.bind(f"tcp://{self.address}")
        self.registrations = 0
        self.stories: list[Story] = []

    def read(self) -> None:
        message = decode_from_instance(self.socket.recv_multipart()[-1])
        if isinstance(message, Registration):
            self.registrations += 1
        else:
            self.stories.append(message)

    def read_until(self, event: str) -> None:
        while event not in {one.event for _, one in self.events}:
            self.read()

    @property
    def events(self) -> list[tuple[str, StoryEvent]]:
        return [(story.role, event) for story in self.stories for event in story.events]

    def times(self) -> dict[tuple[str, str], float]:
        return {(role, event.event): event.at_s for role, event in self.events}

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


def settings(proxy: Proxy, port: int, **changes: Any) -> ConnectorSettings:
    return ConnectorSettings(http_address=f"127.0.0.1:{port}", discovery_address=proxy.address, **changes)


@pytest.fixture
def pair(proxy: Proxy, tmp_path: Path) -> Iterator[tuple[Prefill, Decode]]:
    prefill = start_prefill(settings(proxy, 20003, trace_file=str(tmp_path / "trace")))
    decode = start_decode(settings(proxy, 20005, trace_file=str(tmp_path / "trace")))
    try:
        yield prefill, decode
    finally:
        prefill.agent.stop()
        decode.agent.stop()


def transfer(prefill: Prefill, decode: Decode, transfer_id: str = "t", *, story: bool) -> None:
    """One whole request, from P's scheduler to D's last token."""
    prefill.offer(transfer_id, transfer_id, story=story)
    decode.receive(prefill.address, [20], 4, transfer_id, story=story)
    prefill.compute([3], 5, transfer_id)
    assert decode.wait_finished() == set()
    decode.agent.end_step()
    ended = [Ended(transfer_id, time.monotonic())] if story else []
    decode.agent.begin_step(StepPlan(ended=ended))
    prefill.finish(transfer_id)
    prefill.wait_freed(transfer_id, 30)


def in_order(times: dict[tuple[str, str], float], chain: list[tuple[str, str]]) -> bool:
    moments = [times[key] for key in chain if key in times]
    return moments == sorted(moments)


def test_the_proxy_hears_of_a_whole_transfer_from_both_sides(proxy: Proxy, pair: tuple[Prefill, Decode]) -> None:
    transfer(*pair, story=True)
    proxy.read_until("ended")
    proxy.read_until("pushed")
    times = proxy.times()
    assert set(times) == {*CAUSAL, *CAUSAL_IN_D}
    assert in_order(times, CAUSAL)
    assert in_order(times, CAUSAL_IN_D)
    assert {event.transfer_id for _, event in proxy.events} == {"t"}
    assert {(story.role, story.http_address) for story in proxy.stories} == {
        ("P", "127.0.0.1:20003"),
        ("D", "127.0.0.1:20005"),
    }
    assert {story.clock for story in proxy.stories} == {clock_identity()}
    assert {story.num_dropped for story in proxy.stories} == {0}


def test_an_announce_that_came_before_the_request_is_in_the_story(proxy: Proxy, pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    decode.receive(prefill.address, [20], 4, story=True)
    wait_for(lambda: bool(prefill.agent._side._offers._early), 30)
    prefill.offer(story=True)
    prefill.compute([3], 5)
    decode.wait_finished()
    proxy.read_until("pushed")
    times = proxy.times()
    assert times["P", "announced"] <= times["P", "offered"] <= times["P", "launched"]


def test_a_proxy_that_did_not_ask_hears_registrations_alone(proxy: Proxy, pair: tuple[Prefill, Decode]) -> None:
    """A router made for P2pNcclConnector ends its listening thread at a message that is no registration."""
    transfer(*pair, story=False)
    for agent in (pair[0].agent, pair[1].agent):
        agent.stop()
    proxy.socket.setsockopt(zmq.RCVTIMEO, 300)  # all was sent
    with contextlib.suppress(zmq.Again):
        while True:
            proxy.read()
    assert proxy.registrations >= 4, "both said hello and goodbye"
    assert not proxy.stories


def test_the_trace_file_holds_every_transfer_whoever_asked(pair: tuple[Prefill, Decode], tmp_path: Path) -> None:
    transfer(*pair, "asked", story=True)
    transfer(*pair, "silent", story=False)
    found: dict[str, dict[tuple[str, str], float]] = {"asked": {}, "silent": {}}
    for side in "PD":
        for line in (tmp_path / f"trace.{side}0.jsonl").read_text().splitlines():
            event = json.loads(line)
            assert (event["side"], event["rank"]) == (side, 0)
            found[event["transfer_id"]][side, event["event"]] = event["t"]
    assert set(found["asked"]) == {*CAUSAL, *CAUSAL_IN_D}
    assert set(found["silent"]) == {*CAUSAL, *CAUSAL_IN_D} - {("D", "ended")}
    for times in found.values():
        assert in_order(times, CAUSAL)


def test_what_nobody_could_hear_is_told_when_the_proxy_comes(proxy: Proxy) -> None:
    port = free_port()
    absent = ConnectorSettings(http_address="127.0.0.1:20003", discovery_address=f"127.0.0.1:{port}")
    prefill = start_prefill(absent)
    late = None
    try:
        for number in range(2 * MAX_STORY_EVENTS):
            prefill.offer(f"t{number}", f"r{number}", story=True)
        late = Proxy(port)
        late.read_until("offered")
        while len(late.events) < 2 * MAX_STORY_EVENTS:
            late.read()
    finally:
        prefill.agent.stop()
        if late is not None:
            late.close()
    assert [event.transfer_id for _, event in late.events] == [f"t{n}" for n in range(2 * MAX_STORY_EVENTS)]
    assert max(len(story.events) for story in late.stories) <= MAX_STORY_EVENTS


def test_the_last_words_come_before_the_goodbye(proxy: Proxy) -> None:
    prefill = start_prefill(settings(proxy, 20003))
    receive(proxy.socket)  # registered
    prefill.offer(story=True)
    prefill.agent.stop()
    proxy.read_until("offered")
    assert isinstance(decode_from_instance(proxy.socket.recv_multipart()[-1]), Registration)


def test_the_queue_is_bounded_and_counts_what_it_drops() -> None:
    outbox = Outbox()
    for number in range(100_000):
        outbox.put(StoryEvent(f"t{number}", "offered", 1.0))
    outbox.put(StoryEvent("x" * (MAX_STORY_ID_LENGTH + 1), "offered", 1.0))
    events, num_dropped = outbox.take()
    assert [event.transfer_id for event in events] == [f"t{n}" for n in range(MAX_STORY_EVENTS)]
    outbox.give_back(events, num_dropped)
    taken: list[StoryEvent] = []
    total_dropped = 0
    while (batch := outbox.take())[0]:
        taken += batch[0]
        total_dropped += batch[1]
    assert [event.transfer_id for event in taken] == [f"t{n}" for n in range(len(taken))]
    assert len(taken) + total_dropped == 100_001
    assert not outbox.has_many


def request(req_id: str, *, story: bool) -> Any:
    params = {"transfer_id": f"t-{req_id}", "remote_address": "127.0.0.1:1", "do_remote_prefill": True, "story": story}
    return SimpleNamespace(request_id=req_id, kv_transfer_params=params, prompt_token_ids=[1, 2], num_output_tokens=0)


def test_ds_scheduler_tells_when_the_last_token_was_there() -> None:
    scheduler = DecodeScheduler(block_size=16)
    empty = SimpleNamespace(scheduled_new_reqs=[], total_num_scheduled_tokens=0)
    before_s = time.monotonic()
    for one in (request("a", story=True), request("b", story=False)):
        scheduler.on_new_request(one)
        scheduler.request_finished(one)
    (ended,) = scheduler.take_plan(empty).ended
    assert ended.transfer_id == "t-a"
    assert before_s <= ended.at_s <= time.monotonic()
    assert not scheduler.take_plan(empty).ended
