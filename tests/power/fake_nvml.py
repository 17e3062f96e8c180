"""NVIDIA's library at its seam: nvidia-ml-py's functions, error classes and numbers, and GPUs that a test scripts."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml
import pytest

UUIDS = ("GPU-00000000-0000-0000-0000-00000000000a", "GPU-00000000-0000-0000-0000-00000000000b")


@dataclass
class FakeGpu:
    """`instant_mw`, `mean_mw`, `energy_mj`: what it tells; a number of an NVML error: what it raises."""

    uuid: str
    name: str = "Fake GPU"
    instant_mw: Callable[[], int] = lambda: 100_000
    mean_mw: Callable[[], int] = lambda: 90_000
    energy_mj: Callable[[], int] = lambda: 0
    lost: int = 0  # the error that every call about it raises


def fails(error: int) -> Callable[[], int]:
    def tell() -> int:
        raise pynvml.NVMLError(error)

    return tell


UNSUPPORTED = fails(pynvml.NVML_ERROR_NOT_SUPPORTED)


class FakeNvml(types.ModuleType):
    """Functions by the names that nvidia-ml-py gives them. Handles belong to one opening: old ones are void."""

    def __init__(self, *gpus: FakeGpu) -> None:
        super().__init__("pynvml")
        for name, value in vars(pynvml).items():
            if name.startswith("NVML"):  # errors and numbers, the real ones
                setattr(self, name, value)
        self.gpus = list(gpus)
        self.num_open = self.num_opened = 0
        self.num_reads = 0
        for name in (name for name in vars(type(self)) if name.startswith("_do_")):
            setattr(self, name.removeprefix("_do_"), getattr(self, name))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        monkeypatch.setitem(sys.modules, "pynvml", self)
        return self

    def reload(self) -> None:
        """The driver goes and comes back: nobody has it open any more, and handles are void."""
        self.num_open = 0

    def _gpu(self, handle: tuple[int, int]) -> FakeGpu:
        opening, index = handle
        if not self.num_open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if opening != self.num_opened:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        gpu = self.gpus[index]
        if gpu.lost:
            raise pynvml.NVMLError(gpu.lost)
        return gpu

    def _do_nvmlInit(self) -> None:  # noqa: N802 - NVML's names, here and below
        self.num_open, self.num_opened = self.num_open + 1, self.num_opened + 1

    def _do_nvmlShutdown(self) -> None:  # noqa: N802
        if not self.num_open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        self.num_open -= 1

    def _do_nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def _do_nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int]:  # noqa: N802
        self._gpu((self.num_opened, index))
        return self.num_opened, index

    def _do_nvmlDeviceGetUUID(self, handle: tuple[int, int]) -> str:  # noqa: N802
        return self._gpu(handle).uuid

    def _do_nvmlDeviceGetName(self, handle: tuple[int, int]) -> str:  # noqa: N802
        return self._gpu(handle).name

    def _do_nvmlDeviceGetFieldValues(self, handle: tuple[int, int], fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [pynvml.NVML_FI_DEV_POWER_INSTANT]
        gpu, field = self._gpu(handle), pynvml.c_nvmlFieldValue_t()
        self.num_reads += 1
        try:
            field.value.uiVal = gpu.instant_mw()
        except pynvml.NVMLError as error:
            field.nvmlReturn = error.value
        return [field]

    def _do_nvmlDeviceGetPowerUsage(self, handle: tuple[int, int]) -> int:  # noqa: N802
        return self._gpu(handle).mean_mw()

    def _do_nvmlDeviceGetTotalEnergyConsumption(self, handle: tuple[int, int]) -> int:  # noqa: N802
        return self._gpu(handle).energy_mj()


def no_driver() -> types.ModuleType:
    """As where the library isn't installed."""
    fake = FakeNvml()
    fake.nvmlInit = fails(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)  # type: ignore[attr-defined]
    return fake
