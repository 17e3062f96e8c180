"""The files in observability/: whatever they ask for is really there, at a running proxy."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import promql_parser
import pytest
from tests.proxy.pages import ENGINE_PAGE, Scrape, scrape, tell_engine_page
from tests.proxy.scripted import cluster, eventually

FOLDER = Path(__file__).parents[2] / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_bytes())
PROMETHEUS = FOLDER / "prometheus.yml"
# Of GPUs, which the machines of these tests have not; twolane.power makes them where there are some.
GPU_METRICS = {
    "twolane_gpu_power_watts": {"uuid", "gpu", "lane"},
    "twolane_gpu_energy_joules_total": {"uuid", "gpu", "lane"},
}
BY_PROMETHEUS = {"job", "instance", "le"}
UNITS = {"reqps", "percentunit", "short", "s", "none", "Bps", "ops", "watt", "joule"}  # or suffix:...


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def targets() -> Iterator[tuple[str, str, str]]:
    """Panel, expression with Grafana's variables filled in, legend."""
    for panel in panels():
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", "1m").replace("$job", ".*").replace("$name", ".*")
            assert "$" not in expr, f"{panel['title']}: an unknown variable"
            yield panel["title"], expr, target["legendFormat"]


def parts(node: Any) -> Iterator[Any]:
    """A PromQL expression and all in it."""
    yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for child in (*children, *(getattr(node, "args", None) or ())):
        if child is not None:
            yield from parts(child)


async def full_scrape() -> Scrape:
    """A page with every metric that there can be: engines told twice, something was decoded alone."""
    async with cluster(engines_watched_every_s=0.0) as c:
        c.d.tell = c.p.tell = tell_engine_page
        await c.complete(n=2)
        await c.complete(stream=True)
        await scrape(c)
        return await scrape(c)


async def test_all_that_the_dashboard_asks_for_exists() -> None:
    page = await full_scrape()
    labels: dict[str, set[str]] = {name: set(known) for name, known in GPU_METRICS.items()}
    for sample in page.samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    num_asked = 0
    for title, text, legend in targets():
        nodes = list(parts(promql_parser.parse(text)))
        selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]
        assert selectors, title
        known: set[str] = set(BY_PROMETHEUS)
        for selector in selectors:
            num_asked += 1
            assert selector.name in labels, f"{title}: nothing exports {selector.name}"
            known |= labels[selector.name]
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= labels[selector.name] | BY_PROMETHEUS, f"{title}: {selector.name} has no such label"
        for node in nodes:
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                assert set(node.modifier.labels) <= known, f"{title}: grouped by a label that isn't there"
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known, f"{title}: its legend names no label"
    assert num_asked > 40


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_complain_about() -> None:
    page = (await full_scrape()).text
    promtool = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )
    complaints, _ = await promtool.communicate(page.encode())
    assert (promtool.returncode, complaints) == (0, b"")


async def test_values_that_the_dashboard_selects_by_exist() -> None:
    """A misspelt lane or outcome would show an empty panel, not an error."""
    page = await full_scrape()
    values: dict[tuple[str, str], set[str]] = {}
    for sample in page.samples:
        for label, value in sample.labels.items():
            values.setdefault((sample.name, label), set()).add(value)
    for title, text, _ in targets():
        for node in parts(promql_parser.parse(text)):
            if not isinstance(node, promql_parser.VectorSelector) or node.name in GPU_METRICS:
                continue
            for matcher in node.matchers.matchers:
                if matcher.value != ".*":
                    wanted = set(matcher.value.split("|"))
                    assert wanted <= values[str(node.name), matcher.name], f"{title}: no {matcher.name} {matcher.value}"


