"""Models whose KV is of another shape than the default one's: they work, or the start says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import tiny
from tests.engine.conftest import make_prompts
from tests.engine.stack import (
    START_TIMEOUT_S,
    Stack,
    complete,
    completion_body,
    difference,
    make_test_plan,
    on_port,
    wait_for,
    without_connector,
)
from tests.ports import free_ports
from twolane.launch.diagnose import diagnose
from twolane.launch.process import Child, last_lines

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

LENGTHS = [1, 62, 63, 64, 65, 128, 512, 1000]  # around the window, the block and the chunk
NUM_TOKENS = 12
MORE_ARGS = {"mla": ("--attention-backend", "CPU_MLA")}  # the other one, for AMX, knows no float32


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_test_plan(tmp_path_factory.mktemp("none")).model.source)


@pytest.fixture
def shaped(request: pytest.FixtureRequest, tokenizer: Path, tmp_path: Path) -> Iterator[Stack]:
    """1P1D of the model that the test names, not started."""
    model = tiny.make(request.param, tokenizer, tmp_path / request.param)
    made = Stack(make_test_plan(tmp_path, model=str(model)))
    yield made
    made.stop()


# Every second layer looks back 64 tokens only.
@pytest.mark.parametrize("shaped", ["mixed"], indirect=True)
def test_tokens_equal_a_single_instances_and_d_computed_one_of_each_prompt(shaped: Stack) -> None:
    http_port, kv_port = free_ports(2)
    single = without_connector(on_port(shaped.spec("prefill"), "single", http_port=http_port, kv_port=kv_port))
    shaped.start(shaped.spec("prefill"), shaped.spec("decode"), single)
    prompts = make_prompts(31, LENGTHS)
    expected = [complete(f"http://{single.address}", completion_body(shaped, one, NUM_TOKENS)) for one in prompts]
    assert len({tuple(answer) for answer in expected}) == len(prompts), "the answers hang on the prompts"
    decode = shaped.instances["decode"]
    computed = decode.tokens_by_source()
    assert [complete(shaped.url, completion_body(shaped, one, NUM_TOKENS)) for one in prompts] == expected
    assert difference(decode.tokens_by_source(), computed) == {
        "local_compute": len(prompts),
        "local_cache_hit": 0,
        "external_kv_transfer": sum(LENGTHS) - len(prompts),
    }


def test_what_cannot_be_moved_is_refused_with_a_reason(tokenizer: Path, tmp_path: Path) -> None:
    """All start at once; each ends by itself, and its log says why and what to do instead."""
    reasons = {
        "sliding": "start with --disable-sliding-window",
        "mla": "latent vectors (MLA)",
        "mamba": "state-space layers, which TwoLaneConnector can't move: serve it without lanes",
        "hybrid": "several kinds (state-space beside attention, for example)",
    }
    specs = {}
    for name in reasons:
        model = tiny.make(name, tokenizer, tmp_path / "models" / name)
        specs[name] = make_test_plan(tmp_path / name, *MORE_ARGS.get(name, ()), model=str(model)).instances()[0]
    children = {name: Child(spec, {}) for name, spec in specs.items()}
    try:
        wait_for("all to end", lambda: None not in [c.exit_code() for c in children.values()], START_TIMEOUT_S)
    finally:
        for child in children.values():
            child.stop(10.0)
    for name, reason in reasons.items():
        assert reason in diagnose(last_lines(Path(specs[name].log), 400)), name
