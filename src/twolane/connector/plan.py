"""What the scheduler side tells the worker side in one engine step. Plain data: pickled to every worker under TP."""

from __future__ import annotations

from dataclasses import dataclass, field

from twolane.protocol import Load


@dataclass(frozen=True)
class Receive:
    """D: blocks are allocated and wait for this transfer. `block_ids` lacks what D has in its prefix cache."""

    req_id: str
    transfer_id: str
    prefill_address: str  # P's control address, rank 0
    num_tokens: int
    first_block: int
    block_ids: list[int]
    digest: bytes
    story: bool = False  # see protocol.HandoffParams


@dataclass(frozen=True)
class Drop:
    """D: nobody wants this transfer any more (client gone), or nothing of it is needed (all in the prefix cache)."""

    transfer_id: str
    prefill_address: str
    reason: str


@dataclass(frozen=True)
class Offer:
    """P: a request came in whose KV a D will ask for."""

    req_id: str
    transfer_id: str
    digest: bytes
    story: bool = False


@dataclass(frozen=True)
class Advance:
    """P: after this step's forward pass the first `num_valid_tokens` tokens of the request have their KV.

    `block_ids` are appended to the request's blocks, or replace them (first schedule, resumption after preemption).
    """

    req_id: str
    block_ids: list[int]
    replace: bool
    num_valid_tokens: int


@dataclass(frozen=True)
class Finish:
    """P: the request has ended; `ok` if its prompt was computed to the end."""

    req_id: str
    ok: bool


@dataclass(frozen=True)
class Ended:
    """D: the request that this transfer was for has its last token, or was aborted. `at_s`: monotonic."""

    transfer_id: str
    at_s: float
    story: bool = True  # or it wouldn't be here


@dataclass
class StepPlan:
    """Everything for one step. `preempted`: P's requests whose blocks were taken away before this step's forward.

    `started`: D's requests that this step computes with though their last byte may be missing (head_start.py).
    `may_start_early`: D may say in this step whose last byte is due.
    `num_tokens`: computed in this step, of whomever. `load`: for the registration; None if it isn't known.
    """

    receive: list[Receive] = field(default_factory=list)
    drop: list[Drop] = field(default_factory=list)
    offer: list[Offer] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    advance: list[Advance] = field(default_factory=list)
    finish: list[Finish] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    may_start_early: bool = False
    num_tokens: int = 0
    load: Load | None = None
