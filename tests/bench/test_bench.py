"""The benchmark's own arithmetic and client, so that a figure can be believed."""

from __future__ import annotations

import asyncio

import pytest

from twolane.bench.client import Sample, ask_once, run_at_times
from twolane.bench.report import percentile, summarize
from twolane.bench.workload import Ask, one_at_a_time, poisson


async def serve(answer: bytes, pieces: list[bytes], pause_s: float = 0.0) -> asyncio.Server:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        for piece in pieces:
            await asyncio.sleep(pause_s)
            writer.write(piece)
            await writer.drain()
        writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> str:
    return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'


async def test_each_event_has_its_time_also_when_events_are_cut_or_joined() -> None:
    pieces = [TOKEN + TOKEN[:9], TOKEN[9:] + TOKEN, USAGE + b"data: [DONE]\n\n"]
    async with await serve(STREAM_HEAD, [*map(chunk, pieces), b"0\r\n\r\n"], 0.02) as server:
        sample = await ask_once(port_of(server), "m", Ask(0.0, [1], 3), 5.0)
    assert sample.error == ""
    assert (len(sample.event_s), sample.num_tokens) == (3, 3)
    assert sample.ttft_s >= 0.02
    assert sample.gaps_s[0] >= 0.01


@pytest.mark.parametrize(
    ("answer", "pieces", "error"),
    [
        (STREAM_HEAD, [chunk(TOKEN)], "closed"),
        (STREAM_HEAD, [chunk(TOKEN), b"0\r\n\r\n"], "0 of 3 tokens"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", [], "503"),
        (b"not http\r\n\r\n", [], "HttpParser"),
    ],
)
async def test_an_answer_that_is_not_whole_is_a_failure(answer: bytes, pieces: list[bytes], error: str) -> None:
    async with await serve(answer, pieces) as server:
        sample = await ask_once(port_of(server), "m", Ask(0.0, [1], 3), 5.0)
    assert error in sample.error


async def test_nobody_there_is_a_failure() -> None:
    samples = await run_at_times("127.0.0.1:1", "m", [Ask(0.0, [1], 1)], 5.0)
    assert "refused" in samples[0].error.lower()


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)


def test_failures_are_counted_and_kept_out_of_the_figures() -> None:
    good = Sample(10.0, [10.1, 10.2, 10.4], 3)
    summary = summarize([good, Sample(10.0, error="503: busy")])
    assert (summary["requests"], summary["failed"], summary["first_error"]) == (2, 1, "503: busy")
    assert summary["ttft_p50_ms"] == 100.0
    assert summary["itl_p50_ms"] == 150.0


def test_workloads_are_seeded() -> None:
    assert poisson(1, 5, 10, 2, 1.0) == poisson(1, 5, 10, 2, 1.0)
    assert one_at_a_time(1, 2, 10, 2) != one_at_a_time(2, 2, 10, 2)
