"""The text of an answer's first token without the whole prompt's.

vLLM's API server primes a request's DecodeStream (of the library tokenizers) with all of the prompt's ids, and the
first token's step decodes them twice: 5.3 ms for 8,192 tokens, in which no other stream's tokens go out either
(docs/LOG.md). What a token adds to the text depends on the few before it, so the stream gets those alone. vLLM looks
the class up in its module for each request, so that it can be replaced there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A character is 4 tokens at most where tokens are bytes; the rest is for special tokens, of which a template may put a
# row before the answer, and which have no text.
KEPT_TOKENS = 256


def decode_prompt_ends_only() -> None:
    """In this process, from now on. Idempotent."""
    from tokenizers import decoders  # noqa: PLC0415 - vLLM's own; workers have no need of it

    whole = decoders.DecodeStream
    if getattr(whole, "keeps_end_only", False):
        return

    def stream(ids: Sequence[int] | None = None, skip_special_tokens: bool = False) -> Any:
        end = None if ids is None else list(ids[-KEPT_TOKENS:])
        return whole(ids=end, skip_special_tokens=skip_special_tokens)

    stream.keeps_end_only = True  # type: ignore[attr-defined]
    vars(decoders)["DecodeStream"] = stream
