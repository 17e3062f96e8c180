"""GGUF file -> checkpoint folder. Run as a process of its own, `python -m twolane.launch.convert GGUF FOLDER DTYPE`.

The only file of the launcher that imports torch and transformers, which takes seconds and gigabytes: see model.py.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes weights, config, generation config (it ends a chat), tokenizer and chat template into `folder`."""
    import torch  # noqa: PLC0415 - see above
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - see above

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
