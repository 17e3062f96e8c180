"""A real request's story, from both engines' own clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import CHUNK_TOKENS, Stack, complete, completion_body, wait_for
from twolane.launch.probes import get_json
from twolane.proxy.stories import ORDER

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# Each line in this order, since each moment needs the one before it.
CAUSAL = (
    ("received", "admitted", "prefill_sent", "prefill_accepted", "prefill_computed", "pushed", "landed"),
    ("landed", "first_step", "last_token", "last_byte"),
    ("admitted", "decode_sent", "allocated", "announced", "announce_heard", "pushed"),
    ("prefill_computed", "prefill_answered"),
    ("first_step", "first_byte", "last_byte"),
)


def story_of(stack: Stack, transfer_id: str) -> dict[str, Any]:
    story = get_json(stack.plan.proxy_address, f"/stats/requests/{transfer_id}")
    assert isinstance(story, dict)
    return story


@pytest.mark.matrix
def test_a_request_tells_all_its_moments_in_causal_order(stack: Stack) -> None:
    (prompt,) = make_prompts(seed=77, lengths=[2 * CHUNK_TOKENS + 50])
    complete(stack.url, completion_body(stack, prompt, 5))
    transfer_id = stack.stats()["recent"][-1]["transfer_id"]
    everything = set(ORDER)
    names: set[str] = set()

    def is_told() -> bool:
        names.update(event["name"] for event in story_of(stack, transfer_id)["events"])
        return names == everything

    wait_for(f"the engines' words: {everything - names}", is_told, 30.0)
    events = story_of(stack, transfer_id)["events"]
    at_ms = {event["name"]: event["ms"] for event in events}
    for chain in CAUSAL:
        moments = [at_ms[name] for name in chain]
        assert moments == sorted(moments), (chain, at_ms)
    assert [event["ms"] for event in events] == sorted(at_ms.values())
    heard = stack.stats()["stories"]
    assert (heard["impossible"], heard["other_clock"], heard["dropped_by_engines"]) == (0, 0, 0)
    _assert_the_command_prints(stack, transfer_id, events)


def _assert_the_command_prints(stack: Stack, transfer_id: str, events: list[dict[str, Any]]) -> None:
    port = stack.plan.proxy_address.rpartition(":")[2]
    command = [sys.executable, "-m", "twolane.cli", "trace", transfer_id, "--http-proxy-port", port]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TWOLANE_")}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
    lines = [line.split() for line in shown.splitlines()]
    printed = [words[3] for words in lines if len(words) > 3 and words[2] in {"proxy", "prefill", "decode"}]
    assert printed == [event["name"] for event in events], shown
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True, env=env)
    assert json.loads(as_json.stdout)["events"] == events
    print(shown)
