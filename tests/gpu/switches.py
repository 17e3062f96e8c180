"""What the environment says to these tests. Taken out of it: TwoLane would call it a slip of the pen."""

from __future__ import annotations

import os

ON_CPU = bool(os.environ.pop("TWOLANE_TEST_CPU", ""))  # the same tests without a GPU: for work on them
MODEL = os.environ.pop("TWOLANE_GPU_MODEL", "")  # a folder
REQUESTS = int(os.environ.pop("TWOLANE_GPU_REQUESTS", "100" if ON_CPU else "2000"))  # of which a fifth is given up
