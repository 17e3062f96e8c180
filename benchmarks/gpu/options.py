"""The command line, parsed once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from twolane.config import GpuGroups
from twolane.errors import ConfigError
from twolane.launch.values import WrongValueError, gpus, words

EXAMPLES = """\
Examples (from the checkout's folder):
  One GPU that P and D share, and one instance without a connector beside them:
    python -m benchmarks.gpu --model /models/qwen3-4b --prefill-gpu 0 --decode-gpu 0 --setups plain,cuda_ipc --together
  One GPU, one transport after the other, each against its own D asked alone:
    python -m benchmarks.gpu --model /models/qwen3-4b --prefill-gpu 0 --decode-gpu 0 --setups cuda_ipc,shm
  Two GPUs, everything at once, in nine minutes:
    python -m benchmarks.gpu --model /models/qwen3-4b --prefill-gpu 0 --decode-gpu 1 --budget-s 540 --together \\
        --setups plain,cuda_ipc,nccl,shm,nixl,aggregated
  Four GPUs, tensor parallelism 2:
    python -m benchmarks.gpu --model /models/llama-3-70b --prefill-gpu 0+1 --decode-gpu 2+3 --setups cuda_ipc
  The same transport with two settings of the connector, alternating:
    python -m benchmarks.gpu ... --setups shm,shm@slot_bytes=33554432 --together
  Instances that run already (started with --no-enable-prefix-caching):
    python -m benchmarks.gpu --proxy 127.0.0.1:10001 --decode-url 127.0.0.1:20005 --prefill-url 127.0.0.1:20003
  A try without a GPU, with the default model:
    python -m benchmarks.gpu --lengths 128,1024 --requests 4 --load-rate 0.5 --load-requests 4 --push-prompts 8
"""


@dataclass(frozen=True)
class Options:
    """`device`: cuda or cpu; None: what is installed. Lengths and outputs in tokens, `load_rate` in requests a second.

    `memory`: vLLM's --gpu-memory-utilization of each instance; None: 0.35 or less where instances share a GPU.
    `kv_gib`: KV memory of each rank, which makes it possible to start all at once; None: with `together`, enough.
    `output_alone`: tokens of an answer while requests come one at a time; None: `output`.
    """

    setups: tuple[str, ...]
    together: bool
    model: str | None
    prefill_gpu: GpuGroups
    decode_gpu: GpuGroups
    memory: float | None
    kv_gib: float | None
    device: str | None
    lengths: tuple[int, ...]
    requests: int
    warm_ups: int
    output: int
    output_alone: int | None
    load_rate: float
    load_requests: int
    load_rounds: int
    push_prompts: int
    push_blocks: int
    seed: int
    budget_s: float
    timeout_s: float
    out: Path
    port_base: int
    vllm_args: tuple[str, ...] | None
    prefill_args: tuple[str, ...]
    decode_args: tuple[str, ...]
    trace: bool
    proxy: str
    decode_url: str
    prefill_url: str
    trace_files: tuple[str, ...]
    link: Path | None
    commit: str

    @property
    def longest(self) -> int:
        return max(self.lengths)


def parse(argv: list[str] | None = None) -> Options:
    """Raises ConfigError; argparse ends the process for what it finds itself."""
    given = _parser().parse_args(argv)
    try:
        options = Options(
            **{
                **vars(given),
                "setups": tuple(name for name in given.setups.split(",") if name),
                "prefill_gpu": gpus(given.prefill_gpu) if given.prefill_gpu else (),
                "decode_gpu": gpus(given.decode_gpu) if given.decode_gpu else (),
                "lengths": tuple(int(length) for length in given.lengths.split(",")),
                "vllm_args": None if given.vllm_args is None else words(given.vllm_args),
                "prefill_args": words(given.prefill_args),
                "decode_args": words(given.decode_args),
                "trace_files": tuple(given.trace_files),
                "proxy": _address(given.proxy),
                "decode_url": _address(given.decode_url),
                "prefill_url": _address(given.prefill_url),
            }
        )
    except WrongValueError as error:
        raise ConfigError(f"an option {error}") from error
    except ValueError as error:
        raise ConfigError(f"--lengths {given.lengths}: {error}") from error
    if bool(options.proxy) != bool(options.decode_url):
        raise ConfigError("--proxy and --decode-url go together: the handoff is compared with D asked alone")
    if len(options.prefill_gpu) > 1 or len(options.decode_gpu) > 1:
        raise ConfigError("--prefill-gpu and --decode-gpu name one instance's GPUs: 0, or 0+1 for two ranks")
    return options


def _address(url: str) -> str:
    return url.removeprefix("http://").rstrip("/")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Compares ways to serve, alternating in one run; docs/GPU.md explains what and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(parser.add_argument_group("what is compared"))
    _load(parser.add_argument_group("what is asked"))
    _how(parser.add_argument_group("how it runs"))
    _attach(parser.add_argument_group("instances that run already"))
    return parser


def _what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--setups",
        default="auto",
        help="comma between them: auto, cuda_ipc, nccl, shm, tcp (1P1D with that transport), nixl, p2pnccl (1P1D with "
        "vLLM's connectors), plain (one instance without a connector), plain_graphs (one with P's CUDA graphs), "
        "aggregated (two plain ones behind the proxy). "
        "NAME@KEY=VALUE adds to kv_connector_extra_config. What this machine can't do is skipped, with the reason",
    )
    group.add_argument("--together", action="store_true", help="all setups live at once and alternate; else in turn")
    group.add_argument("--model", help="folder of the model; without a GPU the default model")
    group.add_argument("--prefill-gpu", default="", metavar="N[+N]", help="GPU of P; 0+1: two ranks")
    group.add_argument("--decode-gpu", default="", metavar="N[+N]", help="GPU of D; the same as P's is fine")
    group.add_argument("--memory", type=float, metavar="SHARE", help="--gpu-memory-utilization of each instance")
    group.add_argument(
        "--kv-gib",
        type=float,
        metavar="GIB",
        help="KV memory of each instance, so that all start at the same time (default with --together: six of the "
        "longest prompts; --memory instead: one setup starts after the other)",
    )
    group.add_argument("--device", choices=("cuda", "cpu"), help="default: cpu where there is no GPU")


def _load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lengths", default="1024,8192", help="prompt tokens (default 1024,8192)")
    group.add_argument("--requests", type=int, default=30, help="per length and path, one at a time (default 30)")
    group.add_argument("--warm-ups", type=int, default=3, help="not counted, before those (default 3, also the least)")
    group.add_argument("--output", type=int, default=64, help="tokens of an answer (default 64)")
    group.add_argument("--output-alone", type=int, help="the same while requests come one at a time (default: as many)")
    group.add_argument("--load-rate", type=float, default=3.0, help="longest prompts a second; 0: no load (default 3)")
    group.add_argument("--load-requests", type=int, default=30, help="in one round of load (default 30)")
    group.add_argument("--load-rounds", type=int, default=2, help="rounds of load a path (default 2)")
    group.add_argument("--push-prompts", type=int, default=32, help="a block of P's throughput (default 32; 0: none)")
    group.add_argument("--push-blocks", type=int, default=4, help="with handoff, as many without (default 4)")
    group.add_argument("--seed", type=int, default=1)


def _how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--budget-s", type=float, default=1800.0, help="hard bound of the whole run (default 1800)")
    group.add_argument("--timeout-s", type=float, default=120.0, help="of one request (default 120)")
    group.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for JSON, logs and traces")
    group.add_argument("--port-base", type=int, default=24000, help="40 ports a setup from here on (default 24000)")
    group.add_argument("--vllm-args", help="in place of '--max-num-batched-tokens 8192' (GPUs)")
    group.add_argument("--prefill-args", default="", help="more vLLM options for P")
    group.add_argument("--decode-args", default="", help="more vLLM options for D")
    group.add_argument("--no-trace", dest="trace", action="store_false", help="no stage table, no trace files")
    group.add_argument("--link", type=Path, metavar="FILE", help="of `benchmarks.transport --out FILE`, for the table")
    group.add_argument("--commit", default="", help="what to call this version where there is no git")


def _attach(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--proxy", default="", metavar="HOST:PORT", help="TwoLane's proxy; no setup is started then")
    group.add_argument("--decode-url", default="", metavar="HOST:PORT", help="D, to be asked alone")
    group.add_argument("--prefill-url", default="", metavar="HOST:PORT", help="P, for its throughput")
    group.add_argument(
        "--trace-file", dest="trace_files", action="append", default=[], metavar="FILE", help="of a worker; repeatable"
    )
