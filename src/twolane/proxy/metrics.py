"""/metrics: what the proxy has counted, as Prometheus reads it.

Everything is read when somebody asks: a request in flight pays nothing for it. Labels have values from small sets only:
routes, outcomes, causes, instances; never anything of a request.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from time import monotonic, time

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from twolane import __version__
from twolane.errors import RETRY_CAUSES
from twolane.protocol import LANES, Role
from twolane.proxy.admission import Admission
from twolane.proxy.engine_numbers import EngineNumbers
from twolane.proxy.engines import Engines
from twolane.proxy.histogram import BOUNDS_S, Histogram
from twolane.proxy.pool import Instance, Pool, State
from twolane.proxy.stats import OUTCOMES, Stats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4.encode()
# Of everything that is told of an instance. Not `instance`: Prometheus uses that for what it scrapes. An address alone
# tells two instances of a lane apart for sure, a name says what people call them.
_OF_INSTANCE = ("lane", "name", "address")


def make_registry(*collectors: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


async def exposition(registry: CollectorRegistry) -> bytes:
    """The page, one metric a turn of the event loop, so that tokens needn't wait for a long one."""
    pieces = []
    for family in registry.collect():
        pieces.append(generate_latest(_Only(family)))
        await asyncio.sleep(0)
    return b"".join(pieces)


