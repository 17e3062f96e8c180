"""Pure: what a vLLM instance's last log lines say about why it ended -> one sentence with cause and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# "Free memory on device cuda:0 (20.1/79.1 GiB) on startup is less than desired GPU memory utilization (0.92, 72.8 GiB)"
FREE_MEMORY = re.compile(r"Free memory on device .*?\(([\d.]+)/([\d.]+) GiB\) on startup is less")
FITTING_LENGTH = re.compile(r"estimated maximum model length is (\d+)")
UTILIZATION = re.compile(r"'gpu_memory_utilization': ([\d.]+)")
UNKNOWN_ARGUMENT = re.compile(r"error: unrecognized arguments: (.+)")
CONNECTOR_REFUSED = re.compile(r"twolane\.errors\.ConfigError: (.+)")
WRONG_ARGUMENT = re.compile(r"error: (argument .+)")
DEFAULT_UTILIZATION = 0.92
MARGIN = 0.02  # of a GPU's memory: what changes between looking and taking
HOW = "in TWOLANE_VLLM_ARGS, or TWOLANE_PREFILL_ARGS or TWOLANE_DECODE_ARGS for one role"

Rule = Callable[[str], str]  # the whole text -> a sentence, or nothing


def diagnose(lines: Iterable[str]) -> str:
    """The first rule that knows the trouble; empty if none does."""
    text = "\n".join(lines)
    return next((sentence for rule in RULES if (sentence := rule(text))), "")


def _busy_gpu(text: str) -> str:
    found = FREE_MEMORY.search(text)
    if not found:
        return ""
    free_gib, total_gib = float(found[1]), float(found[2])
    fits = max(0.0, int((free_gib / total_gib - MARGIN) * 100) / 100)
    return (
        f"only {free_gib:g} of the GPU's {total_gib:g} GiB are free: end what uses it (`twolane doctor` names it), "
        f"or set --gpu-memory-utilization {fits:.2f} {HOW}"
    )


def _out_of_memory(text: str) -> str:
    if "CUDA out of memory" not in text and "OutOfMemoryError" not in text:
        return ""
    used = float(found[1]) if (found := UTILIZATION.search(text)) else DEFAULT_UTILIZATION
    return (
        f"CUDA out of memory: lower --gpu-memory-utilization from {used:g} to {max(0.1, used - 0.1):.2f} {HOW}; if the "
        "weights alone don't fit, give the instance more GPUs, as in PREFILL_GPU=0+1"
    )


def _no_room_for_kv(text: str) -> str:
    if found := FITTING_LENGTH.search(text):
        return f"the KV cache has no room for the longest request: set TWOLANE_MAX_MODEL_LEN={found[1]} or lower"
    if "No available memory for the cache blocks" in text:
        return f"no memory is left for the KV cache: raise --gpu-memory-utilization {HOW}, or use more GPUs an instance"
    return ""


def _wrong_argument(text: str) -> str:
    if found := UNKNOWN_ARGUMENT.search(text):
        return f"vLLM doesn't know {found[1].strip()}: look at what you pass {HOW}"
    if found := WRONG_ARGUMENT.search(text):
        return f"vLLM refuses {found[1].strip()}: look at what you pass {HOW}"
    return ""


def _port(text: str) -> str:
    if "ddress already in use" not in text:
        return ""
    return "a port is in use: `twolane doctor` names its holder and the variable that moves it"


def _unknown_model(text: str) -> str:
    if "does not recognize this architecture" in text or "are not supported for now" in text:
        return "this vLLM doesn't know the model's architecture: use a newer vLLM, or another MODEL"
    return ""


def _connector(text: str) -> str:
    if found := CONNECTOR_REFUSED.search(text):
        return found[1].strip()
    if "KV cache specs to one unified type" in text:
        return (
            "this model's layers need KV caches of several kinds (state-space beside attention, for example), of "
            "which the lanes move only attention's: serve it without lanes, with vLLM alone, or choose another MODEL"
        )
    return ""


def _nixl(text: str) -> str:
    if "NIXL is not available" not in text:
        return ""
    return "vLLM's NixlConnector needs the package nixl: install it beside vLLM, or use --kv twolane"


def _host_memory(text: str) -> str:
    if "Cannot allocate memory" in text or "DefaultCPUAllocator: can't allocate memory" in text:
        return "the machine has too little memory: run fewer instances, or a smaller model"
    return ""


RULES: tuple[Rule, ...] = (
    _connector,
    _busy_gpu,
    _out_of_memory,
    _no_room_for_kv,
    _wrong_argument,
    _port,
    _unknown_model,
    _nixl,
    _host_memory,
)


def not_registered(announced: str, discovery: str, kv: str, known: list[str]) -> str:
    """Why an instance that serves gets no requests: what it announced, and what the proxy knows."""
    here = ", ".join(known) or "no instance at all"
    return (
        f"it serves at {announced} and registers at {discovery} (--kv {kv}), but the proxy, which listens there, has "
        f"{here}: look for `registration refused` in the proxy's log"
    )
