"""Pure: a seed -> prompts, requests, and who leaves where. The same seed makes the same requests on every machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LeavePoint = Literal["queue", "prefill", "transfer", "stream"]
LEAVE_POINTS: tuple[LeavePoint, ...] = ("queue", "prefill", "transfer", "stream")
LEAVING_SHARE = 0.2
STREAMING_SHARE = 0.7
PREFILL_TOKENS_PER_S = 600.0  # of the default model on a core; only aims where a client leaves
MAX_OUTPUT_TOKENS = 24
# (share, shortest, longest): mostly short, so that two cores make it; a block is 128 tokens, a chunk 64.
LENGTH_CLASSES = ((0.85, 2, 160), (0.12, 160, 500), (0.03, 500, 1400))


@dataclass(frozen=True)
class Leave:
    """When a client leaves: `after_s` seconds after it asked, or once it has seen `after_tokens` tokens."""

    point: LeavePoint
    after_s: float = 0.0
    after_tokens: int = 0


@dataclass(frozen=True)
class Request:
    """`prompt`: which of the prompts. `leave`: None for a client that stays."""

    number: int
    prompt: int
    max_tokens: int
    stream: bool
    leave: Leave | None = None


def make_prompts(seed: int, count: int, max_tokens: int) -> list[list[int]]:
    """Random token ids, so that a prompt shares no block with another. Lengths by class, in a fixed order."""
    rng = random.Random(seed)
    lengths = [
        rng.randint(low, high) for share, low, high in LENGTH_CLASSES for _ in range(max(1, round(share * count)))
    ]
    return [[rng.randrange(100, 32000) for _ in range(min(length, max_tokens))] for length in lengths]


def make_requests(seed: str, count: int, prompt_lengths: Sequence[int], answer_lengths: Sequence[int]) -> list[Request]:
    """`answer_lengths`: how many tokens of the reference to each prompt are known. A prompt with none isn't asked."""
    rng = random.Random(seed)
    usable = [index for index, length in enumerate(answer_lengths) if length > 0]
    deck: list[int] = []
    requests = []
    for number in range(count):
        if not deck:
            deck = rng.sample(usable, len(usable))  # every prompt comes as often as the others
        prompt = deck.pop()
        max_tokens = rng.randint(1, answer_lengths[prompt])
        leave = _leave(rng, prompt_lengths[prompt], max_tokens) if rng.random() < LEAVING_SHARE else None
        stream = rng.random() < STREAMING_SHARE or leave is not None
        requests.append(Request(number, prompt, max_tokens, stream, leave))
    return requests


def _leave(rng: random.Random, prompt_tokens: int, max_tokens: int) -> Leave:
    point = rng.choice(LEAVE_POINTS)
    prefill_s = prompt_tokens / PREFILL_TOKENS_PER_S
    if point == "queue":
        return Leave(point, after_s=rng.uniform(0.0, 0.03))
    if point == "prefill":
        return Leave(point, after_s=0.03 + prefill_s * rng.uniform(0.0, 0.5))
    if point == "transfer":  # chunks cross while later ones are computed, the last one after the end
        return Leave(point, after_s=0.03 + prefill_s * rng.uniform(0.5, 1.2))
    return Leave(point, after_tokens=rng.randint(1, max_tokens))
