"""NVIDIA's management library, through nvidia-ml-py: opened for a moment, or held open to read power and energy.

Nothing here changes a setting of a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

REOPEN_EVERY_S = 30.0  # while a GPU can't be read: its handle may have become void


@contextmanager
def nvml() -> Iterator[Any]:
    """The library, initialised; None where there is no driver."""
    import pynvml  # noqa: PLC0415 - a machine without a driver need not load it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What a GPU says at `at_s` (monotonic). Either may be None, not both."""

    uuid: str
    index: int
    name: str
    at_s: float
    watts: float | None
    counter_j: float | None  # energy since its driver was loaded


class Gpu:
    """One GPU of an open library. A query that it doesn't support isn't asked again."""

    def __init__(self, library: Any, index: int) -> None:
        """Raises NVMLError if it can't be reached."""
        self._library = library
        self._handle = library.nvmlDeviceGetHandleByIndex(index)
        self.index = index
        self.uuid = str(library.nvmlDeviceGetUUID(self._handle))
        self.name = str(library.nvmlDeviceGetName(self._handle))
        # Since Ampere the plain query gives the mean of the last second, which blurs what two lanes do.
        self._ways_to_watts: list[Callable[[], float]] = [self.instant_watts, self.mean_watts]
        self._ways_to_joules: list[Callable[[], float]] = [self.counter_j]

    def read(self, now: Callable[[], float]) -> GpuReading | None:
        """None if it measures neither. Raises NVMLError if it is lost."""
        at_s = now()
        watts, counter_j = self._first(self._ways_to_watts), self._first(self._ways_to_joules)
        if watts is None and counter_j is None:
            return None
        return GpuReading(self.uuid, self.index, self.name, at_s, watts, counter_j)

    def _first(self, ways: list[Callable[[], float]]) -> float | None:
        library = self._library
        while ways:
            try:
                return ways[0]()
            except (
                library.NVMLError_NotSupported,
                library.NVMLError_FunctionNotFound,
                library.NVMLError_NoPermission,
            ):
                del ways[0]
        return None

    def instant_watts(self) -> float:
        field = self._library.nvmlDeviceGetFieldValues(self._handle, [self._library.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn != self._library.NVML_SUCCESS:
            raise self._library.NVMLError(self._library.NVML_ERROR_NOT_SUPPORTED)
        return float(field.value.uiVal) / 1e3

    def mean_watts(self) -> float:
        return float(self._library.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def counter_j(self) -> float:
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


class Driver:
    """The library, held open, and its GPUs. Used by one thread.

    A GPU that fails is left out until it answers again; each is complained of once.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        import pynvml  # noqa: PLC0415 - see above

        self._library: Any = pynvml
        self._now = now
        self._is_open = False
        self._gpus: list[Gpu] = []
        self._num_gpus = 0  # that there are, whether they answer or not
        self._complained: set[int] = set()
        self._reopen_at_s = 0.0

    def open(self) -> str:
        """Why there is nothing to measure; empty if there is."""
        try:
            self._open()
        except self._library.NVMLError as error:
            return str(error)
        return "" if self._gpus else "no NVIDIA GPU that can be read"

    def close(self) -> None:
        self._gpus = []
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(self._library.NVMLError):
                self._library.nvmlShutdown()

    def read(self) -> list[GpuReading]:
        """Of all GPUs that answer. Never raises."""
        readings, missing = [], len(self._gpus) < self._num_gpus
        for gpu in self._gpus:
            try:
                reading = gpu.read(self._now)
            except self._library.NVMLError as error:
                missing = True
                self._complain(gpu.index, error)
                continue
            if reading is not None:
                readings.append(reading)
        if missing and self._now() >= self._reopen_at_s:
            self._reopen()
        return readings

    def _open(self) -> None:
        self._library.nvmlInit()
        self._is_open = True
        self._num_gpus = int(self._library.nvmlDeviceGetCount())
        for index in range(self._num_gpus):
            try:
                self._gpus.append(Gpu(self._library, index))
            except self._library.NVMLError as error:
                self._complain(index, error)

    def _reopen(self) -> None:
        """After a GPU was lost, or the driver was loaded anew, the old handles may be void."""
        self.close()
        with contextlib.suppress(self._library.NVMLError):
            self._open()
        self._reopen_at_s = self._now() + REOPEN_EVERY_S

    def _complain(self, index: int, error: Exception) -> None:
        if index not in self._complained:
            self._complained.add(index)
            logger.warning('power of a GPU is not measured gpu=%d reason="%s"', index, error)
