"""One command that compares ways to serve a model on this machine's GPUs; see docs/GPU.md. The last line is JSON.

The physics: through two lanes a first token waits for P's prefill, for what of the KV has not crossed yet when the
last layer is computed, for word of it, and for one step of D. D asked alone computes the same prompt with the same
kernels, so the difference of the two TTFTs, taken in turns, is the price of the handoff.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from typing import NoReturn

from benchmarks.gpu.options import parse
from benchmarks.gpu.record import Results
from benchmarks.gpu.run import Run
from benchmarks.gpu.saved import finish
from rich.console import Console

from twolane.bench.service import undisturbed
from twolane.errors import ConfigError, TwoLaneError

WIDTH = 170  # where there is no terminal to ask


def main() -> NoReturn:
    began_s = time.monotonic()
    # Whoever starts this in the background of a shell has it ignore Ctrl+C; and SIGTERM is to end it as orderly.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    progress = Console(stderr=True, highlight=False, markup=False)
    results = Results()
    code = 0
    try:
        options = parse()
    except ConfigError as error:
        progress.print(f"{error}")
        sys.exit(2)
    with ExitStack() as running:
        try:
            Run(options, results, progress, began_s, running).run()
        except TwoLaneError as error:
            results.note(f"ended early: {error}")
            code = 1
        except KeyboardInterrupt:
            results.note("interrupted")
            code = 130
        with undisturbed():
            finish(options, results, console)
    sys.exit(code)


if __name__ == "__main__":
    main()
