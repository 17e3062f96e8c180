"""The openai package, as users have it, against the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from tests.proxy.scripted import MODEL, Call, Cluster, chunk, cluster

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def client(c: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{c.url}/v1", api_key="key", max_retries=0) as made:
        yield made


async def test_chat_whole_and_streamed() -> None:
    async with cluster() as c, client(c) as ai:
        whole = await ai.chat.completions.create(model=MODEL, messages=HELLO)
        assert whole.choices[0].message.content == "one two three"
        stream = await ai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        words = [part.choices[0].delta.content async for part in stream]
        assert words == ["one ", "two ", "three"]
        assert (await c.p.call()).headers["authorization"] == "Bearer key"


async def test_completion_whole_and_streamed() -> None:
    async with cluster() as c, client(c) as ai:
        whole = await ai.completions.create(model=MODEL, prompt="hello")
        assert whole.choices[0].text == "one two three"
        stream = await ai.completions.create(model=MODEL, prompt="hello", stream=True)
        assert [part.choices[0].text async for part in stream] == ["one ", "two ", "three"]


async def test_models() -> None:
    async with cluster() as c, client(c) as ai:
        assert [model.id async for model in ai.models.list()] == [MODEL]


async def test_errors_are_openai_errors() -> None:
    async with cluster(0, 0) as c, client(c) as ai:
        with pytest.raises(openai.InternalServerError, match="no decode instance is ready"):
            await ai.completions.create(model=MODEL, prompt="hello")


async def test_stream_that_dies_raises() -> None:
    async def die(call: Call) -> None:
        call.start_stream()
        await call.event(chunk("one ", chat=True))
        await asyncio.sleep(0.05)
        call.reset()

    async with cluster() as c, client(c) as ai:
        c.d.behave = die
        stream = await ai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        assert (await anext(stream)).choices[0].delta.content == "one "
        with pytest.raises(openai.APIError, match="broke off"):
            await anext(stream)
