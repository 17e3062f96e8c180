"""`twolane proxy` under the name that the recipe's users look for with ps and pgrep -f; `up` starts it by this one."""

from __future__ import annotations

import sys

from twolane.cli import main


def run() -> None:
    """Never returns; see cli.main."""
    sys.argv.insert(1, "proxy")
    main()


if __name__ == "__main__":
    run()
