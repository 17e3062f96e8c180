"""What a user sees through the proxy: curl's request, the openai package, errors of vLLM itself."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from pathlib import Path

import httpx
import msgspec
import openai
import psutil
import pytest

from tests.engine.conftest import make_prompts
from tests.engine.stack import BLOCK_SIZE, Instance, Stack, complete, completion_body, wait_for
from tests.ports import free_ports
from twolane.launch.probes import get_json
from twolane.launch.process import Child

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def test_curl_is_told_the_capital_of_france(stack: Stack) -> None:
    body = {"model": stack.model, "prompt": "The capital of France is", "max_tokens": 20, "temperature": 0}
    command = ["curl", "-sS", "-m", "60", f"{stack.url}/v1/completions", "-H", "Content-Type: application/json"]
    answer = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, check=True, timeout=90).stdout
    assert "Paris" in json.loads(answer)["choices"][0]["text"]


def test_chat(client: openai.OpenAI, stack: Stack, decode: Instance) -> None:
    computed = decode.tokens_by_source()["local_compute"]
    answer = client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=30,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 1
    assert decode.tokens_by_source()["local_compute"] - computed == 1


def test_a_streamed_chat_says_the_same_and_counts_its_usage(client: openai.OpenAI, stack: Stack) -> None:
    request = {
        "model": stack.model,
        "messages": [{"role": "user", "content": "Name three colours of the rainbow."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_streamed_completion_says_the_same(client: openai.OpenAI, stack: Stack) -> None:
    request = {"model": stack.model, "prompt": "One, two, three, four,", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**request)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**request, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 5


def test_models_names_the_model(client: openai.OpenAI, stack: Stack) -> None:
    assert stack.model in [model.id for model in client.models.list()]


def test_a_wrong_model_name_gets_vllms_own_404_at_once(stack: Stack, single_url: str) -> None:
    body = {"model": "nobody-serves-this", "prompt": "Hello", "max_tokens": 4}
    through_proxy = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=30)
    direct = httpx.post(f"{single_url}/v1/completions", json=body, timeout=30)
    assert (through_proxy.status_code, through_proxy.json()) == (404, direct.json())


def test_a_prompt_beyond_the_models_length_gets_vllms_own_400(stack: Stack, single_url: str) -> None:
    body = {"model": stack.model, "prompt": [100] * 9000, "max_tokens": 4}
    through_proxy = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=30)
    direct = httpx.post(f"{single_url}/v1/completions", json=body, timeout=30)
    assert (through_proxy.status_code, through_proxy.json()) == (400, direct.json())


def test_health_and_stats_know_both_lanes(stack: Stack) -> None:
    health = httpx.get(f"{stack.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    instances = {instance["role"]: instance for instance in stack.stats()["instances"]}
    assert {role: instance["state"] for role, instance in instances.items()} == {"P": "ready", "D": "ready"}


def cpu_seconds(instance: Instance) -> float:
    times = [psutil.Process(member.pid).cpu_times() for member in instance.child.look()]
    return float(sum(t.user + t.system for t in times))


def test_stats_show_what_the_engines_hold(stack: Stack, prefill: Instance, decode: Instance) -> None:
    """While a request runs, and that an idle engine's last word is that all of it came back."""

    def load(role: str) -> dict[str, int]:
        (found,) = [instance["load"] for instance in stack.stats()["instances"] if instance["role"] == role]
        assert isinstance(found, dict)
        return found

    def is_idle(role: str) -> bool:
        now = load(role)
        return now["num_running"] == now["num_waiting"] == 0 and now["free_blocks"] == now["num_blocks"]

    (prompt,) = make_prompts(seed=11, lengths=[2000])
    body = completion_body(stack, prompt, 200, stream=True)
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as answer:
        chunks = answer.iter_lines()
        next(chunks)
        wait_for("D's word of it", lambda: load("D")["num_running"] == 1, 3)
        assert load("D")["num_blocks"] - load("D")["free_blocks"] >= 2000 // BLOCK_SIZE
        assert load("D")["block_size"] == BLOCK_SIZE
        for _ in chunks:
            pass
    wait_for("both idle", lambda: is_idle("P") and is_idle("D"), 5)
    assert all(instance["foreign"] == 0 for instance in stack.stats()["instances"])
    before_s = [cpu_seconds(instance) for instance in (prefill, decode)]
    time.sleep(2)
    after_s = [cpu_seconds(instance) for instance in (prefill, decode)]
    assert max(after - before for after, before in zip(after_s, before_s, strict=True)) < 0.5, "it doesn't step on"


