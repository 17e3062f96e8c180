"""`twolane proxy` under the name that the recipe's scripts look for with ps and pkill."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from twolane.disagg_prefill_proxy_server import run
    except ImportError:
        own = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
        if not own.exists() or Path(sys.executable) == own:
            sys.exit("twolane: TwoLane is not installed for this Python: run `make up`, or use .venv/bin/python")
        os.execv(own, [str(own), *sys.argv])  # noqa: S606 - the same script with the Python that has TwoLane
    run()
