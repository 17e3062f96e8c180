"""A finished request's record -> OpenTelemetry spans -> a collector. Imported only where an endpoint is configured.

POST /v1/...      the request, from its last byte in to its last byte out; child of the client's span
  queue           until its turn came
  prefill         P's leg, with what P's engine told as events; vLLM's spans of P hang below
  handoff         from the last layer computed to the last byte in D's blocks
  decode          D's leg, with what D's engine told; vLLM's spans of D hang below
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Literal

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import export as sdk
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.status import Status, StatusCode

from twolane import __version__
from twolane.addresses import split_address
from twolane.proxy.stories import Moment, moments_of
from twolane.proxy.tracing import RequestTrace

if TYPE_CHECKING:
    from twolane.proxy.stats import RequestRecord

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 5.0
# No fault of ours; `open`: the client left before its turn came.
_FINE = frozenset(("ok", "rejected", "too_busy", "client_left", "client_stalled", "open"))
_KINDS = {"server": api.SpanKind.SERVER, "client": api.SpanKind.CLIENT, "internal": api.SpanKind.INTERNAL}

Attributes = dict[str, str | int | bool]


@dataclass(frozen=True)
class Part:
    """A span of the request. Times are monotonic, in s. `error`: why it failed; empty: it didn't."""

    name: str
    span_id: str  # empty: any
    start_at: float
    end_at: float
    kind: Literal["server", "client", "internal"] = "internal"
    attributes: Attributes = field(default_factory=dict)
    moments: Sequence[Moment] = ()
    error: str = ""


def parts_of(record: RequestRecord, trace: RequestTrace) -> list[Part]:
    """The root first. Pure. A part of which an end isn't known is left out."""
    moments = moments_of(record)
    at = {moment.name: moment.at_s for moment in moments}
    end_at = max(moment.at_s for moment in moments) if record.ended_at is None else record.ended_at
    error = "" if record.outcome in _FINE else record.outcome
    parts = [Part("", trace.root_id, record.started_at, end_at, "server", _root_attributes(record, trace), (), error)]
    if "admitted" in at:
        parts.append(Part("queue", "", record.started_at, at["admitted"]))
    if record.prefill and "prefill_sent" in at:
        answered_at = at.get("prefill_answered", end_at)
        parts.append(_leg("prefill", trace.prefill_id, record.prefill, at["prefill_sent"], answered_at, moments, ""))
    start_at, landed_at = at.get("prefill_computed", at.get("prefill_answered")), at.get("landed", at.get("first_byte"))
    if record.prefill and start_at is not None and landed_at is not None and start_at <= landed_at:
        parts.append(Part("handoff", "", start_at, landed_at, attributes={"twolane.transfer_id": record.transfer_id}))
    if record.decode and "decode_sent" in at:
        parts.append(_leg("decode", trace.decode_id, record.decode, at["decode_sent"], end_at, moments, error))
    return parts


def _leg(
    lane: str, span_id: str, address: str, start_at: float, end_at: float, moments: Sequence[Moment], error: str
) -> Part:
    host, port = split_address(address)
    attributes: Attributes = {"server.address": host, "server.port": port, "http.request.method": "POST"}
    told = [moment for moment in moments if moment.by == lane]
    return Part(lane, span_id, start_at, end_at, "client", attributes, told, error)


def _root_attributes(record: RequestRecord, trace: RequestTrace) -> Attributes:
    """OpenTelemetry's names for HTTP servers and generative AI where there are some; ours for the rest."""
    known: dict[str, str | int | bool | None] = {
        "http.request.method": "POST",
        "http.route": record.route,
        "url.path": record.route,
        "url.scheme": "http",
        "http.response.status_code": record.status or None,
        "error.type": None if record.outcome in _FINE else record.outcome,
        "gen_ai.operation.name": "chat" if trace.is_chat else "text_completion",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": trace.model or None,
        "twolane.request_id": record.request_id,
        "twolane.transfer_id": record.transfer_id or None,
        "twolane.outcome": record.outcome,
        "twolane.attempts": record.attempts,
        "twolane.stream": record.stream,
        "twolane.alone_because": record.alone_because or None,
    }
    return {name: value for name, value in known.items() if value is not None}


