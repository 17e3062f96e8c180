"""What a comparison is asked for, and what is taken where nothing was said. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from twolane.bench.goodput import Objective
from twolane.bench.journal import Idle
from twolane.bench.sweep import Pace, Schedule, Side, round_rate, step_seconds
from twolane.errors import ConfigError
from twolane.launch.plan import Engine

LENGTHS: dict[Engine, tuple[int, int]] = {"cuda": (1024, 128), "cpu": (256, 32)}
GPU_OBJECTIVE_MS = (500.0, 50.0)  # TTFT, ITL
OF_IDLE = (4.0, 3.0)  # without GPUs: so many times what an idle plain instance needs
DEFAULT_ROUNDS = 3
BUDGET_MINUTES = 30.0
USUAL_START_S: dict[Engine, float] = {"cuda": 100.0, "cpu": 45.0}
PATIENCE = 4.0  # a request may take so many times what the objective allows for it; then it is a time-out
TIMEOUT_S = (10.0, 300.0)  # least and most


class Given(msgspec.Struct, frozen=True):
    """The command line. None, empty: not said."""

    input_len: int | None = None
    output_len: int | None = None
    num_prompts: int | None = None
    rates: tuple[float, ...] = ()
    rounds: int | None = None
    seed: int | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    aggregated_args: tuple[str, ...] | None = None

    def of_compare(self) -> dict[str, object]:
        """By flag, those that only a comparison has; None: not said."""
        names = ("rates", "rounds", "ttft_ms", "itl_ms", "aggregated_args")
        return {flag_of(name): None if getattr(self, name) == () else getattr(self, name) for name in names}


class Asked(msgspec.Struct, frozen=True):
    """All that decides what is measured; the same when a run goes on. `step_s`: how long a rate is asked for.

    `num_prompts`: requests a step, in place of `step_s`. Objectives that are None are made from the idle measurement.
    """

    input_len: int
    output_len: int
    num_prompts: int | None
    rates: tuple[float, ...]
    rounds: int
    seed: int
    ttft_ms: float | None
    itl_ms: float | None
    aggregated_args: tuple[str, ...]
    step_s: float

    def words(self) -> str:
        return f"{self.input_len}-token prompts and {self.output_len}-token answers"


def fill(given: Given, engine: Engine, decode_args: tuple[str, ...], budget_s: float) -> Asked:
    input_len, output_len = LENGTHS[engine]
    ttft_ms, itl_ms = GPU_OBJECTIVE_MS if engine == "cuda" else (None, None)
    rounds = given.rounds or DEFAULT_ROUNDS
    return Asked(
        input_len=given.input_len or input_len,
        output_len=given.output_len or output_len,
        num_prompts=given.num_prompts,
        rates=given.rates,
        rounds=rounds,
        seed=given.seed or 0,
        ttft_ms=given.ttft_ms or ttft_ms,
        itl_ms=given.itl_ms or itl_ms,
        aggregated_args=decode_args if given.aggregated_args is None else given.aggregated_args,
        step_s=step_seconds(budget_s, rounds, (rounds + 1) * USUAL_START_S[engine]),
    )


def check_same(given: Given, asked: Asked) -> None:
    """ConfigError if what is said now isn't what the run began with."""
    for name in given.__struct_fields__:
        now, then = getattr(given, name), getattr(asked, name)
        if now not in (None, ()) and now != then:
            raise ConfigError(
                f"{flag_of(name)}: the run began with {shown(then)}, now it is {shown(now)}: leave the flag out"
            )


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_rates(text: str) -> tuple[float, ...]:
    """`0.5,1,2`, ascending. ConfigError if that isn't a list of numbers above 0."""
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or not 0 < rates[0] <= rates[-1] < 1e6:
        raise ConfigError(f"--rates {text}: give requests a second with commas between them, as in 0.5,1,2")
    return rates


def objective_of(asked: Asked, idle: Idle) -> Objective:
    """What isn't given is a multiple of what an idle side needs."""
    ttft_ms, itl_ms = asked.ttft_ms, asked.itl_ms
    if ttft_ms and itl_ms:
        return Objective(ttft_ms, itl_ms, "given, or the default for GPUs")
    times = {"TTFT": (ttft_ms, OF_IDLE[0], idle.ttft_ms), "ITL": (itl_ms, OF_IDLE[1], idle.itl_ms)}
    made = [
        f"{name} {factor:g} times {idle_ms:.0f} ms" for name, (limit, factor, idle_ms) in times.items() if not limit
    ]
    who = "a plain instance" if idle.side == "aggregated" else "the lanes"
    origin = f"from what {who} needed while nobody else asked: {', '.join(made)}"
    return Objective(
        ttft_ms or round_rate(OF_IDLE[0] * idle.ttft_ms), itl_ms or round_rate(OF_IDLE[1] * idle.itl_ms), origin
    )


def schedule_of(asked: Asked, idle: Idle | None, able: tuple[Side, ...], interleaved: bool = False) -> Schedule:
    """A search begins at the rate at which an idle side would always have one request to do."""
    first = 1000 / idle.end_to_end_ms if idle else 1.0
    return Schedule(asked.rounds, asked.rates, round_rate(first), able, asked.step_s, asked.num_prompts, interleaved)


def timeout_s(asked: Asked, objective: Objective) -> float:
    """Of one request."""
    allowed_ms = objective.ttft_ms + asked.output_len * objective.itl_ms
    least, most = TIMEOUT_S
    return min(most, max(least, PATIENCE * allowed_ms / 1000))


def pace_of(asked: Asked, idle: Idle | None, start_s: float) -> Pace:
    """For the estimate: the last request of a step takes somewhat longer than an idle one."""
    tail_s = 2 * idle.end_to_end_ms / 1000 if idle else 2.0
    return Pace(asked.step_s, asked.num_prompts, tail_s, start_s)
