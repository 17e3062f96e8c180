"""Real vLLM instances and a real proxy, started by the launcher's own plan on ports of their own."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console

from tests.ports import free_ports
from twolane.launch.configuration import load
from twolane.launch.engine import without_lane
from twolane.launch.hardware import inspect_machine
from twolane.launch.model import resolve_model
from twolane.launch.plan import Plan, ServiceSpec, make_plan
from twolane.launch.probes import get_json, is_healthy, is_registered, request
from twolane.launch.process import Child, kill_members, last_lines
from twolane.launch.progress import Progress

START_TIMEOUT_S = 240.0
CHUNK_TOKENS = 512  # small, so that a long prompt takes several chunks
BLOCK_SIZE = 128  # vLLM's for the CPU

Lane = Literal["prefill", "decode"]


def make_test_plan(log_dir: Path, *more_args: str, **changes: Any) -> Plan:
    """1P1D of the default model on free ports, with small prefill chunks. `more_args` go to both instances."""
    proxy, discovery, prefill, decode, prefill_kv, decode_kv = free_ports(6)
    env_settings = load({}, {}, Path("no such file")).settings
    settings = replace(
        env_settings,
        http_proxy_port=proxy,
        proxy_port=discovery,
        prefill_http_port=prefill,
        decode_http_port=decode,
        prefill_kv_port=prefill_kv,
        decode_kv_port=decode_kv,
        vllm_args=("--max-num-batched-tokens", str(CHUNK_TOKENS), *more_args),
        log_dir=log_dir,
        **changes,
    )
    machine = inspect_machine()
    model = resolve_model(settings, machine.engine, Progress(Console(stderr=True)))
    return make_plan(settings, machine, model)


def on_port(spec: ServiceSpec, name: str, *, http_port: int, kv_port: int) -> ServiceSpec:
    """The same instance once more, beside the first."""
    old, new = f"{spec.http_port}", f"{http_port}"
    argv = [arg.replace(old, new).replace(f'"kv_port": {spec.kv_port}', f'"kv_port": {kv_port}') for arg in spec.argv]
    log = str(Path(spec.log).with_name(f"{name}.log"))
    return msgspec.structs.replace(spec, name=name, argv=tuple(argv), http_port=http_port, kv_port=kv_port, log=log)


def with_extra(spec: ServiceSpec, **extra: object) -> ServiceSpec:
    """The same instance with more keys in kv_connector_extra_config."""
    at = spec.argv.index("--kv-transfer-config") + 1
    config = json.loads(spec.argv[at])
    config["kv_connector_extra_config"].update(extra)
    return msgspec.structs.replace(spec, argv=(*spec.argv[:at], json.dumps(config), *spec.argv[at + 1 :]))


def without_connector(spec: ServiceSpec) -> ServiceSpec:
    """A single instance, as vLLM is without us."""
    return msgspec.structs.replace(spec, argv=without_lane(spec.argv))


@dataclass
class Instance:
    """A running vLLM instance. `metric` reads the engine's own counters."""

    spec: ServiceSpec
    child: Child

    def metrics(self) -> dict[str, float]:
        return metrics_of(self.spec)

    def tokens_by_source(self) -> dict[str, int]:
        return tokens_by_source(self.metrics())

    def used_blocks(self) -> float:
        """Share of KV blocks that are not free."""
        return self.metrics()["vllm:kv_cache_usage_perc"]

    def running(self) -> int:
        return int(self.metrics()["vllm:num_requests_running"])

    def kill(self) -> None:
        """SIGKILL for every process of the instance; Python's resource trackers last, so that they clean up."""
        kill_members(list(self.child.look()))


def metrics_of(spec: ServiceSpec) -> dict[str, float]:
    """Every sample of /metrics, by name and the labels that tell several of one name apart here."""
    status, body = request(spec.address, "GET", "/metrics")
    assert status == 200
    samples: dict[str, float] = {}
    for line in body.decode().splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.rpartition(" ")
            samples[_short(key)] = float(value)
    return samples


