"""One client body made into the bodies of its two legs. Pure.

Only the top level of the JSON is taken apart; values stay the bytes that the client sent, so that numbers, escapes and
unknown fields reach the instances as they came.

P must render and tokenize the very same prompt as D, and do nothing else that costs time: so what only shapes the
answer is dropped, and what vLLM's chat templates may see is kept (tools, documents, chat_template_kwargs,
reasoning_effort, ...). The choice of fields follows vllm/entrypoints/openai/{completion,chat_completion}/protocol.py of
0.26 to 0.32. Where a template does look at a dropped field (Kimi K3 shows `tool_choice` and `response_format` to the
model), the prompts differ, P refuses the transfer by its digest, and D computes the prompt: slower, not wrong.
"""

from __future__ import annotations

import msgspec

from twolane.errors import BadRequestError

Fields = dict[str, msgspec.Raw]

KV_PARAMS = "kv_transfer_params"

# They shape the answer, not the prompt: sampling, stopping, guided decoding, what is reported.
_NOT_FOR_PREFILL = frozenset(
    (
        KV_PARAMS,
        "allowed_token_ids",
        "bad_words",
        "best_of",
        "echo",
        "frequency_penalty",
        "include_stop_str_in_output",
        "length_penalty",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_detection",
        "repetition_penalty",
        "response_format",
        "return_prompt_text",
        "return_token_ids",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "seed",
        "stop",
        "stop_token_ids",
        "stream_interval",
        "stream_options",
        "structured_outputs",
        "temperature",
        "thinking_token_budget",
        "top_k",
        "top_logprobs",
        "top_p",
    )
)
# Without one of these only the number of prompts speaks against it: most bodies need no closer look.
_MAY_NOT_SPLIT = frozenset(
    ("n", "best_of", "use_beam_search", "prompt_embeds", "prompt_logprobs", "echo", "truncate_prompt_tokens")
)
_ONE = msgspec.Raw(b"1")
_NULL = msgspec.Raw(b"null")
# One greedy token: no sorting of the vocabulary, no random state.
_ONE_TOKEN: Fields = {"max_tokens": _ONE, "stream": msgspec.Raw(b"false")}
_FOR_PREFILL: Fields = {**_ONE_TOKEN, "n": _ONE, "temperature": msgspec.Raw(b"0")}
_BEGINNING_BYTES = 1024
_BYTES_A_TOKEN = 4  # of text, roughly, in the languages and tokenizers that are common

_decode_fields = msgspec.json.Decoder(Fields).decode
_encode = msgspec.json.encode


class SplitBody(msgspec.Struct, frozen=True):
    """A client's body. `whole_because` names the field for which it can't be split, or is empty."""

    raw: bytes
    fields: Fields
    stream: bool
    whole_because: str
    num_prompt_tokens: int  # token ids are counted, text is estimated

    def for_prefill(self, params: object = None, **more: object) -> bytes:
        """The least work that fills the KV cache. `params` are the `kv_transfer_params`, if the kind has any."""
        fields: dict[str, object] = dict(more)
        fields.update(self._prompt_fields())
        if params is not None:
            fields[KV_PARAMS] = params
        return _encode(fields)

    def for_prefill_of_all(self) -> bytes:
        """For a body that can't be split, on its way to a D that can't do without P: every prompt, every choice."""
        fields = {name: value for name, value in self.fields.items() if name not in (KV_PARAMS, "stream_options")}
        fields.update(_ONE_TOKEN)
        if "max_completion_tokens" in fields:
            fields["max_completion_tokens"] = _ONE
        fields.pop("min_tokens", None)
        return _encode(fields)

    def _prompt_fields(self) -> Fields:
        fields = {name: value for name, value in self.fields.items() if name not in _NOT_FOR_PREFILL}
        fields.update(_FOR_PREFILL)
        if "max_completion_tokens" in fields:
            fields["max_completion_tokens"] = _ONE
        if "tools" in fields and not _is_none_choice(fields.get("tool_choice")):
            # Null renders the tools into the prompt like `auto` and `required` do, without a grammar and without
            # vLLM's check for --enable-auto-tool-choice. `none` stays: an instance may be told to leave tools out then.
            fields["tool_choice"] = _NULL
        return fields

    def for_decode(self, params: object) -> bytes:
        """The body as it came, and where the KV comes from."""
        if KV_PARAMS in self.fields:
            return _encode({**self.fields, KV_PARAMS: params})
        separator = b"," if self.fields else b""
        # The decoder has seen one JSON object, so the last brace is its end.
        end = self.raw.rindex(b"}")
        return b'%b%b"%b":%b}' % (self.raw[:end], separator, KV_PARAMS.encode(), _encode(params))

    def for_decode_alone(self) -> bytes:
        """D computes the prompt itself. What a client says about KV transfers is dropped."""
        if KV_PARAMS not in self.fields:
            return self.raw
        return _encode({name: value for name, value in self.fields.items() if name != KV_PARAMS})

    def model(self) -> str:
        """As the client names it; empty if it names none."""
        value = _value(self.fields, "model")
        return value if isinstance(value, str) else ""

    def prompt_beginning(self) -> bytes:
        """The same for prompts that begin the same; for a chat, in every turn."""
        messages = self.fields.get("messages")
        if messages is None:
            return bytes(memoryview(self.fields.get("prompt", b""))[:_BEGINNING_BYTES])
        return _beginning_of_chat(messages)