def test_a_proxy_made_for_p2p_nccl_moves_the_kv_too(
    stack: Stack, prefill: Instance, decode: Instance, single_url: str
) -> None:
    """Its whole protocol: P first, then D, and a request id that names both. Nothing of TwoLane's proxy takes part."""
    (prompt,) = make_prompts(seed=8, lengths=[300])
    body = completion_body(stack, prompt, 12)
    addresses = f"___prefill_addr_127.0.0.1:{prefill.spec.kv_port}___decode_addr_127.0.0.1:{decode.spec.kv_port}"
    headers = {"X-Request-Id": f"{addresses}_{uuid.uuid4().hex}"}
    computed = decode.tokens_by_source()["local_compute"]
    first = httpx.post(
        f"http://{prefill.spec.address}/v1/completions", json=body | {"max_tokens": 1}, headers=headers, timeout=60
    )
    assert first.status_code == 200
    second = httpx.post(f"http://{decode.spec.address}/v1/completions", json=body, headers=headers, timeout=60)
    assert second.json()["choices"][0]["token_ids"] == complete(single_url, body)
    assert decode.tokens_by_source()["local_compute"] - computed == 1


def test_a_proxy_made_for_nixl_moves_the_kv_too(
    stack: Stack, prefill: Instance, decode: Instance, single_url: str
) -> None:
    """P is asked for parameters, which go to D as they are."""
    (prompt,) = make_prompts(seed=12, lengths=[300])
    body = completion_body(stack, prompt, 12)
    asked = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
    computed = decode.tokens_by_source()["local_compute"]
    url = f"http://{prefill.spec.address}/v1/completions"
    first = httpx.post(url, json=body | {"max_tokens": 1, "kv_transfer_params": asked}, timeout=60).json()
    second = httpx.post(
        f"http://{decode.spec.address}/v1/completions",
        json=body | {"kv_transfer_params": first["kv_transfer_params"]},
        timeout=60,
    )
    assert second.json()["choices"][0]["token_ids"] == complete(single_url, body)
    assert decode.tokens_by_source()["local_compute"] - computed == 1


@pytest.mark.parametrize("kind", ["twolane", "p2pnccl"])
def test_a_second_proxy_with_static_lists_serves_the_same_instances(
    stack: Stack, prefill: Instance, decode: Instance, single_url: str, kind: str
) -> None:
    """In both ways of naming the KV that our connector understands."""
    http_port, discovery_port = free_ports(2)
    spec = stack.spec("proxy")
    lists: list[str] = ["--kv", kind]
    for flag, instance in (("--prefill", prefill), ("--decode", decode)):
        lists += [flag, f"http://{instance.spec.address}=127.0.0.1:{instance.spec.kv_port}"]
    ports = ["--http-port", str(http_port), "--discovery-port", str(discovery_port)]
    log = str(Path(spec.log).with_name(f"proxy-{kind}.log"))
    argv = (*spec.argv[: spec.argv.index("--host")], *ports, *lists)
    proxy = Child(msgspec.structs.replace(spec, argv=argv, http_port=http_port, log=log), {})
    try:
        url = f"http://127.0.0.1:{http_port}"
        wait_for("both lanes", lambda: (get_json(f"127.0.0.1:{http_port}", "/health") or {}).get("status") == "ok", 10)
        (prompt,) = make_prompts(seed=9 if kind == "twolane" else 10, lengths=[300])
        body = completion_body(stack, prompt, 12)
        computed = decode.tokens_by_source()["local_compute"]
        assert complete(url, body) == complete(single_url, body)
        assert decode.tokens_by_source()["local_compute"] - computed == 1
    finally:
        proxy.stop(10.0)