class _Only(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


class RequestCollector(Collector):
    """What Stats and Admission know."""

    def __init__(self, stats: Stats, admission: Admission, routes: Iterable[str]) -> None:
        """`routes` are shown from the start, with zeros: a rate needs a value before the first."""
        self._stats = stats
        self._admission = admission
        self._zeros = {(route, outcome): 0 for route in sorted(routes) for outcome in OUTCOMES}
        self._started_at = time() - (monotonic() - stats.started_at)

    def collect(self) -> Iterator[Metric]:
        stats, admission = self._stats, self._admission
        yield _gauge("build_info", "1; the version is in the label.", ("version",), [((__version__,), 1)])
        help_text = "When the proxy started, in seconds since 1970."
        yield _gauge("start_time_seconds", help_text, (), [((), self._started_at)])
        requests = self._zeros | stats.requests
        help_text = "Requests that have ended, by path and by how."
        yield _counter("requests", help_text, ("route", "outcome"), requests.items())
        retries = {(role, cause): 0 for role in LANES for cause in RETRY_CAUSES} | stats.retries
        by_lane = (((LANES[role], cause), count) for (role, cause), count in retries.items())
        help_text = "Attempts after a request's first, by the lane that failed before, and how."
        yield _counter("retries", help_text, ("lane", "cause"), by_lane)
        help_text = "Requests whose prompt a decode instance computed itself, by reason."
        yield _counter("decode_alone", help_text, ("reason",), (((why,), n) for why, n in stats.alone.items()))
        help_text = "Registrations that were refused: unreadable, or from where none may come."
        yield _counter("registrations_refused", help_text, (), [((), stats.num_registrations_refused)])
        help_text = "Connections of instances that are over: refused for want of the key, or ended later."
        over = (((how,), count) for how, count in stats.registrants._asdict().items())
        yield _counter("registration_connections", help_text, ("end",), over)
        yield _gauge("in_flight_requests", "Generating requests served now.", (), [((), admission.in_flight)])
        yield _gauge("queued_requests", "Requests that wait for their turn.", (), [((), admission.queued)])
        yield _histogram(
            "time_to_first_token_seconds", "Request to first byte of a stream that ended well.", stats.ttft
        )
        help_text = "Between arrivals of a stream's bytes, a token or several that came at once."
        yield _histogram("inter_token_latency_seconds", help_text, stats.gaps)
        help_text = "From the end of P's answer to D's first byte; 0 where D was first. Streams that ended well."
        yield _histogram("handoff_seconds", help_text, stats.handoff)
        yield _histogram(
            "request_duration_seconds", "Request to last byte, of those that ended well.", stats.end_to_end
        )


class InstanceCollector(Collector):
    """What the pool knows of each instance, and what their engines have told."""

    def __init__(self, pool: Pool, engines: Engines) -> None:
        self._pool = pool
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        count = Counter((i.role, i.state) for i in self._pool)
        by_state = (((LANES[role], state.value), count[role, state]) for role in LANES for state in State)
        # Those that are gone are in no other metric: only here can an alert see that there are none.
        yield _gauge("instances", "Instances by lane and state.", ("lane", "state"), by_state)
        states = (((*_labels(i), state.value), state is i.state) for i in self._pool for state in State)
        help_text = "1 for the state that the instance is in, 0 for the others."
        yield _gauge("instance_state", help_text, (*_OF_INSTANCE, "state"), states)
        in_flight = ((_labels(i), i.in_flight) for i in self._pool)
        yield _gauge("instance_in_flight_requests", "Requests in flight there.", _OF_INSTANCE, in_flight)
        in_flight = ((_labels(i), i.in_flight_tokens) for i in self._pool)
        help_text = "Prompt tokens in flight there, estimated."
        yield _gauge("instance_in_flight_prompt_tokens", help_text, _OF_INSTANCE, in_flight)
        sent = ((_labels(i), i.num_requests) for i in self._pool)
        yield _counter("instance_requests", "Requests sent there, retries included.", _OF_INSTANCE, sent)
        failed = ((_labels(i), i.num_failures) for i in self._pool)
        help_text = "Connections there that were refused or broke."
        yield _counter("instance_connection_failures", help_text, _OF_INSTANCE, failed)
        yield from self._of_engines()

    def _of_engines(self) -> Iterator[Metric]:
        ages = ((_labels(instance), monotonic() - numbers.at) for instance, numbers in self._told())
        help_text = "How old the numbers of this instance's engine are; they stay when it doesn't answer."
        yield _gauge("engine_numbers_age_seconds", help_text, _OF_INSTANCE, ages)
        for field, name, help_text in _ENGINE_GAUGES:
            yield _gauge(f"engine_{name}", help_text, _OF_INSTANCE, self._values(field))
        for field, help_text in _ENGINE_COUNTERS.items():
            yield _counter(f"engine_{field}", help_text, _OF_INSTANCE, self._values(field))
        for field, label, help_text in _ENGINE_COUNTERS_BY_LABEL:
            yield _counter(f"engine_{field}", help_text, (*_OF_INSTANCE, label), self._values_by_label(field))

    def _told(self, field: str = "") -> list[tuple[Instance, EngineNumbers]]:
        role = _ROLE_OF.get(field.removeprefix("kv_").partition("_")[0])
        asked = (instance for instance in self._pool if role in (None, instance.role))
        latest = ((instance, self._engines.latest(instance)) for instance in asked)
        return [(instance, numbers) for instance, numbers in latest if numbers is not None]

    def _values(self, field: str) -> Iterator[tuple[tuple[str, ...], float]]:
        for instance, numbers in self._told(field):
            value = getattr(numbers, field)
            if value is not None:
                yield _labels(instance), value

    def _values_by_label(self, field: str) -> Iterator[tuple[tuple[str, ...], float]]:
        for instance, numbers in self._told(field):
            for label, value in (getattr(numbers, field) or {}).items():
                yield (*_labels(instance), label), value


# Field of EngineNumbers, name, help. An instance that doesn't tell isn't there.
_ENGINE_GAUGES = (
    ("running", "running_requests", "Requests in the engine's batches, in its own word."),
    ("waiting", "waiting_requests", "Requests that wait in the engine, on D also for KV, in its own word."),
    ("kv_usage", "kv_usage_ratio", "Share of the engine's KV blocks in use."),
    ("kv_bytes_per_s", "kv_bytes_per_second", "KV sent and received, between the last two looks at the engine."),
)
_ENGINE_COUNTERS = {
    "prompt_tokens": "Tokens of all prompts the engine took up, wherever their KV came from.",
    "generated_tokens": "Tokens the engine generated.",
    "preemptions": "Requests the engine put back for want of KV blocks.",
    "kv_sent_transfers": "Transfers of which P sent every byte.",
    "kv_sent_tokens": "Tokens whose KV P sent.",
    "kv_sent_bytes": "Bytes of KV that P sent.",
    "kv_leases_expired": "Transfers for whose blocks D never came.",
    "kv_received_transfers": "Transfers of which every byte landed in D's blocks.",
    "kv_received_tokens": "Tokens whose KV landed in D's blocks.",
    "kv_received_bytes": "Bytes of KV that landed in D's blocks.",
    "kv_recomputed_tokens": "Prompt tokens that D computed because a transfer failed.",
    "kv_refused_peers": "Connections on which no KV can move, since the two KV caches don't match.",
}
_ENGINE_COUNTERS_BY_LABEL = (
    ("prompt_tokens_by_source", "source", "Prompt tokens by where their KV came from; local_compute: computed there."),
    ("kv_send_failures", "cause", "Transfers that P didn't send to the end."),
    ("kv_receive_failures", "cause", "Transfers that D didn't receive to the end."),
)
# A connector exports zeros for what only the other lane does.
_ROLE_OF: dict[str, Role] = {
    "sent": "P",
    "send": "P",
    "leases": "P",
    "received": "D",
    "receive": "D",
    "recomputed": "D",
}


def _labels(instance: Instance) -> tuple[str, ...]:
    return LANES[instance.role], instance.name, instance.address


# A sample's label values, and its value.
_Values = Iterable[tuple[tuple[str, ...], float]]


def _gauge(name: str, help_text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    gauge = GaugeMetricFamily(f"twolane_proxy_{name}", help_text, labels=labels)
    for label_values, value in values:
        gauge.add_metric(label_values, value)
    return gauge


def _counter(name: str, help_text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    counter = CounterMetricFamily(f"twolane_proxy_{name}", help_text, labels=labels)
    for label_values, value in values:
        counter.add_metric(label_values, value)
    return counter


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    counted = zip((*map(str, BOUNDS_S), "+Inf"), (*histogram.up_to_bounds(), histogram.count), strict=True)
    return HistogramMetricFamily(f"twolane_proxy_{name}", help_text, buckets=list(counted), sum_value=histogram.sum_s)
