"""The checker notices what would not work."""

from __future__ import annotations

import pytest

from tests.docs.lines import WrongLineError, check
from tests.docs.pages import ROOT, Page
from twolane.errors import TwoLaneError

KV = '{"kv_connector": "TwoLaneConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'


@pytest.mark.parametrize(
    "line",
    [
        "twolane upp",
        "twolane up --prefil 2",
        "twolane up --policy best",
        "PREFIL_GPU=0 twolane up",
        "PREFILL_GPU=0 DECODE_GPU=1+2 twolane up",
        "twolane up --prefill 9 --decode 9 --model /m",
        "twolane prefill -- --max-num-sequences 64",
        "twolane proxy --prefill http://127.0.0.1",
        "cd x && twolane statsu",
        "twolane status | jqq .",
        "vllm bench serve --random-input-length 5",
        f"vllm serve m --kv-transfer-config '{KV}'",
        "python -m benchmarks.gpu --setup plain",
        "python no_such_file.py",
        "make upp",
        "./no_such_file.sh",
        "curl http://localhost:10001/v1/completion",
        "curl http://localhost:10001/v1/completions -d '{\"model\": }'",
        "curl",
        "nobody-knows-me --help",
    ],
)
def test_a_wrong_line_is_noticed(line: str) -> None:
    with pytest.raises((WrongLineError, TwoLaneError, ValueError)):
        check(line)


def test_blocks_are_read_with_their_options() -> None:
    text = "<!-- run: cpu; expect: a|b -->\n```sh\none \\\n  two # why\n\nthree\n```\n\n```text\nx\n```\n"
    shell, plain = Page(ROOT / "README.md", text).blocks
    assert (shell.run, shell.options["expect"], shell.lines) == ("cpu", "a|b", ["one   two", "three"])
    assert (plain.language, plain.options) == ("text", {})


def test_anchors_are_those_of_github() -> None:
    page = Page(ROOT / "README.md", "# How many P, how many D\n\n## TwoLane's `proxy`\n")
    assert page.anchors == {"how-many-p-how-many-d", "twolanes-proxy"}
