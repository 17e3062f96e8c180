"""What a token adds to an answer's text is the same, whether its stream was primed with the whole prompt or its end."""

from __future__ import annotations

import importlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from twolane.connector.first_text import KEPT_TOKENS, decode_prompt_ends_only

tokenizers = pytest.importorskip("tokenizers")
TEXT = "Grüße aus 東京, 🚀 and plain words; straße, naïve, 한국어, עברית, emoji 👩‍👩‍👧 end. " * 40
SPECIAL = "<|end|>"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers' own class is back afterwards."""
    decoders = importlib.import_module("tokenizers.decoders")
    monkeypatch.setattr(decoders, "DecodeStream", decoders.DecodeStream)


def byte_level() -> Any:
    """Bytes, as GPT's, Llama 3's and Qwen's: a character may be several tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[SPECIAL])
    made.train_from_iterator([TEXT], trainer)
    return made


def sentence_piece() -> Any:
    """Words with their spaces, the first of which is taken off, as Llama 2's and Mistral's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=[SPECIAL, *fallback])
    made.train_from_iterator([TEXT[: len(TEXT) // 2]], trainer)
    return made


def streams(tokenizer: Any, prompt: list[int], answer: list[int]) -> list[str | None]:
    """As vLLM makes one and steps it."""
    stream = importlib.import_module("tokenizers.decoders").DecodeStream(ids=prompt, skip_special_tokens=True)
    return [stream.step(tokenizer, token) for token in answer]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("ends_in_specials", [False, True])
def test_the_text_is_the_same(make: Any, ends_in_specials: bool) -> None:
    """Of prompts that end with a character: behind half of one tokenizers puts the whole prompt into the answer."""
    tokenizer, rng = make(), random.Random(1)
    ids = tokenizer.encode(TEXT).ids
    template = [tokenizer.token_to_id(SPECIAL)] * 3 if ends_in_specials else []
    cases = []
    for _ in range(300):
        cut, length = rng.randrange(1, len(ids)), rng.randrange(1, 40)
        if not tokenizer.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}"):
            cases.append((ids[:cut] + template, (ids[cut:] + ids)[:length]))
    wanted = [streams(tokenizer, *case) for case in cases]
    decode_prompt_ends_only()
    assert [streams(tokenizer, *case) for case in cases] == wanted
    assert sum(len(prompt) > KEPT_TOKENS for prompt, _ in cases) > 100


def test_only_the_end_of_a_prompt_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    decoders = importlib.import_module("tokenizers.decoders")
    monkeypatch.setattr(decoders, "DecodeStream", lambda **kwargs: got.append(kwargs))
    decode_prompt_ends_only()
    decode_prompt_ends_only()
    decoders.DecodeStream(ids=list(range(10_000)), skip_special_tokens=True)
    decoders.DecodeStream(ids=[7])
    decoders.DecodeStream()
    assert [kwargs["ids"] for kwargs in got] == [list(range(10_000 - KEPT_TOKENS, 10_000)), [7], None]
    assert [kwargs["skip_special_tokens"] for kwargs in got] == [True, False, False]


def test_vllm_takes_what_the_module_has() -> None:
    """Where a release looks elsewhere, the replacement does nothing, and this says so."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("needs vLLM")
    source = Path(vllm.origin).parent.joinpath("v1/engine/detokenizer.py").read_text()
    assert "tokenizers.decoders.DecodeStream(" in source
    assert "import DecodeStream" not in source
