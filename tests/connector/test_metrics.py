"""What the workers count, through vLLM's own classes, to the page that Prometheus reads."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace

import msgspec
import prometheus_client
import pytest

from tests.connector import agents
from tests.connector.agents import SETTINGS, Decode, Prefill, start_decode
from tests.ports import free_port
from twolane.connector.messages import Identity
from twolane.connector.plan import Drop, StepPlan
from twolane.connector.stats import BUCKETS, BY_CAUSE, HELP, Cause, Counters, Counts, add_up, summary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what vLLM imports
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm

    from twolane.connector.metrics import TwoLanePromMetrics, TwoLaneStats


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> prometheus_client.CollectorRegistry:
    """Metrics made in a test land here and not in the process-wide registry, where they could be made only once."""
    made = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        real = getattr(prometheus_client, kind)
        monkeypatch.setattr(
            KVConnectorProm, f"_{kind.lower()}_cls", lambda *a, real=real, **k: real(*a, registry=made, **k)
        )
    return made


def prom_metrics() -> TwoLanePromMetrics:
    """As KVConnectorProm builds it, for two engines."""
    types = {
        prometheus_client.Gauge: KVConnectorProm._gauge_cls,
        prometheus_client.Counter: KVConnectorProm._counter_cls,
        prometheus_client.Histogram: KVConnectorProm._histogram_cls,
    }
    config = SimpleNamespace(kv_transfer_config=None)
    return TwoLanePromMetrics(config, types, ["model_name", "engine"], {0: ["tiny", "0"], 1: ["tiny", "1"]})


def test_every_counter_is_exported_and_nothing_else() -> None:
    assert list(HELP) == list(vars(Counters()))
    kinds = {name: type(value) for name, value in vars(Counters()).items()}
    assert {name for name, kind in kinds.items() if kind is list} == BUCKETS.keys()
    assert {name for name, kind in kinds.items() if kind is dict} == BY_CAUSE


def test_prometheus_shows_counts_causes_and_times_by_engine(registry: prometheus_client.CollectorRegistry) -> None:
    metrics = prom_metrics()
    counts: Counts = {
        "kv_received_bytes": 4096,
        "kv_receive_failures": {"peer_died": 2},
        "kv_wait_seconds": [0.004, 0.2],
    }
    metrics.observe(counts, engine_idx=1)
    metrics.observe({"kv_received_bytes": 1}, engine_idx=1)
    engine = {"model_name": "tiny", "engine": "1"}
    sample = registry.get_sample_value
    assert sample("twolane_kv_received_bytes_total", engine) == 4097
    assert sample("twolane_kv_receive_failures_total", engine | {"cause": "peer_died"}) == 2
    assert sample("twolane_kv_wait_seconds_count", engine) == 2
    assert sample("twolane_kv_wait_seconds_sum", engine) == pytest.approx(0.204)
    assert sample("twolane_kv_wait_seconds_bucket", engine | {"le": "0.005"}) == 1
    assert sample("twolane_kv_received_bytes_total", engine | {"engine": "0"}) == 0
    for cause in Cause:  # what never happened reads 0, so that an alert can be written before it does
        assert sample("twolane_kv_send_failures_total", engine | {"cause": cause.value}) == 0


def test_steps_and_workers_add_up() -> None:
    total = TwoLaneStats()
    steps: list[Counts] = [
        {"kv_sent_bytes": 5, "kv_wait_seconds": [0.1], "kv_send_failures": {"cancelled": 1}},
        {"kv_sent_bytes": 7, "kv_wait_seconds": [0.3], "kv_send_failures": {"cancelled": 1, "peer_died": 1}},
    ]
    for step in steps:
        total.aggregate(TwoLaneStats(data=step))
    assert total.data == {
        "kv_sent_bytes": 12,
        "kv_wait_seconds": [0.1, 0.3],
        "kv_send_failures": {"cancelled": 2, "peer_died": 1},
    }
    assert steps[0]["kv_wait_seconds"] == [0.1], "a step's own counts stay as they were"
    assert (
        total.reduce()
        == summary(total.data)
        == {
            "kv_sent_bytes": 12,
            "kv_wait_mean_ms": 200.0,
            "kv_wait_max_ms": 300.0,
            "kv_send_failures_cancelled": 2,
            "kv_send_failures_peer_died": 1,
        }
    )
    total.reset()
    assert total.is_empty()


def test_counts_survive_the_way_to_the_api_server() -> None:
    counters = Counters(kv_sent_bytes=1, kv_wait_seconds=[0.5])
    counters.send_failed(Cause.LEASE_EXPIRED)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(counters.nonzero()))
    assert carried == {"kv_sent_bytes": 1, "kv_wait_seconds": [0.5], "kv_send_failures": {"lease_expired": 1}}


def test_both_sides_time_a_transfer(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    prefill.compute([3, 4], num_tokens=5)
    agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
    time.sleep(0.4)  # P computes
    prefill.compute([3, 4, 5], num_tokens=11)
    assert decode.wait_finished() == set()
    sent = one_observation(prefill.agent.take_counts(), "kv_computed_to_sent_seconds")
    counts = decode.agent.take_counts()
    landed = one_observation(counts, "kv_computed_to_landed_seconds")
    assert 0 < sent < 0.4, "counted from the last layer, not from the first"
    assert 0 < landed < 0.4
    assert one_observation(counts, "kv_first_block_seconds") < 0.4 < one_observation(counts, "kv_wait_seconds")
    assert not decode.agent.take_counts(), "what was taken isn't counted again"


def one_observation(counts: Counts, name: str) -> float:
    found = counts[name]
    assert isinstance(found, list)
    (seconds,) = found
    return seconds


def test_another_hosts_clock_is_not_compared(prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill.agent._side._peers, "_me", Identity("epoch", 1, "another host"))
    prefill.offer()
    prefill.compute([3], 5)
    decode.receive(prefill.address, [20], num_tokens=4)
    decode.wait_finished()
    counts = decode.agent.take_counts()
    assert "kv_computed_to_landed_seconds" not in counts


def test_causes_on_d(prefill: Prefill, decode: Decode) -> None:
    def cause() -> object:
        return decode.agent.take_counts().get("kv_receive_failures")

    decode.receive("not a host:4000", [20], num_tokens=4)
    decode.wait_finished()
    assert cause() == {"unreachable": 1}
    decode.receive(f"127.0.0.1:{free_port()}", [20], num_tokens=4)
    decode.wait_finished()
    assert cause() == {"peer_silent": 1}
    prefill.offer("t1", "p1")
    decode.receive(prefill.address, [20], num_tokens=4, transfer_id="t1")
    prefill.finish("p1", ok=False)
    decode.wait_finished()
    assert cause() == {"aborted": 1}
    decode.receive(prefill.address, [20], num_tokens=4)
    decode.agent.begin_step(StepPlan(drop=[Drop("t", prefill.address, "the request ended")]))
    decode.wait_finished()
    assert cause() == {"cancelled": 1}


def test_a_refused_handshake_is_a_mismatch(prefill: Prefill) -> None:
    decode = start_decode(SETTINGS, model="other")
    try:
        decode.receive(prefill.address, [20], num_tokens=4)
        decode.wait_finished()
        counts = decode.agent.take_counts()
        assert counts == {"kv_refused_peers": 1, "kv_receive_failures": {"mismatch": 1}, "kv_recomputed_tokens": 4}
    finally:
        decode.agent.stop()


def test_causes_on_p(prefill: Prefill, decode: Decode) -> None:
    def cause() -> object:
        return prefill.agent.take_counts().get("kv_send_failures")

    prefill.offer("t1", "p1", digest=b"other")
    decode.receive(prefill.address, [20], num_tokens=4, transfer_id="t1")
    decode.wait_finished()
    assert cause() == {"mismatch": 1}
    prefill.offer("t2", "p2")
    prefill.finish("p2", ok=False)
    assert cause() == {"ended_early": 1}
    prefill.offer("t3", "p3")
    prefill.offer("t3", "p4")
    assert cause() == {"duplicate": 1}
    decode.agent.begin_step(StepPlan(drop=[Drop("t3", prefill.address, "the request ended")]))
    agents.wait_for(lambda: prefill.agent.take_finished({"p3"}) == {"p3"})
    assert cause() == {"cancelled": 1}
    prefill.offer("t5", "p5")
    prefill.finish("p5")
    prefill.wait_freed("p5")
    assert cause() == {"lease_expired": 1}


def test_adding_up_leaves_what_is_added_alone() -> None:
    one: Counts = {"kv_send_failures": {"cancelled": 1}}
    total: Counts = {}
    add_up(total, one)
    add_up(total, one)
    assert (total, one) == ({"kv_send_failures": {"cancelled": 2}}, {"kv_send_failures": {"cancelled": 1}})