class _Ids(IdGenerator):
    """Hands out the ids that the legs were told already."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.trace_id = ""
        self.span_id = ""

    def generate_span_id(self) -> int:
        return int(self.span_id, 16) if self.span_id else self._random.generate_span_id()

    def generate_trace_id(self) -> int:
        return int(self.trace_id, 16)


class SpanExporter:
    """Owns the SDK's provider and, behind it, the thread that sends. Used by one thread, `close` by any."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._ids = _Ids()
        own = Resource({SERVICE_NAME: "twolane", SERVICE_VERSION: __version__})
        resource = own.merge(OTELResourceDetector().detect())  # the environment's word wins
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("twolane.proxy", __version__)

    @classmethod
    def over_http(cls, endpoint: str) -> SpanExporter:
        """`endpoint`: the collector's base address, as in OTEL_EXPORTER_OTLP_ENDPOINT. The SDK's own variables count
        for the rest: headers, certificates, compression, batch sizes."""
        # What the SDK has to say comes once a batch and try; `_Reporting` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        url = endpoint.rstrip("/")
        url = url if url.endswith("/v1/traces") else f"{url}/v1/traces"
        exporter = _Reporting(OTLPSpanExporter(url, timeout=EXPORT_TIMEOUT_S), url)
        return cls(sdk.BatchSpanProcessor(exporter))

    def put(self, record: RequestRecord, trace: RequestTrace) -> None:
        to_epoch_ns = time_ns() - monotonic_ns()
        root, *children = parts_of(record, trace)
        self._ids.trace_id = trace.trace_id
        context = api.set_span_in_context(api.NonRecordingSpan(_remote(trace))) if trace.parent is not None else None
        root_span = self._start(root, f"POST {record.route}", context, to_epoch_ns)
        below = api.set_span_in_context(root_span)
        for part in children:
            _end(self._start(part, part.name, below, to_epoch_ns), part, to_epoch_ns)
        _end(root_span, root, to_epoch_ns)

    def _start(self, part: Part, name: str, context: Context | None, to_epoch_ns: int) -> api.Span:
        self._ids.span_id = part.span_id
        attributes: Mapping[str, str | int | bool] = part.attributes
        start_ns = _ns(part.start_at, to_epoch_ns)
        return self._tracer.start_span(name, context or Context(), _KINDS[part.kind], attributes, (), start_ns)

    def close(self) -> None:
        """Sends the rest. Blocks while the collector doesn't answer."""
        self._provider.shutdown()


def _remote(trace: RequestTrace) -> api.SpanContext:
    assert trace.parent is not None
    state = api.TraceState.from_header([trace.parent.state.decode("latin-1")])
    flags = api.TraceFlags(api.TraceFlags.SAMPLED)
    return api.SpanContext(int(trace.trace_id, 16), int(trace.parent.span_id, 16), True, flags, state)


def _end(span: api.Span, part: Part, to_epoch_ns: int) -> None:
    for moment in part.moments:
        span.add_event(moment.name, timestamp=_ns(moment.at_s, to_epoch_ns))
    if part.error:
        span.set_status(Status(StatusCode.ERROR, part.error))
    span.end(_ns(part.end_at, to_epoch_ns))


def _ns(at_s: float, to_epoch_ns: int) -> int:
    return int(at_s * 1e9) + to_epoch_ns


class _Reporting(sdk.SpanExporter):
    """Passes on, and logs where delivery begins to fail and where it works again. Called by the SDK's thread."""

    def __init__(self, inner: sdk.SpanExporter, url: str) -> None:
        self._inner = inner
        self._url = url
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> sdk.SpanExportResult:
        result = self._inner.export(spans)
        fails = result is not sdk.SpanExportResult.SUCCESS
        if fails and not self._fails:
            logger.warning("spans can't be delivered url=%s: they are thrown away until they can", self._url)
        elif self._fails and not fails:
            logger.info("spans are delivered again url=%s", self._url)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
