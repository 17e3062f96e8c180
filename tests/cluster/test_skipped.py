"""Where namespaces aren't allowed, the tests of hosts are skipped, and say why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=why_not())]
MAKE_NOTHING = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
SELF = Path(__file__)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs the program setpriv")
def test_without_the_right_to_make_namespaces_they_are_skipped_with_the_reason() -> None:
    folders = [str(SELF.parent), str(SELF.parent.parent / "network")]
    pytest_words = ["-m", "pytest", "-m", "cluster", "-rs", "-p", "no:cacheprovider", *folders]
    done = subprocess.run(
        [*MAKE_NOTHING, sys.executable, *pytest_words],
        cwd=SELF.parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    last = done.stdout.splitlines()[-1]
    assert (done.returncode, " skipped" in last, " passed" in last, "failed" in last) == (0, True, False, False), last
    assert "needs root, for network namespaces" in done.stdout
