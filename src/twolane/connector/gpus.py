"""Which GPUs this instance computes on, by the names that NVIDIA's tools give them."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import torch

logger = logging.getLogger(__name__)

_OLD_MIG_NAME = re.compile(r"MIG-(GPU-[0-9a-f-]+)/\d+/\d+")


def gpu_uuids(tp_size: int) -> list[str]:
    """Of the ranks 0, 1, ... as far as this process sees their GPUs; empty without any. Never raises: this only tells
    people whose power is whose."""
    try:
        if not torch.cuda.is_available():
            return []
        named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        return [_uuid(rank, named) for rank in range(min(tp_size, torch.cuda.device_count()))]
    except Exception as error:  # noqa: BLE001 - whatever a driver raises, the instance starts
        logger.info('GPUs are not known by name reason="%s"', error)
        return []


def _uuid(rank: int, named: list[str]) -> str:
    """vLLM gives rank r the r-th visible GPU. Of a slice (MIG) the GPU's own: power is measured of the whole."""
    name = named[rank] if rank < len(named) else ""
    if name.startswith("MIG-"):
        old = _OLD_MIG_NAME.fullmatch(name)
        return old[1] if old else _gpu_of_slice(name)
    return f"GPU-{torch.cuda.get_device_properties(rank).uuid}"


def _gpu_of_slice(name: str) -> str:
    import pynvml  # noqa: PLC0415 - few have slices

    library: Any = pynvml
    library.nvmlInit()
    try:
        slice_handle = library.nvmlDeviceGetHandleByUUID(name)
        return str(library.nvmlDeviceGetUUID(library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_handle)))
    finally:
        library.nvmlShutdown()
