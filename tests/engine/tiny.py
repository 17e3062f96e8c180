"""Models of other shapes than the default one, tiny, with random weights, made on the spot.

    python -m tests.engine.tiny NAME SOURCE FOLDER      SOURCE: a model's folder, for its tokenizer

The weights are spread so widely that every token depends on the whole prompt: a wrong KV cache shows at once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SPREAD = 0.25  # initializer_range; transformers' default of 0.02 answers the same to any prompt
VOCAB = 49152  # SmolLM2's
WINDOW = 64

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

# Name -> (transformers' model, its configuration, what differs from SHAPE)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", "LlamaConfig", {}),
    "sliding": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "mixed": (
        "Exaone4ForCausalLM",
        "Exaone4Config",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2, "layer_types": ALTERNATING},
    ),
    "mla": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            "initializer_range": 0.08,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "first_k_dense_replace": 4,
            "head_dim": 64,
        },
    ),
    "hybrid": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_ff_dim": 512,
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 256,
            "block_dim": 256,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 16}),
}


def make(name: str, source: Path, folder: Path) -> Path:
    """Writes the model into `folder`, in a process of its own: torch and transformers warn when they are imported."""
    command = [sys.executable, "-m", "tests.engine.tiny", name, str(source), str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    return folder


def main(name: str, source: Path, folder: Path) -> None:
    import torch
    import transformers

    model_class, config_class, changes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**SHAPE | changes))
    model.float().save_pretrained(folder)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
