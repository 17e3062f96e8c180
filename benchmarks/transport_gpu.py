"""What benchmarks.transport asks a GPU by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BUSY_CYCLES = 500_000  # about a quarter of a millisecond
WARM_UPS = 3  # what `pushes` does first and nobody counts


def pinned_copies() -> dict[str, float]:
    """GB/s of one large pinned copy each way, alone."""
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    rates = {}
    for name, source, target in (("to host", device, host), ("to device", host, device)):
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started_s)
        rates[name] = (1 << 30) / statistics.median(times) / 1e9
    return rates


def median_kernel_ms(pushes: Callable[[], object]) -> float:
    """Time of the one kernel of each `cuda_ipc` push, by CUDA events around it.

    A short kernel before them keeps the stream busy while Python launches, so that no call is in the time.
    """
    from twolane.connector.transport.cuda import ipc  # noqa: PLC0415 - after the GPU was chosen

    took: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    name = "copy_blocks"
    plain = getattr(ipc, name)

    def between_events(*words: Any, **options: Any) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        plain(*words, **options)
        end.record()
        took.append((start, end))

    setattr(ipc, name, between_events)
    try:
        pushes()
    finally:
        setattr(ipc, name, plain)
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in took[WARM_UPS:])