def test_counters_are_rated_and_quantiles_are_of_buckets() -> None:
    for title, text, _ in targets():
        for node in parts(promql_parser.parse(text)):
            if isinstance(node, promql_parser.Call) and node.func.name == "rate":
                (selector,) = (s for s in parts(node) if isinstance(s, promql_parser.VectorSelector))
                assert str(selector.name).endswith(("_total", "_bucket", "_sum", "_count")), title
        bare = re.sub(r"rate\([^\[]*\[1m\]\)", "", text)
        assert not re.search(r"_(total|bucket)\b", bare), f"{title}: a counter without rate()"


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    (datasource,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert (datasource["name"], datasource["query"]) == ("datasource", "prometheus")
    assert {v["name"] for v in DASHBOARD["templating"]["list"]} == {"datasource", "job", "name"}
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"]
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["title"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or unit.startswith("suffix:"), panel["title"]
        uids = {part["datasource"]["uid"] for part in (panel, *panel["targets"])}
        assert uids == {"${datasource}"}, panel["title"]
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(ref_ids) == len(set(ref_ids))


def test_panels_lie_in_24_columns_and_over_no_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        at = panel["gridPos"]
        assert at["w"] > 0
        assert at["h"] > 0
        assert 0 <= at["x"] <= at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken.get((x, y))}"
                taken[x, y] = panel["title"]


# What of Prometheus' configuration the example uses: docs of prometheus.io, "Configuration". Anything else is an error.
class Authorization(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["Bearer"]
    credentials_file: str


class Relabel(msgspec.Struct, forbid_unknown_fields=True):
    target_label: str
    source_labels: list[str] = []
    replacement: str = "$1"

    def apply(self, labels: dict[str, str]) -> None:
        """Action `replace`, with the regular expression that matches all."""
        value = ";".join(labels.get(name, "") for name in self.source_labels)
        labels[self.target_label] = self.replacement.replace("$1", value)


class Targets(msgspec.Struct, forbid_unknown_fields=True):
    targets: list[str]


class Job(msgspec.Struct, forbid_unknown_fields=True):
    job_name: str
    static_configs: list[Targets]
    authorization: Authorization | None = None
    relabel_configs: list[Relabel] = []

    def urls(self) -> list[str]:
        urls = []
        for target in (target for static in self.static_configs for target in static.targets):
            labels = {"__address__": target, "__metrics_path__": "/metrics"}
            for relabel in self.relabel_configs:
                relabel.apply(labels)
            urls.append(f"http://{labels['__address__']}{labels['__metrics_path__']}")
        return urls


class Global(msgspec.Struct, forbid_unknown_fields=True):
    scrape_interval: str
    scrape_timeout: str


class Config(msgspec.Struct, forbid_unknown_fields=True, rename={"global_": "global"}):
    global_: Global
    scrape_configs: list[Job]


def with_key(text: str) -> str:
    """As it is for a proxy with keys: uncommented where it says so."""
    return re.sub(r"^    # (authorization:|  \w+: .*)$", r"    \1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("keyed", [False, True])
def test_the_scrape_example_is_what_prometheus_understands(keyed: bool, tmp_path: Path) -> None:
    text = PROMETHEUS.read_text()
    text = with_key(text) if keyed else text
    config = msgspec.yaml.decode(text, type=Config)
    assert [job.job_name for job in config.scrape_configs] == ["twolane", "twolane-engines"]
    assert [job.authorization is not None for job in config.scrape_configs] == [keyed, keyed]
    promtool = shutil.which("promtool")
    if promtool is not None:
        (tmp_path / "prometheus.yml").write_text(text)
        command = [promtool, "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
        subprocess.run(command, check=True, timeout=60)


async def test_the_scrape_example_reads_the_proxy_and_the_engines_by_name() -> None:
    config = msgspec.yaml.decode(PROMETHEUS.read_bytes(), type=Config)
    proxy, engines = (job.urls() for job in config.scrape_configs)
    async with cluster() as c:
        c.d.tell = c.p.tell = tell_engine_page
        c.p.register(c.service.discovery_port, name="prefill")
        c.d.register(c.service.discovery_port, name="decode")
        await eventually(lambda: {i.name for i in c.service.pool} == {"prefill", "decode"})
        here = [url.replace("http://127.0.0.1:10001", c.url) for url in (*proxy, *engines)]
        assert not any(":10001/" in url for url in here)
        pages = [await c.http.get(url) for url in here]
        assert [page.status_code for page in pages] == [200, 200, 200]
        assert Scrape(pages[0].text).value("build_info") == 1
        assert pages[1].content == pages[2].content == ENGINE_PAGE
