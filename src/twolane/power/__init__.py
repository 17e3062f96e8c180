"""Power and energy of the GPUs, by lane. Only looks; without NVIDIA's driver there is nothing to see."""

from __future__ import annotations

from twolane.power.csv_file import read_csv
from twolane.power.lanes import Lane
from twolane.power.series import PowerRecorder, PowerSeries

__all__ = ["Lane", "PowerRecorder", "PowerSeries", "read_csv"]
