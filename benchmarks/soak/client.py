"""A client: asks, notes every token id and the longest wait, leaves where it was told to. Never raises."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from benchmarks.soak.judge import Outcome, Reference, certain_tokens
from benchmarks.soak.phases import CLIENT_DEADLINE_S
from benchmarks.soak.workload import MAX_OUTPUT_TOKENS, Request


def new_client() -> httpx.AsyncClient:
    """A connection a request: a client that leaves takes nobody else's with it."""
    return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_keepalive_connections=0))  # noqa: S113 - see ask


def completion(model: str, prompt: list[int], max_tokens: int, **more: object) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {**body, "return_token_ids": True, **more}


async def ask(client: httpx.AsyncClient, url: str, model: str, request: Request, prompt: list[int]) -> Outcome:
    """Within CLIENT_DEADLINE_S, or it is lost."""
    outcome = Outcome(request)
    body = completion(model, prompt, request.max_tokens, stream=request.stream)
    asked_s = time.monotonic()
    watch = _Watch(outcome, asked_s)
    try:
        async with asyncio.timeout(CLIENT_DEADLINE_S):
            await _ask_until_left(client, url, body, watch)
    except TimeoutError:
        outcome.end, outcome.message = "lost", f"no end after {CLIENT_DEADLINE_S:g} s"
    except httpx.HTTPError as error:
        outcome.end, outcome.message = "lost", f"{type(error).__name__}: {error}"
    watch.word()
    outcome.total_s = time.monotonic() - asked_s
    return outcome


class _Watch:
    """Notes the longest wait for a word of the server."""

    def __init__(self, outcome: Outcome, asked_s: float) -> None:
        self.outcome = outcome
        self.asked_s = self.last_s = asked_s

    def word(self) -> None:
        now_s = time.monotonic()
        self.outcome.longest_wait_s = max(self.outcome.longest_wait_s, now_s - self.last_s)
        self.last_s = now_s


async def _ask_until_left(client: httpx.AsyncClient, url: str, body: dict[str, Any], watch: _Watch) -> None:
    outcome, leave = watch.outcome, watch.outcome.request.leave
    if leave is None or leave.after_tokens:
        return await _exchange(client, url, body, watch)
    try:
        async with asyncio.timeout(leave.after_s):
            await _exchange(client, url, body, watch)
    except TimeoutError:
        outcome.end, outcome.message = "left", ""
    return None


async def _exchange(client: httpx.AsyncClient, url: str, body: dict[str, Any], watch: _Watch) -> None:
    outcome = watch.outcome
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200 or not outcome.request.stream:
            await answer.aread()
            note_body(outcome, answer.status_code, answer.text)
            return
        async for event in _events(answer):
            watch.word()
            if note_event(outcome, event):
                return
            outcome.event_s.append(watch.last_s - watch.asked_s)
    outcome.end, outcome.message = "lost", "the stream ended without a last word"


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]


def note_body(outcome: Outcome, status: int, text: str) -> None:
    """A whole answer: tokens, or an error object with a message."""
    try:
        answer = json.loads(text)
        if status == 200:
            outcome.tokens += answer["choices"][0]["token_ids"]
            outcome.end, outcome.message = "answered", ""
        else:
            outcome.end, outcome.message = "error", f"{status}: {answer['error']['message']}"
    except (ValueError, KeyError, TypeError, IndexError):
        outcome.end, outcome.message = "lost", f"{status} with no answer and no error: {text[:200]!r}"


def note_event(outcome: Outcome, event: str) -> bool:
    """One of a stream's events; True if it was the last word."""
    if event == "[DONE]":
        outcome.end, outcome.message = "answered", ""
        return True
    try:
        data = json.loads(event)
        if "error" in data:
            outcome.end, outcome.message = "error", f"in the stream: {data['error']['message']}"
            return True
        for choice in data["choices"]:
            outcome.tokens += choice.get("token_ids") or []
    except (ValueError, KeyError, TypeError):
        outcome.end, outcome.message = "lost", f"not understood: {event[:200]!r}"
        return True
    leave = outcome.request.leave
    if leave is not None and leave.after_tokens and len(outcome.tokens) >= leave.after_tokens:
        outcome.end, outcome.message = "left", ""
        return True
    return False


async def make_reference(
    address: str, prompts: list[list[int]], at_once: int = 8, max_tokens: int = MAX_OUTPUT_TOKENS
) -> list[Reference]:
    """What is answered there to each prompt, as far as rounding can't change it."""
    gate = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, model: str, prompt: list[int]) -> Reference:
        body = completion(model, prompt, max_tokens, logprobs=2, return_tokens_as_token_ids=True)
        async with gate:
            answer = await client.post(f"http://{address}/v1/completions", json=body)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        top = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
        return Reference(certain_tokens(choice["token_ids"], [step[0] - step[1] for step in top]))

    async with new_client() as client:
        model = (await client.get(f"http://{address}/v1/models")).json()["data"][0]["id"]
        return list(await asyncio.gather(*(one(client, model, prompt) for prompt in prompts)))
