"""The series in a file: one line a GPU and sample, written by a thread of its own, and read back."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from twolane.errors import ConfigError
from twolane.power.lanes import Sample
from twolane.power.series import Point, PowerSeries, make_series, points_of

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000_000
COLUMNS = "time_s,monotonic_s,uuid,gpu,lane,watts,joules,prefill_requests,decode_requests"
_BEGINS = b"# twolane power, "
_UPDATE_CHARS = 8
_MAX_BUFFERED = 1024  # samples
_CLOSE_TIMEOUT_S = 5.0


class CsvWriter:
    """Owns the file and a thread. `put` never blocks: what a slow disk can't take in time is lost, and counted.

    A file that is there already is continued, under a new heading. One that would grow beyond `max_bytes` moves to
    NAME.1, in the place of an older one, and a new one begins. Only whole lines stay: of what a full disk took half,
    that half is taken back. Then the series ends, with one line in the log.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        """Raises ConfigError if the file can't be written, or is something else."""
        self._path = path
        self._max_bytes = max_bytes
        self._buffer: queue.Queue[Sample | None] = queue.Queue(_MAX_BUFFERED)
        self._num_lost = 0
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"--power-csv {path} can't be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="twolane-power-csv", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, sample: Sample) -> None:
        try:
            self._buffer.put_nowait(sample)
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Writes what is buffered, unless the disk hangs. Blocks as long."""
        with contextlib.suppress(queue.Full):
            self._buffer.put(None, timeout=_CLOSE_TIMEOUT_S if self._thread.is_alive() else 0)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size_bytes = os.fstat(self._file).st_size
        self._update_at_byte = -1  # where it says how often the counters change; negative: it has no heading yet
        self._update_text = ""
        if self._size_bytes and os.pread(self._file, len(_BEGINS), 0) != _BEGINS:
            os.close(self._file)
            raise ConfigError(f"--power-csv {self._path} is there already, and no power series: choose another name")
        self._size_bytes = _whole_lines(self._file, self._size_bytes)

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
        except OSError as error:
            logger.error('power series ends file=%s reason="%s"', self._path, error.strerror)
        else:
            if self._num_lost:
                logger.warning("power series has gaps file=%s samples_lost=%d", self._path, self._num_lost)
        finally:
            os.close(self._file)

    def _write_next(self) -> bool:
        """Waits for the next sample; writes it and what has come with it. False if that was the end."""
        taken = [self._buffer.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                taken.append(self._buffer.get_nowait())
        samples = [sample for sample in taken if sample is not None]
        if samples:
            self._write(samples)
        return len(samples) == len(taken)

    def _write(self, samples: list[Sample]) -> None:
        lines = "".join(_line(point) for sample in samples for point in points_of(sample)).encode()
        if self._size_bytes and self._size_bytes + len(lines) > self._max_bytes:
            os.close(self._file)
            self._path.replace(f"{self._path}.1")
            self._open()
        if self._update_at_byte < 0:
            begins = _BEGINS + f"every_s={samples[0].every_s:g}, update_s=".encode()
            self._update_at_byte = self._size_bytes + len(begins)
            lines = begins + b" " * _UPDATE_CHARS + f"\n{COLUMNS}\n".encode() + lines
        self._append(lines)
        self._tell_update(samples[-1].update_s)

    def _append(self, lines: bytes) -> None:
        end = self._size_bytes
        try:
            while lines:
                written = os.pwrite(self._file, lines, end)
                end, lines = end + written, lines[written:]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size_bytes)
            raise
        self._size_bytes = end

    def _tell_update(self, update_s: float | None) -> None:
        """Into the place that the heading keeps for it, since it is only known after a while."""
        text = "unknown" if update_s is None else f"{update_s:.3f}"
        if text != self._update_text:
            self._update_text = text
            os.pwrite(self._file, text.ljust(_UPDATE_CHARS)[:_UPDATE_CHARS].encode(), self._update_at_byte)


def _whole_lines(file: int, size_bytes: int) -> int:
    """Takes back the last line if a killed process left it unfinished. The size then."""
    tail_at = max(0, size_bytes - 4096)
    tail = os.pread(file, size_bytes - tail_at, tail_at)
    whole = tail_at + tail.rfind(b"\n") + 1
    if whole < size_bytes:
        os.ftruncate(file, whole)
    return whole


def _line(point: Point) -> str:
    watts = "" if math.isnan(point.watts) else f"{point.watts:.3f}"
    return (
        f"{point.time_s:.3f},{point.at_s:.4f},{point.uuid},{point.index},{point.lane},{watts},{point.joules:.3f},"
        f"{point.prefill_in_flight},{point.decode_in_flight}\n"
    )


def read_csv(path: Path) -> PowerSeries:
    """What `--power-csv` has written. An unfinished last line is left out. ConfigError if it is something else."""
    settings: dict[str, str] = {}

    def points() -> Iterator[Point]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.startswith(_BEGINS.decode()):
                    for part in line.split(",")[1:]:
                        key, _, value = part.strip().partition("=")
                        settings[key] = value
                elif line.endswith("\n") and line.rstrip() != COLUMNS:
                    yield _point(line, f"{path}:{number}")

    series = make_series(points(), math.nan, None)
    every, update = settings.get("every_s", "nan"), settings.get("update_s", "unknown")
    update_s = None if update in {"unknown", ""} else float(update)
    return PowerSeries(float(every), update_s, series.gpus, series.lanes)


def _point(line: str, where: str) -> Point:
    try:
        time_s, at_s, uuid, index, lane, watts, joules, prefill, decode = line.rstrip("\n").split(",")
        watts = watts or "nan"
        return Point(
            *(float(time_s), float(at_s), uuid, int(index), lane, float(watts), float(joules)),
            int(prefill),
            int(decode),
        )
    except ValueError as error:
        raise ConfigError(f"{where} is no line of a power series") from error
