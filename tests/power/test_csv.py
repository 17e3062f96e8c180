"""The series in a file, through the real writer thread."""

from __future__ import annotations

import logging
import math
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from twolane.errors import ConfigError
from twolane.power import read_csv
from twolane.power.csv_file import COLUMNS, CsvWriter
from twolane.power.lanes import GpuSample, Lane, Sample
from twolane.power.series import make_series, points_of


def sample(number: int, watts: float | None = 100.0, lane: Lane = "prefill", update_s: float | None = None) -> Sample:
    """One of two GPUs, ten a second; the second is always D's."""
    gpus = (
        GpuSample("GPU-a", 0, "Fake", lane, watts, 10.0 * number),
        GpuSample("GPU-b", 1, "Fake", "decode", 300.0, 30.0 * number),
    )
    return Sample(1000 + number / 10, 1.7e9 + number / 10, 0.1, update_s, gpus, {}, number % 3, number % 5)


@contextmanager
def writing(path: Path, max_bytes: int = 1 << 30) -> Iterator[CsvWriter]:
    writer = CsvWriter(path, max_bytes)
    writer.start()
    try:
        yield writer
    finally:
        writer.close()
        assert not any(thread.name == "twolane-power-csv" for thread in threading.enumerate())


def test_what_is_written_is_read_back_by_gpu_and_lane(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    with writing(path) as writer:
        for number in range(20):
            writer.put(sample(number, None if number == 7 else 100.0, "both" if number >= 15 else "prefill"))
    series = read_csv(path)
    assert (series.every_s, series.update_s) == (0.1, None)
    a = series.gpus["GPU-a"]
    assert (a.index, len(a.at_s), a.joules[-1]) == (0, 20, 190)
    assert [number for number in range(20) if math.isnan(a.watts[number])] == [7]
    assert a.lanes == ["prefill"] * 15 + ["both"] * 5
    assert list(a.at_s) == [pytest.approx(1000 + number / 10) for number in range(20)]
    assert a.time_s[3] == pytest.approx(1.7e9 + 0.3)
    decode = series.lanes["decode"]
    assert (len(decode.at_s), decode.joules[-1]) == (20, 570)
    assert list(decode.in_flight) == [number % 5 for number in range(20)]
    assert list(series.lanes["prefill"].in_flight) == [number % 3 for number in range(15)]
    assert list(series.lanes["both"].in_flight) == [number % 3 + number % 5 for number in range(15, 20)]


def test_the_heading_says_how_often_the_counters_change_as_soon_as_that_is_known(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    with writing(path) as writer:
        writer.put(sample(1))
        writer.put(sample(2, update_s=0.1004))
    lines = path.read_text().splitlines()
    assert lines[0].rstrip() == "# twolane power, every_s=0.1, update_s=0.100"
    assert lines[1] == COLUMNS
    assert lines[2] == "1700000000.100,1000.1000,GPU-a,0,prefill,100.000,10.000,1,1"
    assert read_csv(path).update_s == 0.1


def test_another_run_goes_on_in_the_same_file_and_its_joules_are_added(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    for run in (0, 1):
        with writing(path) as writer:
            for number in range(5):
                writer.put(sample(number))
        if run == 0:
            with path.open("a") as file:
                file.write("1700000000.1,1000.1,GPU-a,0,pre")  # killed in the middle of a line
    text = path.read_text()
    assert text.count("# twolane power") == 2
    assert all(line.count(",") == COLUMNS.count(",") for line in text.splitlines() if not line.startswith("#"))
    assert list(read_csv(path).gpus["GPU-a"].joules) == [0, 10, 20, 30, 40, 40, 50, 60, 70, 80]


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    with writing(path) as writer:
        writer.put(sample(1))
    path.write_text(path.read_text()[:-3])
    assert set(read_csv(path).gpus) == {"GPU-a"}


def test_a_full_file_moves_aside_and_the_next_one_has_its_own_heading(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    with writing(path, max_bytes=2_000) as writer:
        for number in range(200):
            writer.put(sample(number))
            if number % 5 == 0:
                while writer._buffer.qsize():
                    os.sched_yield()
    older = Path(f"{path}.1")
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, older.name}
    for file in (path, older):
        assert file.stat().st_size <= 2_500
        assert file.read_text().startswith("# twolane power")
        assert file.read_text().endswith("\n")
    assert list(read_csv(older).gpus["GPU-b"].at_s)[-1] < read_csv(path).gpus["GPU-b"].at_s[0]
    assert read_csv(path).gpus["GPU-b"].at_s[-1] == pytest.approx(1000 + 19.9)


def test_a_full_disk_ends_the_series_with_one_line_and_no_half_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "power.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(path) as writer:
        writer.put(sample(1))
        while not path.stat().st_size:
            os.sched_yield()
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
        try:
            writer.put(sample(2))
            writer._thread.join(30)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for number in range(5_000):
            writer.put(sample(number))  # never blocks, never raises
    assert [(r.levelno, r.message) for r in caplog.records] == [
        (logging.ERROR, f'power series ends file={path} reason="File too large"')
    ]
    assert path.read_text().endswith("\n")
    assert [len(gpu.at_s) for gpu in read_csv(path).gpus.values()] == [1, 1]


def test_no_space_from_the_first_byte(caplog: pytest.LogCaptureFixture) -> None:
    with writing(Path("/dev/full")) as writer:
        writer.put(sample(1))
        writer._thread.join(30)
    assert [r.message for r in caplog.records] == ['power series ends file=/dev/full reason="No space left on device"']


def test_what_a_slow_disk_cannot_take_is_lost_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CsvWriter(tmp_path / "power.csv")
    for number in range(1_100):  # it isn't read yet
        writer.put(sample(number))
    writer.start()
    writer.close()
    assert len(read_csv(tmp_path / "power.csv").gpus["GPU-a"].at_s) == 1_024
    assert "samples_lost=76" in caplog.text


def test_a_path_that_will_not_do_is_named(tmp_path: Path) -> None:
    other = tmp_path / "letters.txt"
    other.write_text("Dear Ada,\n")
    with pytest.raises(ConfigError, match=r"letters\.txt is there already, and no power series"):
        CsvWriter(other)
    assert other.read_text() == "Dear Ada,\n"
    with pytest.raises(ConfigError, match=r"nowhere/power\.csv can't be written: No such file"):
        CsvWriter(tmp_path / "nowhere/power.csv")
    with pytest.raises(ConfigError, match=r"letters\.txt:1 is no line of a power series"):
        read_csv(other)


def test_joules_between_two_moments_are_interpolated_and_end_where_the_series_does() -> None:
    gpu = make_series((point for number in range(3) for point in points_of(sample(number))), 0.1, None).gpus["GPU-a"]
    assert gpu.joules_between(1000.05, 1000.15) == pytest.approx(10)
    assert gpu.joules_between(1000.1, 1000.2) == pytest.approx(10)
    assert gpu.joules_between(0, 2000) == 20


def test_an_empty_file_is_an_empty_series(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    with writing(path):
        pass
    assert read_csv(path).gpus == {}
