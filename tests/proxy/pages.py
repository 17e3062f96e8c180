"""A proxy's /metrics, read as Prometheus would."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from tests.proxy.scripted import Call, Cluster

# What a real decode instance (vLLM 0.32, TwoLaneConnector) answers, cut down to the lines around those that count.
ENGINE_PAGE = b"""# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 13451.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 0.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7953878976312537e+09
vllm:prompt_tokens_total{engine="0",model_name="m"} 1800.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7953878976312625e+09
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 3.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 1797.0
vllm:generation_tokens_total{engine="0",model_name="m"} 60.0
twolane_kv_sent_transfers_total{engine="0",model_name="m"} 0.0
twolane_kv_sent_tokens_total{engine="0",model_name="m"} 0.0
twolane_kv_sent_bytes_total{engine="0",model_name="m"} 0.0
twolane_kv_send_failures_total{cause="peer_died",engine="0",model_name="m"} 0.0
twolane_kv_leases_expired_total{engine="0",model_name="m"} 0.0
twolane_kv_received_transfers_total{engine="0",model_name="m"} 3.0
twolane_kv_received_transfers_created{engine="0",model_name="m"} 1.7953878976307607e+09
twolane_kv_received_tokens_total{engine="0",model_name="m"} 1797.0
twolane_kv_received_bytes_total{engine="0",model_name="m"} 8.84736e+07
twolane_kv_receive_failures_total{cause="peer_died",engine="0",model_name="m"} 4.0
twolane_kv_receive_failures_total{cause="timed_out",engine="0",model_name="m"} 1.0
twolane_kv_recomputed_tokens_total{engine="0",model_name="m"} 600.0
twolane_kv_refused_peers_total{engine="0",model_name="m"} 0.0
"""


async def tell_engine_page(call: Call) -> None:
    await call.reply(200, ENGINE_PAGE)


class Scrape:
    """One answer to /metrics, parsed by prometheus_client."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def values(self, name: str, /, **labels: str) -> list[float]:
        wanted = labels.items()
        return [s.value for s in self.samples if s.name == f"twolane_proxy_{name}" and wanted <= s.labels.items()]

    def value(self, name: str, /, **labels: str) -> float:
        (value,) = self.values(name, **labels)
        return value


async def scrape(c: Cluster) -> Scrape:
    answered = await c.http.get("/metrics")
    assert answered.status_code == 200
    assert answered.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(answered.text)
