"""Power through a real proxy, with NVIDIA's library replaced at its seam, and where there is none."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.power.fake_nvml import UUIDS, FakeGpu, FakeNvml, no_driver
from tests.power.test_sampler import burning
from tests.proxy.scripted import Call, Cluster, answer, cluster, eventually

from twolane.config import ProxySettings
from twolane.errors import ConfigError
from twolane.power import read_csv
from twolane.power.report import PowerCollector
from twolane.proxy.service import Service

P_GPU, D_GPU = UUIDS


def register(c: Cluster, prefill_gpus: list[str], decode_gpus: list[str]) -> None:
    for instance, name, gpus in ((c.p, "prefill", prefill_gpus), (c.d, "decode", decode_gpus)):
        instance.register(c.service.discovery_port, name=name, gpus=gpus)


async def power_of(c: Cluster, lanes: list[str]) -> Any:
    """As soon as the GPUs are in these lanes."""
    while True:
        stats = await c.stats()
        if [gpu["lane"] for gpu in stats.get("power", {"gpus": []})["gpus"]] == lanes:
            return stats["power"]


async def test_stats_tell_each_gpus_power_and_each_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(burning(100), burning(300, D_GPU)).install(monkeypatch)
    async with cluster() as c:
        with c.service.power.sampler.watched():
            register(c, [P_GPU], [D_GPU])
            power = await power_of(c, ["prefill", "decode"])
            assert power["every_s"] == 0.1
            assert power["update_s"] is None
            joules = [gpu.pop("joules") for gpu in power["gpus"]]
            assert all(each >= 0 for each in joules)
            assert power["gpus"] == [
                {"uuid": P_GPU, "index": 0, "name": "Fake GPU", "watts": 100.0, "lane": "prefill"}
                | {"instances": ["prefill"]},
                {"uuid": D_GPU, "index": 1, "name": "Fake GPU", "watts": 300.0, "lane": "decode"}
                | {"instances": ["decode"]},
            ]
            assert set(power["lanes"]) == {"prefill", "decode"}
            assert set(power["lanes"]["prefill"]) == {"watts", "joules"}, "no tokens are known"
            assert power["lanes"]["decode"]["watts"] == 300.0
    assert not any(thread.name.startswith("twolane-power") for thread in threading.enumerate())


async def test_a_shared_gpu_is_of_both_lanes_and_one_that_nobody_names_of_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeNvml(FakeGpu(P_GPU), FakeGpu(D_GPU)).install(monkeypatch)
    async with cluster(power_every_s=0.01) as c:
        with c.service.power.sampler.watched():
            register(c, [P_GPU], [P_GPU])
            power = await power_of(c, ["both", "other"])
            assert sorted(power["gpus"][0]["instances"]) == ["decode", "prefill"]
            assert power["lanes"]["both"]["watts"] == 100.0
            assert "other" not in power["lanes"]
            c.p.register(c.service.discovery_port, epoch="second", gpus=[D_GPU])
            await power_of(c, ["decode", "prefill"])


@dataclass
class Numbers:
    prompt_tokens: float
    generated_tokens: float


async def test_joules_a_token_come_from_the_engines_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(burning(100), burning(300, D_GPU)).install(monkeypatch)
    async with cluster(power_every_s=0.01) as c:
        numbers = Numbers(1_000, 50)
        monkeypatch.setattr(c.service.power, "_numbers_of", lambda _instance: numbers)
        with c.service.power.sampler.watched():
            register(c, [P_GPU], [D_GPU])
            await power_of(c, ["prefill", "decode"])
            numbers = Numbers(1_500, 60)

            while "joules_per_generated_token" not in (lanes := (await c.stats())["power"]["lanes"])["decode"]:
                pass
            assert lanes["prefill"]["joules_per_prompt_token"] > 0
            families = scrape(c)
        assert families["twolane_lane_counted_tokens"] == {("prefill",): 500, ("decode",): 10}
        assert families["twolane_lane_counted_energy_joules"]["prefill",] > 0


def scrape(c: Cluster) -> dict[str, dict[tuple[str, ...], float]]:
    registry = prometheus_client.CollectorRegistry()
    registry.register(PowerCollector(c.service.power.latest))
    text = prometheus_client.generate_latest(registry).decode()
    return {
        family.name: {tuple(v for _, v in sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


async def test_prometheus_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(burning(100), burning(300, D_GPU)).install(monkeypatch)
    async with cluster(power_every_s=0.01) as c:
        with c.service.power.sampler.watched():
            register(c, [P_GPU], [D_GPU])
            await power_of(c, ["prefill", "decode"])
            families = scrape(c)
    assert families["twolane_gpu_power_watts"] == {("0", "prefill", P_GPU): 100, ("1", "decode", D_GPU): 300}
    assert set(families["twolane_gpu_energy_joules"]) == {("0", "prefill", P_GPU), ("1", "decode", D_GPU)}
    assert {("prefill",), ("decode",)} <= set(families["twolane_lane_energy_joules"])
    assert families["twolane_lane_counted_tokens"] == {}


async def test_without_nvml_nothing_is_told_and_one_line_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", no_driver())
    caplog.set_level(logging.INFO)
    path = tmp_path / "power.csv"
    async with cluster(power_csv=path, power_every_s=0.01) as c:
        assert not c.service.power.sampler.wait_decided(30)
        assert (await c.complete()).status_code == 200
        assert "power" not in await c.stats()
        assert scrape(c) == {}
    assert len([record for record in caplog.records if "power" in record.name]) == 1
    assert path.read_bytes() == b""


async def test_the_series_has_the_lanes_phases_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeNvml(burning(100), burning(300, D_GPU)).install(monkeypatch)
    path = tmp_path / "power.csv"
    async with cluster(power_csv=path, power_every_s=0.01) as c:
        register(c, [P_GPU], [D_GPU])
        await power_of(c, ["prefill", "decode"])

        def phases() -> set[tuple[int, int]]:
            lines = [line.rsplit(",", 2) for line in path.read_text().splitlines()[2:]]
            return {(int(prefill), int(decode)) for _, prefill, decode in lines}

        async def in_decode(call: Call) -> None:
            """P has answered by then."""
            await eventually(lambda: (0, 1) in phases(), 30)
            await answer(call)

        async def in_prefill(call: Call) -> None:
            await eventually(lambda: (1, 1) in phases(), 30)
            await answer(call)

        c.p.behave, c.d.behave = in_prefill, in_decode
        assert (await c.complete()).status_code == 200
    series = read_csv(path)
    assert series.every_s == 0.01
    assert set(series.gpus) == {P_GPU, D_GPU}
    assert 1 in series.lanes["prefill"].in_flight
    assert 1 in series.lanes["decode"].in_flight


async def test_a_file_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--power-csv"):
        async with Service(ProxySettings(http_port=0, discovery_port=0, power_csv=tmp_path / "no" / "power.csv")):
            pass
