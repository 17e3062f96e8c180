"""Golden: what each leg's body is, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twolane.errors import BadRequestError
from twolane.protocol import HandoffParams
from twolane.proxy.body import parse_body

TO_P = HandoffParams("t", "d:1", do_remote_decode=True)
TO_D = HandoffParams("t", "p:1", do_remote_prefill=True)
FOR_P = {
    "transfer_id": "t",
    "remote_address": "d:1",
    "do_remote_prefill": False,
    "do_remote_decode": True,
    "story": False,
}
FOR_D = {
    "transfer_id": "t",
    "remote_address": "p:1",
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "story": False,
}
ONE_TOKEN = {"max_tokens": 1, "stream": False, "n": 1, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]

# name: (chat?, the client's fields, what P gets of them beside ONE_TOKEN and kv_transfer_params)
GOLDEN: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "text": (False, {"model": "m", "prompt": "hi"}, {"model": "m", "prompt": "hi"}),
    "token ids": (False, {"prompt": [1, 2, 3]}, {"prompt": [1, 2, 3]}),
    "list of one text": (False, {"prompt": ["hi"]}, {"prompt": ["hi"]}),
    "list of one list of ids": (False, {"prompt": [[1, 2]]}, {"prompt": [[1, 2]]}),
    "chat": (True, {"model": "m", "messages": MESSAGES}, {"model": "m", "messages": MESSAGES}),
    "multimodal": (True, {"messages": IMAGE}, {"messages": IMAGE}),
    "max_completion_tokens": (
        True,
        {"messages": MESSAGES, "max_completion_tokens": 50},
        {"messages": MESSAGES, "max_completion_tokens": 1},
    ),
    "max_tokens": (False, {"prompt": "hi", "max_tokens": 50}, {"prompt": "hi"}),
    "stream_options": (
        True,
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": MESSAGES},
    ),
    "min_tokens": (False, {"prompt": "hi", "min_tokens": 9, "ignore_eos": True}, {"prompt": "hi", "ignore_eos": True}),
    "n of one": (False, {"prompt": "hi", "n": 1, "best_of": 1}, {"prompt": "hi"}),
    "n of null": (False, {"prompt": "hi", "n": None, "best_of": None}, {"prompt": "hi"}),
    "logprobs": (False, {"prompt": "hi", "logprobs": 5}, {"prompt": "hi"}),
    "chat logprobs": (True, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 5}, {"messages": MESSAGES}),
    "echo": (False, {"prompt": "hi", "echo": True}, {"prompt": "hi"}),
    "suffix": (False, {"prompt": "hi", "suffix": "x"}, {"prompt": "hi", "suffix": "x"}),
    "response_format": (
        True,
        {"messages": MESSAGES, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"messages": MESSAGES},
    ),
    "tools": (
        True,
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": None},
    ),
    "tools required": (
        True,
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": None},
    ),
    "tool by name": (
        True,
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": None},
    ),
    "tools forbidden": (  # an instance may be told to leave them out of the prompt then
        True,
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"},
    ),
    "sampling": (
        False,
        {"prompt": "hi", "temperature": 1.5, "top_p": 0.5, "seed": 7, "logit_bias": {"1": 2}, "stop": ["a"]},
        {"prompt": "hi"},
    ),
    "what templates see stays": (
        True,
        {
            "messages": MESSAGES,
            "chat_template_kwargs": {"a": 1},
            "reasoning_effort": "low",
            "documents": [],
            "x": [1.50],
        },
        {
            "messages": MESSAGES,
            "chat_template_kwargs": {"a": 1},
            "reasoning_effort": "low",
            "documents": [],
            "x": [1.5],
        },
    ),
    "what the tokenizer sees stays": (
        False,
        {"prompt": "hi", "add_special_tokens": False, "truncate_prompt_tokens": 5, "cache_salt": "s"},
        {"prompt": "hi", "add_special_tokens": False, "truncate_prompt_tokens": 5, "cache_salt": "s"},
    ),
    "forged parameters": (False, {"prompt": "hi", "kv_transfer_params": {"transfer_id": "u"}}, {"prompt": "hi"}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_prefill_leg_does_the_least_that_fills_the_cache(name: str) -> None:
    chat, fields, expected = GOLDEN[name]
    body = parse_body(json.dumps(fields).encode(), chat)
    assert body.whole_because == ""
    assert json.loads(body.for_prefill(TO_P)) == expected | ONE_TOKEN | {"kv_transfer_params": FOR_P}


@pytest.mark.parametrize("name", GOLDEN)
def test_decode_leg_gets_the_body_as_it_came(name: str) -> None:
    chat, fields, _ = GOLDEN[name]
    body = parse_body(json.dumps(fields).encode(), chat)
    assert json.loads(body.for_decode(TO_D)) == fields | {"kv_transfer_params": FOR_D}
    alone = {name: value for name, value in fields.items() if name != "kv_transfer_params"}
    assert json.loads(body.for_decode_alone()) == alone


WHOLE: dict[str, tuple[bool, dict[str, Any]]] = {
    "prompt": (False, {"prompt": ["a", "b"]}),
    "prompt (ids)": (False, {"prompt": [[1], [2]]}),
    "prompt (none)": (False, {"prompt": []}),
    "n": (False, {"prompt": "a", "n": 2}),
    "n (chat)": (True, {"messages": MESSAGES, "n": 3}),
    "n (nonsense)": (True, {"messages": MESSAGES, "n": "two"}),
    "best_of": (False, {"prompt": "a", "best_of": 2}),
    "use_beam_search": (False, {"prompt": "a", "use_beam_search": True}),
    "prompt_logprobs": (False, {"prompt": "a", "prompt_logprobs": 0}),
    "prompt_embeds": (False, {"prompt_embeds": "AA=="}),
    "echo": (False, {"prompt": "a", "echo": True, "logprobs": 0}),
    "echo (chat)": (True, {"messages": MESSAGES, "echo": True}),
    "truncate_prompt_tokens": (False, {"prompt": "a", "truncate_prompt_tokens": -1}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_names_the_field(name: str) -> None:
    chat, fields = WHOLE[name]
    raw = json.dumps(fields).encode()
    body = parse_body(raw, chat)
    assert body.whole_because == name.partition(" ")[0]
    assert body.for_decode_alone() == raw


def test_decode_leg_keeps_the_clients_very_bytes() -> None:
    raw = b' { "prompt" : "h\\u00e9 \xc3\xa9", "x": 1.50, "big": 123456789012345678901234567890, "e": 1E2 } \n'
    body = parse_body(raw, is_chat=False)
    assert body.for_decode(TO_D).startswith(raw.rstrip()[:-1])
    assert b'"h\\u00e9 \xc3\xa9"' in body.for_prefill(TO_P)
    assert b"1.50" in body.for_prefill(TO_P)


def test_empty_object_is_a_body() -> None:
    assert json.loads(parse_body(b"{ }", is_chat=False).for_decode(TO_D)) == {"kv_transfer_params": FOR_D}


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"1", b'"a"', b"null", b"{} x", b'{"a": nan}', b"\xff", b'{"\xff": 1}']
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse_body(raw, is_chat=False)


KNOWN = ["prompt", "messages", "n", "stream", "tools", "tool_choice", "echo", "logprobs", "kv_transfer_params", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=4), VALUES, max_size=8), st.booleans(), st.integers(0, 3)
)
def test_any_object_comes_through_with_one_set_of_parameters(fields: dict[str, Any], chat: bool, indent: int) -> None:
    body = parse_body(json.dumps(fields, indent=indent or None).encode(), chat)
    assert json.loads(body.for_decode(TO_D)) == fields | {"kv_transfer_params": FOR_D}
    for_prefill = json.loads(body.for_prefill(TO_P))
    assert for_prefill["kv_transfer_params"] == FOR_P
    assert for_prefill["max_tokens"] == 1
    assert "kv_transfer_params" not in json.loads(body.for_decode_alone())
