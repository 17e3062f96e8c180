"""What is asked: seeded prompts of token ids and their arrival times."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """One request. `at_s`: when it is sent, counted from the start.

    `wants_token_ids` makes vLLM send the prompt's ids back with the first token: not for requests whose TTFT counts.
    """

    at_s: float
    prompt: list[int]
    max_tokens: int
    request_id: str = ""
    wants_token_ids: bool = False


def one_at_a_time(seed: int, count: int, input_tokens: int, output_tokens: int) -> list[Ask]:
    """All due at once, for a client that sends the next when the last has ended."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    return [Ask(0.0, _prompt(rng, input_tokens), output_tokens) for _ in range(count)]


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Random ids, so that no prefix cache helps."""
    return _prompt(random.Random(seed), num_tokens)  # noqa: S311 - not for secrets


def poisson(seed: int, count: int, input_tokens: int, output_tokens: int, rate_per_s: float) -> list[Ask]:
    """Arrivals of a Poisson process."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    asks, at_s = [], 0.0
    for _ in range(count):
        asks.append(Ask(at_s, _prompt(rng, input_tokens), output_tokens))
        at_s += rng.expovariate(rate_per_s)
    return asks


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Random ids, so that no prefix cache helps. Below 32,000, which every vocabulary of today has."""
    return [rng.randrange(100, 32000) for _ in range(num_tokens)]
