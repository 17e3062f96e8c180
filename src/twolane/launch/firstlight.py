"""The first real request through both lanes, and the proof that the KV cache crossed."""

from __future__ import annotations

import http.client
import json
import re
import time

import msgspec

from twolane.errors import StartError
from twolane.launch import probes
from twolane.launch.plan import Plan

PROMPT = "The capital of France is"
MAX_TOKENS = 20
ANSWER_TIMEOUT_S = 300.0
# vLLM's counter of prompt tokens by where they came from: vllm/v1/metrics/loggers.py
SOURCE_METRIC = re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} ([0-9.e+]+)$', re.MULTILINE)


class FirstLight(msgspec.Struct, frozen=True):
    """What came of it. `stages_ms`: what the proxy measured, empty where it says nothing."""

    answer: str
    prompt_tokens: int
    total_ms: float
    moved_tokens: int  # of the prompt, whose KV D got from P
    computed_tokens: int  # of the prompt, that D computed itself
    stages_ms: dict[str, float]


def first_light(plan: Plan) -> FirstLight:
    """StartError if no answer comes, or if it came without a handoff."""
    before = decode_sources(plan)
    began_s = time.monotonic()
    text, usage = _complete(plan)
    total_ms = (time.monotonic() - began_s) * 1000
    after = decode_sources(plan)
    light = FirstLight(
        answer=text,
        prompt_tokens=usage["prompt_tokens"],
        total_ms=total_ms,
        moved_tokens=after.get("external_kv_transfer", 0) - before.get("external_kv_transfer", 0),
        computed_tokens=after.get("local_compute", 0) - before.get("local_compute", 0),
        stages_ms=_stages(plan),
    )
    if light.moved_tokens < 1:
        raise StartError(
            f"the answer came ({light.answer!r}), but no KV moved from P to D, which computed the prompt itself; "
            "the reason is in " + " and ".join(spec.log for spec in plan.instances())
        )
    return light


def _complete(plan: Plan) -> tuple[str, dict[str, int]]:
    """The answer's text and usage, streamed, so that the proxy sees when the first token came."""
    body = {"model": plan.model.names[0], "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        status, answer = probes.request(plan.proxy_address, "POST", "/v1/completions", body, ANSWER_TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        raise StartError(f"the first request through the proxy got no answer: {error!r}; see logs") from error
    text, usage = read_stream(answer)
    if status != 200 or not usage:
        raise StartError(f"the first request through the proxy failed with status {status}: {answer[:500]!r}")
    return text, usage


def read_stream(answer: bytes) -> tuple[str, dict[str, int]]:
    """Pure: the text and the usage of a streamed completion; no usage if the stream wasn't whole."""
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    usages = [event["usage"] for event in events if event.get("usage")]
    return text, usages[-1] if usages else {}


def decode_sources(plan: Plan) -> dict[str, int]:
    """Prompt tokens by source, all decode instances together."""
    return sources_of([spec.address for spec in plan.services if spec.role == "decode"])


def sources_of(addresses: list[str]) -> dict[str, int]:
    """The same of the decode instances at these addresses. One that doesn't answer counts nothing."""
    total: dict[str, int] = {}
    for address in addresses:
        try:
            status, text = probes.request(address, "GET", "/metrics")
        except (OSError, http.client.HTTPException):
            continue
        for source, value in prompt_sources(text.decode() if status == 200 else "").items():
            total[source] = total.get(source, 0) + value
    return total


def prompt_sources(metrics: str) -> dict[str, int]:
    """Pure: the counters in a /metrics page."""
    totals: dict[str, int] = {}
    for source, value in SOURCE_METRIC.findall(metrics):
        totals[source] = totals.get(source, 0) + int(float(value))
    return totals


def _stages(plan: Plan) -> dict[str, float]:
    """The last request's times, from the proxy."""
    stats = probes.get_json(plan.proxy_address, "/stats")
    recent = stats.get("recent") if isinstance(stats, dict) else None
    entry = recent[-1] if isinstance(recent, list) and recent else {}
    names = ("prefill_done_ms", "first_byte_ms", "total_ms")
    return {name: float(entry[name]) for name in names if isinstance(entry.get(name), int | float)}


def curl_line(plan: Plan) -> str:
    """A request to copy."""
    body = {"model": plan.model.names[0], "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
    url = f"{plan.proxy_url}/v1/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
