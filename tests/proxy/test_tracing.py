"""Trace context through the proxy, and the spans that a finished request becomes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from time import monotonic, time_ns
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode
from tests.proxy.scripted import Call, cluster
from tests.proxy.test_stories import tell_while_running

from twolane.errors import ConfigError
from twolane.proxy.spans import SpanExporter
from twolane.proxy.stats import RequestRecord
from twolane.proxy.tracing import RequestTrace, Tracer, begin_trace, make_tracer, parse_parent

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01"


def parse(*lines: str) -> Any:
    pairs = [line.split(": ", 1) for line in lines]
    return parse_parent([(name.encode(), value.encode()) for name, value in pairs])


def test_a_parent_is_read_as_the_standard_says() -> None:
    parent = parse(f"traceparent: {SAMPLED}", "tracestate: a=1", "tracestate: b=2")
    assert (parent.trace_id, parent.span_id, parent.is_sampled, parent.state) == (TRACE_ID, SPAN_ID, True, b"a=1,b=2")
    assert parse(f"traceparent: 00-{TRACE_ID}-{SPAN_ID}-02").is_sampled is False
    assert parse(f"traceparent: cc-{TRACE_ID}-{SPAN_ID}-01-what-comes-later").trace_id == TRACE_ID


@pytest.mark.parametrize(
    "value",
    [
        "",
        "garbage",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-01-more",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID}-{SPAN_ID}",
    ],
)
def test_what_is_no_parent_begins_a_new_trace(value: str) -> None:
    assert parse(f"traceparent: {value}", "tracestate: a=1") is None
    trace = begin_trace([(b"traceparent", value.encode())], False, "m")
    assert trace is not None
    assert trace.trace_id != TRACE_ID
    assert len({trace.root_id, trace.prefill_id, trace.decode_id}) == 3


def test_two_parents_are_none() -> None:
    assert parse(f"traceparent: {SAMPLED}", f"traceparent: {SAMPLED}") is None


@pytest.mark.parametrize("sends", [SAMPLED, f"00-{TRACE_ID}-{SPAN_ID}-00", "nonsense"])
async def test_without_a_collector_the_clients_context_goes_through_unchanged(sends: str) -> None:
    async with cluster(1, 1) as c:
        headers = {"traceparent": sends, "tracestate": "vendor=1"}
        await c.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        for instance in (c.p, c.d):
            seen = (await instance.call()).headers
            assert (seen["traceparent"], seen["tracestate"]) == (sends, "vendor=1")


@pytest.fixture
def memory() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


def tracer_into(memory: InMemorySpanExporter) -> Tracer:
    return Tracer(SpanExporter(SimpleSpanProcessor(memory)))


def by_name(memory: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = {span.name: span for span in memory.get_finished_spans()}
    assert len(spans) == len(memory.get_finished_spans())
    return spans


async def test_ps_and_ds_spans_hang_below_ours_and_ours_below_the_clients(memory: InMemorySpanExporter) -> None:
    tracer = tracer_into(memory)
    async with cluster(1, 1) as c:
        c.service._app._tracer = tracer
        tell_while_running(c)
        headers = {"traceparent": SAMPLED, "tracestate": "vendor=1", "x-request-id": "me"}
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        assert (await c.http.post("/v1/chat/completions", json=body, headers=headers)).is_success
        seen = {role: i.calls[0].headers for role, i in (("prefill", c.p), ("decode", c.d))}
    tracer.make_spans(float("inf"))
    spans = by_name(memory)
    assert set(spans) == {"POST /v1/chat/completions", "queue", "prefill", "handoff", "decode"}
    root = spans["POST /v1/chat/completions"]
    assert root.parent is not None
    assert root.parent.span_id == int(SPAN_ID, 16)
    assert root.kind is SpanKind.SERVER
    for name in ("queue", "prefill", "handoff", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id
    assert {span.context.trace_id for span in spans.values()} == {int(TRACE_ID, 16)}
    for lane, got in seen.items():
        assert got["traceparent"] == f"00-{TRACE_ID}-{spans[lane].context.span_id:016x}-01"
        assert got["tracestate"] == "vendor=1"
    attributes = dict(root.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["http.route"] == "/v1/chat/completions"
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "m"
    assert attributes["twolane.request_id"] == "me"
    assert (spans["prefill"].attributes or {})["server.port"] == c.p.port
    assert {event.name for event in spans["decode"].events} >= {"allocated", "landed", "last_token"}
    assert {event.name for event in spans["prefill"].events} >= {"prefill_accepted", "prefill_computed", "pushed"}


async def test_an_unsampled_trace_goes_through_and_makes_no_spans(memory: InMemorySpanExporter) -> None:
    tracer, sent = tracer_into(memory), f"00-{TRACE_ID}-{SPAN_ID}-00"
    async with cluster(1, 1) as c:
        c.service._app._tracer = tracer
        await c.http.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": sent})
        assert (await c.p.call()).headers["traceparent"] == sent
    tracer.make_spans(float("inf"))
    assert not memory.get_finished_spans()


async def test_a_failed_request_has_an_error_and_a_refused_one_has_not(memory: InMemorySpanExporter) -> None:
    async def break_off(call: Call) -> None:
        call.start_stream()
        await call.event({"number": 1})
        call.reset()

    tracer = tracer_into(memory)
    async with cluster(1, 1) as c:
        c.service._app._tracer = tracer
        c.d.behave = break_off
        await c.http.post("/v1/completions", json={"prompt": "x", "stream": True})
        c.d.behave = lambda call: call.reply(400, {"error": {"message": "no"}})
        tracer.make_spans(float("inf"))
        broken = by_name(memory)
        memory.clear()
        while (await c.complete()).status_code == 503:
            pass
    tracer.make_spans(float("inf"))
    root = broken["POST /v1/completions"]
    assert root.status.status_code is broken["decode"].status.status_code is StatusCode.ERROR
    assert (root.attributes or {})["error.type"] == "decode_died"
    refused = [
        span for span in memory.get_finished_spans() if (span.attributes or {}).get("twolane.outcome") == "rejected"
    ]
    assert [span.status.status_code for span in refused] == [StatusCode.UNSET]
    assert (refused[0].attributes or {})["http.response.status_code"] == 400


def record_at(started_at: float) -> RequestRecord:
    trace = RequestTrace(None, TRACE_ID, "a" * 16, "b" * 16, "c" * 16, False, "")
    record = RequestRecord("/v1/completions", "r", started_at, outcome="ok", status=200, trace=trace)
    record.prefill, record.decode, record.ended_at = "127.0.0.1:1", "127.0.0.1:2", started_at + 4
    record.admitted_at, record.prefill_sent_at, record.decode_sent_at = (started_at + s for s in (1, 1, 1))
    record.prefill_done_at, record.first_byte_at = started_at + 2.5, started_at + 3
    record.engine_moments = {"prefill_computed": started_at + 2, "landed": started_at + 2.75}
    return record


def test_spans_have_the_times_of_what_happened(memory: InMemorySpanExporter) -> None:
    now, now_ns = monotonic(), time_ns()
    record = record_at(now - 10)
    assert record.trace is not None
    SpanExporter(SimpleSpanProcessor(memory)).put(record, record.trace)
    spans = by_name(memory)
    expected = {
        "POST /v1/completions": (0, 4),
        "queue": (0, 1),
        "prefill": (1, 2.5),
        "handoff": (2, 2.75),
        "decode": (1, 4),
    }
    for name, (start_s, end_s) in expected.items():
        for at_ns, at_s in ((spans[name].start_time, start_s), (spans[name].end_time, end_s)):
            assert at_ns is not None
            assert (at_ns - now_ns) / 1e9 + 10 == pytest.approx(at_s, abs=0.5)


def test_where_the_engines_tell_nothing_the_answers_bound_the_handoff(memory: InMemorySpanExporter) -> None:
    record = record_at(monotonic())
    assert record.trace is not None
    record.engine_moments = None
    SpanExporter(SimpleSpanProcessor(memory)).put(record, record.trace)
    handoff = by_name(memory)["handoff"]
    assert handoff.start_time is not None
    assert handoff.end_time is not None
    assert (handoff.end_time - handoff.start_time) / 1e9 == pytest.approx(0.5, abs=0.01)


def test_the_engines_last_words_are_waited_for() -> None:
    put: list[RequestRecord] = []

    class List:
        def put(self, record: RequestRecord, trace: RequestTrace) -> None:
            put.append(record)

        def close(self) -> None:
            pass

    tracer, record = Tracer(List()), record_at(0.0)
    tracer.ended(record)
    tracer.make_spans(monotonic())
    assert not put
    tracer.make_spans(monotonic() + 2)
    assert put == [record]


def test_a_proxy_without_opentelemetry_says_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from twolane.errors import ConfigError
from twolane.proxy.tracing import make_tracer
assert make_tracer("") is None
try:
    make_tracer("http://127.0.0.1:4318")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'twolane[otel]'" in done.stdout


def test_nothing_of_opentelemetry_is_imported_unless_it_is_wanted() -> None:
    program = "import sys, twolane.proxy.service; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="as http://127"):
        make_tracer("127.0.0.1:4317")
