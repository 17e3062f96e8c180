"""Pure: what instances are told by their command lines, as far as the lanes depend on it."""

from __future__ import annotations

from collections.abc import Sequence

from twolane.errors import ConfigError


def option(argv: Sequence[str], *names: str) -> str | None:
    """What a command line says last about an option; both spellings, `--x 1` and `--x=1`."""
    found = None
    for word, following in zip(argv, (*argv[1:], ""), strict=False):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else following
    return found


def tensor_parallel_size(argv: Sequence[str]) -> str:
    return option(argv, "--tensor-parallel-size", "-tp") or "1"


def check_lanes(instances: dict[str, Sequence[str]]) -> None:
    """`instances`: name -> command line. ConfigError for options with which no KV can cross from P to D."""
    for name, argv in instances.items():
        if (option(argv, "--pipeline-parallel-size", "-pp") or "1") != "1":
            raise ConfigError(f"{name}: the lanes do no pipeline parallelism: use --tensor-parallel-size instead")
        if option(argv, "--speculative-config", "-sc") is not None:
            raise ConfigError(f"{name}: the lanes do no speculative decoding: leave --speculative-config out")
    widths = {name: tensor_parallel_size(argv) for name, argv in instances.items()}
    if len(set(widths.values())) > 1:
        what = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ConfigError(
            f"P and D need equal tensor parallelism, but it is {what}: pass the same --tensor-parallel-size to all, in "
            "TWOLANE_VLLM_ARGS, or the same number of GPUs an instance"
        )
