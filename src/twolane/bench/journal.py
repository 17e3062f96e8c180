"""raw.jsonl of a comparison: every request with its raw times, every step, every start, a line each, as it happens.

It is the whole state: figures and reports are made from it, and a run that was interrupted goes on from it. A step
counts once its own line stands behind its requests; requests without it belong to a step that was cut, and are told as
such. Times are seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import fcntl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from twolane.bench.client import Sample
from twolane.bench.goodput import Figures, Objective, figures_of
from twolane.bench.power import Drawn
from twolane.bench.sweep import Done, Side, Step
from twolane.errors import ConfigError

FORMAT = 1
FILE_NAME = "raw.jsonl"


class Header(msgspec.Struct, tag="header", tag_field="kind", frozen=True):
    """What a run that goes on must share with the one that began. `key`: settings, versions, hardware, model."""

    asked: dict[str, Any]
    key: dict[str, Any]
    about: dict[str, Any]
    format: int = FORMAT


class Request(msgspec.Struct, tag="request", tag_field="kind", frozen=True):
    """`round` -1: the side was idle otherwise, one request at a time."""

    side: Side
    round: int
    rate: float
    sent_s: float
    event_s: list[float]
    num_tokens: int
    error: str
    first_byte_s: float | None = None
    ended_s: float | None = None


class StepEnd(msgspec.Struct, tag="step", tag_field="kind", frozen=True):
    """The step's requests are whole. `proxy`: what its proxy counted meanwhile. `power`: of the step, if known."""

    step: Step
    began_s: float
    ended_s: float
    num_requests: int
    proxy: dict[str, int]
    power: Drawn | None = None


class Idle(msgspec.Struct, tag="idle", tag_field="kind", frozen=True):
    """Medians of a side that has nothing else to do, in ms."""

    side: Side
    ttft_ms: float
    itl_ms: float
    end_to_end_ms: float


class Objectives(msgspec.Struct, tag="objective", tag_field="kind", frozen=True):
    objective: Objective


class Started(msgspec.Struct, tag="started", tag_field="kind", frozen=True):
    side: Side
    took_s: float
    commands: list[list[str]]


class Note(msgspec.Struct, tag="note", tag_field="kind", frozen=True):
    """`failed`: a side that couldn't be had."""

    text: str
    failed: Side | None = None


Line = Header | Request | StepEnd | Idle | Objectives | Started | Note
_decode = msgspec.json.Decoder(Line).decode
_encode = msgspec.json.Encoder().encode


@dataclass
class Measured:
    """What stands in a journal. `figures`: of whole steps alone; `cut`: how many requests belong to others."""

    header: Header
    figures: dict[Step, Figures] = field(default_factory=dict)
    ends: dict[Step, StepEnd] = field(default_factory=dict)
    idle: dict[Side, Idle] = field(default_factory=dict)
    objective: Objective | None = None
    starts: list[Started] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[Side, str] = field(default_factory=dict)
    cut: int = 0
    _open: dict[Step, list[Sample]] = field(default_factory=dict)  # requests of steps that haven't ended

    def take(self, line: Line) -> None:
        match line:
            case Request() if line.round >= 0:
                self._open.setdefault(Step(line.side, line.round, line.rate), []).append(sample_of(line))
            case StepEnd():
                assert self.objective is not None  # it is there before anything is measured
                self.figures[line.step] = figures_of(self._open.pop(line.step, []), line.step.rate, self.objective)
                self.ends[line.step] = line
            case Idle():
                self.idle[line.side] = line
            case Objectives():
                self.objective = line.objective
            case Started():
                self.starts.append(line)
                self.cut += self._drop(line.side)
            case Note():
                self.notes.append(line.text)
                if line.failed:
                    self.failed[line.failed] = line.text

    def _drop(self, side: Side) -> int:
        """A side that starts has no step under way: what is open was cut."""
        cut = [step for step in self._open if step.side == side]
        return sum(len(self._open.pop(step)) for step in cut)

    def close(self) -> None:
        self.cut += sum(map(len, self._open.values()))
        self._open.clear()

    def done(self) -> list[Done]:
        return [Done(step, figures.holds) for step, figures in self.figures.items()]


def request_line(step: Step, sample: Sample) -> Request:
    times = [round(at_s, 6) for at_s in sample.event_s]
    first, ended = (None if at_s is None else round(at_s, 6) for at_s in (sample.first_byte_s, sample.ended_s))
    sent_s, error = round(sample.sent_s, 6), sample.error
    return Request(step.side, step.round, step.rate, sent_s, times, sample.num_tokens, error, first, ended)


def sample_of(line: Request) -> Sample:
    return Sample(line.sent_s, line.event_s, line.num_tokens, line.error, line.first_byte_s, line.ended_s)


class Journal:
    """Owns the file and what was measured. `add` writes through: a killed process loses no line that it added."""

    def __init__(self, path: Path, measured: Measured | None = None) -> None:
        """Without `measured` the file says it. ConfigError if it doesn't, or if another process has it."""
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if measured is None:
                measured, whole_bytes = read(path)
                self._file.truncate(whole_bytes)  # a line that was being written when the process was killed
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another comparison is at work in {path.parent}: wait until it is done") from None
        except ConfigError:
            self._file.close()
            raise
        self.measured = measured

    @classmethod
    def begin(cls, folder: Path, header: Header) -> Journal:
        """ConfigError if there is one already."""
        path = folder / FILE_NAME
        if path.exists():
            raise ConfigError(
                f"{folder} holds a comparison already: `--resume {folder}` goes on, or name another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(path, Measured(header))
        journal.add(header)
        return journal

    @classmethod
    def resume(cls, folder: Path) -> Journal:
        """ConfigError if there is none that this version understands."""
        path = folder / FILE_NAME
        if not path.exists():
            raise ConfigError(f"{folder} holds no comparison that can go on")
        journal = cls(path)
        journal.measured.failed.clear()  # what couldn't be had then is tried again
        return journal

    def add(self, line: Line) -> None:
        self._file.write(_encode(line) + b"\n")
        self._file.flush()
        self.measured.take(line)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> tuple[Measured, int]:
    """What stands there, and how many bytes of it are whole lines."""
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [_decode(line) for line in whole.splitlines()]
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} holds no comparison that can go on: {error}") from error
    if not lines or not isinstance(lines[0], Header) or lines[0].format != FORMAT:
        raise ConfigError(f"{path} is no comparison that this version can go on with: begin a new one")
    measured = Measured(lines[0])
    for line in lines[1:]:
        measured.take(line)
    return measured, len(whole)


def difference(ours: dict[str, Any], theirs: dict[str, Any], place: str = "") -> list[str]:
    """Where two keys differ, a sentence each. Both as JSON has them."""
    told = []
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            told += difference(mine, other, f"{place}{name}.")
        elif mine != other:
            told.append(f"{place}{name} is {mine!r} now and was {other!r}")
    return told
