"""Pure: what each phase of the soak runs with, and which fault comes when. One start of all services a phase."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

FaultKind = Literal["kill P", "kill D", "stop P", "stop D"]
MAX_MODEL_LEN = 2048
STOP_S = 5.0
KILL_EVERY_S = 30.0
LEASE_S = 20.0
TRANSFER_TIMEOUT_S = 30.0
PEER_TIMEOUT_S = 10.0
PATIENT_S = 20.0  # longer than P hangs: shorter, and D gives up and computes the prompt, which is another thing
CLIENT_DEADLINE_S = 120.0  # a request that hasn't ended by then is lost
SMALL_CHUNKS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "32", "--max-model-len", str(MAX_MODEL_LEN))
NO_PREFIX_CACHE = ("--no-enable-prefix-caching",)
# 17 blocks of 128 tokens hold one longest prompt and nothing else. Without the reservation P takes prompts in that it
# can't finish side by side, and preempts.
TINY_KV = ("--num-gpu-blocks-override", "18", "--no-scheduler-reserve-full-isl")

DEADLINES = {"lease_s": LEASE_S, "transfer_timeout_s": TRANSFER_TIMEOUT_S, "peer_timeout_s": PEER_TIMEOUT_S}


@dataclass(frozen=True)
class Fault:
    at_s: float
    kind: FaultKind


@dataclass(frozen=True)
class Phase:
    """`kills`, `stops`: which roles, in turn. `drops`: names of P that lose every tenth message they send."""

    slug: str  # what the command calls it; also a folder's name
    name: str
    share: float  # of the requests
    max_s: float  # of load; the phase ends then, whatever is left
    prefill: int = 1
    decode: int = 1
    concurrency: int = 12
    vllm_args: tuple[str, ...] = SMALL_CHUNKS
    kills: tuple[FaultKind, ...] = ()
    kill_every_s: float = KILL_EVERY_S
    spare_last: bool = False  # the last of its role isn't killed, or a slow machine answers nothing but 503
    stops: tuple[FaultKind, ...] = ()
    stop_every_s: float = 20.0
    drops: tuple[str, ...] = ()
    hang_rounds: int = 0  # of the measurement of D's streams while P hangs
    fault: str = ""  # in every P, to show that the suite notices
    extra: dict[str, float] = field(default_factory=lambda: dict(DEADLINES))  # of the connector


CALM = Phase(
    "calm",
    "1P1D, prefix caching off",
    share=0.35,
    max_s=420,
    vllm_args=(*SMALL_CHUNKS, *NO_PREFIX_CACHE),
    stops=("stop P", "stop D"),
    hang_rounds=4,
    extra={**DEADLINES, "peer_timeout_s": PATIENT_S},
)
TINY = Phase(
    "tiny",
    "1P1D, tiny KV space, P killed and losing messages",
    share=0.3,
    max_s=420,
    vllm_args=(*SMALL_CHUNKS, *TINY_KV),
    kills=("kill P",),
    kill_every_s=90.0,
    stops=("stop D", "stop P"),
    drops=("prefill",),
)
KILLS = Phase(
    "kills",
    "2P2D, killed every 30 s",
    share=0.35,
    max_s=480,
    prefill=2,
    decode=2,
    kills=("kill P", "kill D"),
    stops=("stop P", "stop D"),
    stop_every_s=25.0,
    spare_last=True,
    drops=("prefill-2",),
)
SHORT = Phase(
    "short",
    "short: 1P1D, tiny KV space, both killed once",
    share=1.0,
    max_s=90,
    vllm_args=(*SMALL_CHUNKS, *TINY_KV),
    kills=("kill P", "kill D"),
    kill_every_s=25.0,
    stops=("stop P", "stop D"),
    stop_every_s=10.0,
    drops=("prefill",),
)
PHASES = {phase.slug: phase for phase in (CALM, TINY, KILLS, SHORT)}
SOAK = ("calm", "tiny", "kills")


def fault_schedule(seed: int, phase: Phase) -> list[Fault]:
    """Kills at fixed intervals; stops at about theirs, so that they meet every stage of a transfer."""
    rng = random.Random(seed)
    faults = [
        Fault(at_s, phase.kills[number % len(phase.kills)])
        for number in range(1000)
        if phase.kills and (at_s := (number + 0.5) * phase.kill_every_s) < phase.max_s
    ]
    faults += [
        Fault(at_s, phase.stops[number % len(phase.stops)])
        for number in range(1000)
        if phase.stops and (at_s := (number + rng.uniform(0.3, 0.9)) * phase.stop_every_s) < phase.max_s
    ]
    return sorted(faults, key=lambda fault: fault.at_s)
