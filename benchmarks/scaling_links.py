"""KV bytes against link speeds: when does a link hide the transfer behind the prefill, and when doesn't it?

The physics: P sends each layer's KV while it computes the next ones, so what counts is KV bytes a second while it
computes, not the prompt's bytes. KV a token = 2 x layers x KV heads x head size x bytes a value. Computing costs
2 x parameters FLOP a token, and 2 x layers x heads x head size x length for attention (causal), so a long prompt makes
its KV *slower*, and its need of a link smaller. A link that carries the rate leaves one layer after the last; one that
doesn't leaves bytes / link - prefill.

Measured is one time, Qwen3-4B's on one H200 (docs/LOG.md); all others are that one times the ratio of FLOP over the
ratio of GPUs, and everything about links is division. Nothing here ran over RDMA.

    python -m benchmarks.scaling_links                      tables as in docs/SCALING.md
    python -m benchmarks.scaling_links --usable 0.5         of the link's line rate
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

LINKS_GBIT = (25, 100, 400)
LENGTHS = (1024, 8192, 32_768, 131_072)
CHUNK = 8192  # tokens of a forward pass: --max-num-batched-tokens
USABLE = 0.8  # of a link's line rate; assumed
TCP_GB_PER_S = (0.46, 0.58)  # transport `tcp`, measured on two busy cores over loopback (docs/LOG.md)


@dataclass(frozen=True)
class Model:
    """`parameters` without the embeddings, which cost a lookup; `num_gpus` P has, taken as so many times as fast."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    num_gpus: int
    value_bytes: int = 2

    @property
    def kv_bytes_a_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * self.value_bytes

    def flop(self, num_tokens: int) -> float:
        attention = 2.0 * self.layers * self.heads * self.head_size * num_tokens**2
        return 2.0 * self.parameters * num_tokens + attention


QWEN3_4B = Model("Qwen3-4B", 3.6e9, 36, 32, 8, 128, 1)
MODELS = (
    QWEN3_4B,
    Model("Qwen3-4B, KV in 8 bits", 3.6e9, 36, 32, 8, 128, 1, value_bytes=1),
    Model("Llama-3.1-8B", 7.0e9, 32, 32, 8, 128, 1),
    Model("Qwen3-32B", 31.2e9, 64, 64, 8, 128, 2),
    Model("Llama-3.1-70B", 68.5e9, 80, 64, 8, 128, 4),
    Model("Llama-3.1-70B, KV in 8 bits", 68.5e9, 80, 64, 8, 128, 4, value_bytes=1),
    Model("Qwen2.5-72B", 70.0e9, 80, 64, 8, 128, 4),
)
# One H200, vLLM 0.26.0, Qwen3-4B in bf16, 8,192 tokens: the whole TTFT (about 131 ms of it are the engine's).
MEASURED_TOKENS, MEASURED_S = 8192, 0.145
FLOP_PER_S = QWEN3_4B.flop(MEASURED_TOKENS) / MEASURED_S


@dataclass(frozen=True)
class Need:
    """What one prompt asks of a link."""

    model: Model
    num_tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.model.kv_bytes_a_token * self.num_tokens

    @property
    def prefill_s(self) -> float:
        return self.model.flop(self.num_tokens) / FLOP_PER_S / self.model.num_gpus

    @property
    def hiding_gb_per_s(self) -> float:
        """The sustained rate at which P makes KV: a link that carries it hides the transfer."""
        return self.kv_bytes / self.prefill_s / 1e9

    def rest_s(self, link_gb_per_s: float) -> float:
        """From the last layer computed to the last byte there, if the link has nothing else to do: the last layer of
        the last chunk, or all that the link hasn't kept up with since the first layer of the first."""
        last_bytes = self.model.kv_bytes_a_token * min(self.num_tokens, CHUNK) / self.model.layers
        first_s = self.prefill_s / self.model.layers / max(1.0, self.num_tokens / CHUNK)
        return max(last_bytes / link_gb_per_s / 1e9, self.kv_bytes / link_gb_per_s / 1e9 - (self.prefill_s - first_s))


def link_gb_per_s(gbit: float, usable: float = USABLE) -> float:
    return gbit / 8 * usable


def rates_table() -> list[str]:
    """Gbit/s at which each model makes KV, by length, with what one prompt is."""
    lines = ["| model | GPUs of P | KiB a token |" + "".join(f" {length:,} tokens |" for length in LENGTHS)]
    lines.append("|---|---|---|" + "---|" * len(LENGTHS))
    for model in MODELS:
        needs = [Need(model, length) for length in LENGTHS]
        cells = [f"**{n.hiding_gb_per_s * 8:.0f}** ({n.kv_bytes / 1e9:.2f} GB in {in_s(n.prefill_s)})" for n in needs]
        kib = model.kv_bytes_a_token // 1024
        lines.append(f"| {model.name} | {model.num_gpus} | {kib} | " + " | ".join(cells) + " |")
    return lines


def rest_table(usable: float) -> list[str]:
    """What is left after the last layer, in ms, by link and length."""
    tcp = sum(TCP_GB_PER_S) / len(TCP_GB_PER_S)
    links = [(f"{gbit} Gbit/s", link_gb_per_s(gbit, usable)) for gbit in LINKS_GBIT] + [("`tcp`", tcp)]
    lines = ["| model | tokens |" + "".join(f" {name} |" for name, _ in links)]
    lines.append("|---|---|" + "---|" * len(links))
    for model in MODELS:
        for length in LENGTHS:
            cells = [in_ms(Need(model, length).rest_s(link)) for _, link in links]
            lines.append(f"| {model.name} | {length:,} | " + " | ".join(cells) + " |")
    return lines


def in_s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"


def in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.01 else f"{seconds * 1e3:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--usable", type=float, default=USABLE, help="share of a link's line rate")
    args = parser.parse_args()
    print("\n".join([*rates_table(), "", *rest_table(args.usable)]))


if __name__ == "__main__":
    main()