def parse_body(raw: bytes, is_chat: bool) -> SplitBody:
    """Raises BadRequestError if `raw` isn't a JSON object. What the fields hold is for the instances to judge."""
    try:
        fields = _decode_fields(raw)
        stream = _value(fields, "stream") is True
        return SplitBody(raw, fields, stream, _why_whole(fields, is_chat), _count_tokens(fields, is_chat))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the request's body is not a JSON object: {error}") from error


def _count_tokens(fields: Fields, is_chat: bool) -> int:
    """A list of token ids holds one more than it has commas."""
    raw = fields.get("messages" if is_chat else "prompt")
    if raw is None:
        return 0
    start = b"" if is_chat else bytes(memoryview(raw)[:64]).replace(b"[", b" ").lstrip()
    if start[:1].isdigit():
        return bytes(raw).count(b",") + 1
    return len(memoryview(raw)) // _BYTES_A_TOKEN


def _beginning_of_chat(messages: msgspec.Raw) -> bytes:
    """Up to the first user's message: what follows differs from turn to turn."""
    try:
        parts = msgspec.json.decode(messages, type=list[msgspec.Raw])
    except msgspec.DecodeError:
        return b""
    beginning = b""
    for part in parts:
        beginning += bytes(part)
        if len(beginning) >= _BEGINNING_BYTES or b'"user"' in bytes(part):
            break
    return beginning[:_BEGINNING_BYTES]


def _is_none_choice(choice: msgspec.Raw | None) -> bool:
    return choice is not None and bytes(choice).strip() == b'"none"'


def _value(fields: Fields, name: str) -> object:
    raw = fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)


def _why_whole(fields: Fields, is_chat: bool) -> str:
    """The field for which P and D can't share this request; empty if they can."""
    if _MAY_NOT_SPLIT.isdisjoint(fields):
        return "prompt" if not is_chat and _has_many_prompts(fields) else ""
    limit = _value(fields, "truncate_prompt_tokens")
    reasons = {
        # Several answers from one prompt are several requests in the engine; one transfer fills one of them.
        "n": _value(fields, "n") not in (None, 1),
        "best_of": _value(fields, "best_of") not in (None, 1),
        "use_beam_search": bool(_value(fields, "use_beam_search")),
        "prompt_embeds": "prompt_embeds" in fields,  # no token ids to compare
        # The engine that answers must see every prompt token.
        "prompt_logprobs": _value(fields, "prompt_logprobs") is not None,
        # With echo, vLLM takes (top_)logprobs for prompt_logprobs; chat's default of 0 counts.
        "echo": bool(_value(fields, "echo")) and (is_chat or _value(fields, "logprobs") is not None),
        # To the model's length less max_tokens, which differ.
        "truncate_prompt_tokens": isinstance(limit, int) and limit < 0,
        "prompt": not is_chat and _has_many_prompts(fields),
    }
    return next((name for name, applies in reasons.items() if applies), "")


def _has_many_prompts(fields: Fields) -> bool:
    """A list of prompts is several requests; a list with one prompt, or of token ids, is one."""
    raw = fields.get("prompt")
    start = bytes(memoryview(raw)[:64]).lstrip() if raw is not None else b""
    if raw is None or not start.startswith(b"[") or start[1:].lstrip()[:1].isdigit():
        return False
    prompts: list[msgspec.Raw] = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return len(prompts) != 1
