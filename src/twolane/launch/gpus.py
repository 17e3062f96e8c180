"""Pure: which instance gets which GPUs."""

from __future__ import annotations

from twolane.config import GpuGroups, Settings
from twolane.errors import ConfigError

SHARED_PERCENT = 90  # of a GPU's memory, by all who share it; vLLM takes 92 alone, and each has a CUDA context besides


def assign_gpus(settings: Settings, engine: str, present: tuple[int, ...]) -> tuple[GpuGroups, GpuGroups]:
    """The GPUs of each P and each D (empty groups without GPUs): what the settings name, then what is left, in order.

    Where only one role is named, the other's instances get as many GPUs each.
    """
    named = (settings.prefill_gpu, settings.decode_gpu)
    if engine == "cpu":
        if any(named):
            raise ConfigError("PREFILL_GPU and DECODE_GPU need the GPU engine, but the CPU engine is installed")
        return ((),) * settings.prefill, ((),) * settings.decode
    widths = {len(group) for groups in named for group in groups} or {1}
    if len(widths) > 1 and settings.kv == "twolane":
        raise ConfigError(
            f"prefill and decode instances need equal tensor parallelism, but PREFILL_GPU and DECODE_GPU name "
            f"{' and '.join(str(width) for width in sorted(widths))} GPUs an instance: give each the same number"
        )
    taken = {gpu for groups in named for group in groups for gpu in group}
    if missing := sorted(taken - set(present)):
        raise ConfigError(f"GPU {missing[0]} is not there: this machine has {list(present)}")
    return _give_out(settings, [gpu for gpu in present if gpu not in taken], min(widths))


def memory_share(settings: Settings, gpus: tuple[int, ...]) -> str:
    """Of a GPU's memory, for each of the instances that share it; empty for one that has its GPUs to itself. Only
    what the settings name is ever shared."""
    named = (*settings.prefill_gpu, *settings.decode_gpu)
    sharers = max((sum(gpu in group for group in named) for gpu in gpus), default=1)
    return f"{SHARED_PERCENT // sharers / 100:.2f}" if sharers > 1 else ""


def _give_out(settings: Settings, free: list[int], width: int) -> tuple[GpuGroups, GpuGroups]:
    wanted_prefill = 0 if settings.prefill_gpu else settings.prefill
    wanted = wanted_prefill + (0 if settings.decode_gpu else settings.decode)
    if wanted * width > len(free):
        raise ConfigError(
            f"{wanted} instances need {'a GPU' if width == 1 else f'{width} GPUs'} each, but {len(free)} are free: "
            "lower --prefill or --decode, or let instances share one with PREFILL_GPU and DECODE_GPU"
        )
    groups = tuple(tuple(free[i * width : (i + 1) * width]) for i in range(wanted))
    return settings.prefill_gpu or groups[:wanted_prefill], settings.decode_gpu or groups[wanted_prefill:]