def tokens_by_source(samples: dict[str, float]) -> dict[str, int]:
    """Where the prompts' tokens came from."""
    sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
    return {
        source: int(samples.get(f'vllm:prompt_tokens_by_source_total{{source="{source}"}}', 0)) for source in sources
    }


def _short(key: str) -> str:
    name, _, labels = key.partition("{")
    kept = [part for part in labels.rstrip("}").split(",") if part.partition("=")[0] in ("source", "cause")]
    return f"{name}{{{','.join(kept)}}}" if kept else name


@dataclass
class Stack:
    """Owns what it started; `stop` ends it all."""

    plan: Plan
    instances: dict[str, Instance] = field(default_factory=dict)
    proxy: Child | None = None
    folders: list[Path] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.plan.proxy_url

    @property
    def model(self) -> str:
        return self.plan.model.names[0]

    def start(self, *specs: ServiceSpec) -> None:
        """Starts the proxy (once) and instances side by side; returns when all are ready."""
        self.launch(*specs)
        for spec in specs:
            self.wait_ready(spec)

    def launch(self, *specs: ServiceSpec) -> None:
        if self.proxy is None:
            self.proxy = Child(self.spec("proxy"), {})
        for spec in specs:
            sockets = Path(tempfile.mkdtemp(prefix="twolane-test-"))  # vLLM leaves its sockets lying about
            self.folders.append(sockets)
            env = {"TMPDIR": str(sockets), "VLLM_RPC_BASE_PATH": str(sockets)}
            self.instances[spec.name] = Instance(spec, Child(spec, env))

    def wait_ready(self, spec: ServiceSpec) -> None:
        child = self.instances[spec.name].child
        registers = "--kv-transfer-config" in spec.argv
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (is_healthy(spec) and (not registers or is_registered(self.plan.proxy_address, spec))):
            assert child.exit_code() is None, f"{spec.name} died:\n" + "\n".join(last_lines(Path(spec.log), 40))
            assert time.monotonic() < deadline_s, f"{spec.name} is not ready:\n" + "\n".join(
                last_lines(Path(spec.log), 40)
            )
            time.sleep(0.3)

    def spec(self, role: str) -> ServiceSpec:
        return next(spec for spec in self.plan.services if spec.role == role)

    def stats(self) -> dict[str, Any]:
        stats = get_json(self.plan.proxy_address, "/stats")
        assert isinstance(stats, dict)
        return stats

    def stop(self) -> None:
        for instance in self.instances.values():
            instance.child.stop(10.0)
        if self.proxy is not None:
            self.proxy.stop(10.0)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def completion_body(stack: Stack, prompt: object, max_tokens: int, **more: object) -> dict[str, Any]:
    return {
        "model": stack.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def complete(url: str, body: dict[str, Any], timeout_s: float = 180.0) -> list[int]:
    """Token ids of one greedy completion."""
    token_ids = complete_choice(url, body, timeout_s)["token_ids"]
    assert len(token_ids) == body["max_tokens"]
    return [int(token) for token in token_ids]


def complete_choice(url: str, body: dict[str, Any], timeout_s: float = 180.0) -> dict[str, Any]:
    """The first choice of one completion, as vLLM gives it."""
    status, answer = request(url.removeprefix("http://"), "POST", "/v1/completions", body, timeout_s)
    assert status == 200, answer.decode()
    choice = json.loads(answer)["choices"][0]
    assert isinstance(choice, dict)
    return choice


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until `condition` held; fails after `timeout_s`."""
    started_s = time.monotonic()
    while True:
        try:
            if condition():
                return time.monotonic() - started_s
        except (OSError, http.client.HTTPException):
            pass
        assert time.monotonic() - started_s < timeout_s, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.02)


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in after}


def all_free(instances: Iterable[Instance]) -> bool:
    return all(instance.used_blocks() == 0.0 and instance.running() == 0 for instance in instances)
