"""What the dashboard's page is told, and by whom it is kept: over real sockets, without a browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.proxy.scripted import Call, Cluster, answer, cluster, eventually

from twolane.proxy import dashboard
from twolane.proxy.log_tail import MAX_BYTES, read_log


class Watcher:
    """One who reads the events."""

    def __init__(self, answered: httpx.Response) -> None:
        self.status = answered.status_code
        self._lines = answered.aiter_lines()

    async def next(self, name: str) -> Any:
        """The next event of that name."""
        async with asyncio.timeout(30):
            async for line in self._lines:
                if line == f"event: {name}":
                    return msgspec.json.decode((await anext(self._lines)).removeprefix("data: "))
        raise AssertionError("the events have ended")


@asynccontextmanager
async def watching(c: Cluster, **headers: str) -> AsyncIterator[Watcher]:
    async with c.http.stream("GET", "/dashboard/events", headers=headers) as answered:
        yield Watcher(answered)


async def test_a_request_is_told_from_its_beginning_to_its_end() -> None:
    go_on = asyncio.Event()

    async def decode(call: Call) -> None:
        if call.method == "POST":
            await go_on.wait()
        await answer(call)

    async with cluster() as c, watching(c) as watcher:
        hello = await watcher.next("hello")
        assert [i["state"] for i in hello["instances"]] == ["ready", "ready"]
        assert (hello["open"], hello["ended"]) == ([], [])
        c.d.behave = decode
        asked = asyncio.create_task(c.complete(stream=True))
        serial, phase, prefill, decode_address = (await watcher.next("flow"))["moved"][0]
        assert (serial, prefill, decode_address) == (1, c.p.address, c.d.address)
        assert phase in {"prefill", "handoff"}
        go_on.set()
        await asked
        ended: list[Any] = []
        while not ended:
            ended = (await watcher.next("flow"))["ended"]
        assert [(e["serial"], e["number"], e["outcome"]) for e in ended] == [(1, 1, "ok")]
        sample = await watcher.next("sample")
        assert sample["says"] == {
            "status": "ok",
            "text": "1 prefill and 1 decode instance ready, no requests in flight.",
            "notes": [],
        }
    async with cluster() as c:
        await c.complete()
        async with watching(c) as late:
            assert [e["number"] for e in (await late.next("hello"))["ended"]] == [1]


async def test_events_and_logs_need_the_key_but_the_page_does_not() -> None:
    async with cluster(api_keys=("sesame",)) as c:
        for path in ("/dashboard/events", "/dashboard/logs/proxy"):
            assert (await c.http.get(path)).status_code == 401
            assert (await c.http.get(path, headers={"authorization": "Bearer sesam"})).status_code == 401
        for path in ("/", "/dashboard/dashboard.js", "/dashboard/vendor/uplot/uPlot.min.css"):
            assert (await c.http.get(path)).status_code == 200
        async with watching(c, authorization="Bearer sesame") as watcher:
            assert (await watcher.next("hello"))["version"]


async def test_files_are_asked_again_and_may_load_nothing_from_elsewhere() -> None:
    async with cluster() as c:
        page = await c.http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "require-trusted-types-for 'script'" in page.headers["content-security-policy"]
        again = await c.http.get("/", headers={"if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (await c.http.head("/dashboard/dashboard.css")).headers["content-length"] != "0"
        for path in ("/dashboard/", "/dashboard/nothing.js", "/dashboard/../pool.py", "/dashboard/__init__.py"):
            assert (await c.http.get(path)).status_code == 404
        assert (await c.http.post("/")).status_code == 405


async def test_watchers_are_bounded_and_their_places_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MAX_WATCHERS", 2)
    async with cluster() as c:
        async with watching(c) as one, watching(c) as two:
            await one.next("hello")
            await two.next("hello")
            assert (await c.http.get("/dashboard/events")).status_code == 429
        await eventually(lambda: c.service.dashboard.num_watchers == 0, 30)
        async with watching(c) as again:
            await again.next("hello")


async def test_one_who_does_not_read_is_dropped_and_the_others_go_on() -> None:
    async with cluster() as c, watching(c) as reader:
        await reader.next("hello")
        _, writer = await c.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /dashboard/events HTTP/1.1\r\nhost: x\r\n\r\n")
        board = c.service.dashboard
        await eventually(lambda: board.num_watchers == 2, 30)
        for _ in range(200):
            board._tell("noise", {"noise": "x" * 200_000})
            assert (await reader.next("noise"))["noise"]
            if board.num_watchers == 1:
                break
        assert board.num_watchers == 1
        await reader.next("sample")
        writer.close()


async def test_an_open_dashboard_holds_no_stop_up() -> None:
    async with cluster() as c, watching(c) as watcher:
        await watcher.next("hello")
        c.service.stop_accepting()
        assert await watcher.next("bye") == {}
        async with asyncio.timeout(30):
            await c.service.drained()


async def test_without_a_watcher_only_the_history_grows() -> None:
    async with cluster() as c:
        await c.complete(stream=True)
        samples = c.service.dashboard.history.samples
        await eventually(lambda: bool(samples) and samples[-1].ttft_p50_ms is not None, 30)
        async with watching(c) as watcher:
            hello = await watcher.next("hello")
            assert len(hello["samples"]) >= 1
            assert hello["samples"][-1][1] is not None


@pytest.mark.parametrize("name", ["..%2Fsecret", "secret", "%2Fetc%2Fpasswd", "", "prefill%00"])
async def test_only_logs_of_instances_are_shown(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.log").write_text("secret")
    async with cluster(log_dir=tmp_path / "logs") as c:
        c.p.register(c.service.discovery_port, name="../secret")
        await eventually(lambda: c.view(c.p).name == "../secret")
        answered = await c.http.get(f"/dashboard/logs/{name}")
        if answered.status_code == 200:  # that is its name: but no plain one
            assert answered.json()["lines"] == []
            assert "wasn't started by" in answered.json()["missing"]
        else:
            assert answered.status_code == 404


@pytest.mark.parametrize("query", ["lines=0", "lines=x", "lines=1001", "after=1", "after=-1-2", "after=1-2x"])
async def test_a_wrong_question_for_a_log_is_refused(tmp_path: Path, query: str) -> None:
    async with cluster(log_dir=tmp_path) as c:
        assert (await c.http.get(f"/dashboard/logs/proxy?{query}")).status_code == 400


def position(found: dict[str, Any]) -> tuple[int, int]:
    inode, offset = found["position"].split("-")
    return int(inode), int(offset)


def test_log_whole_lines_and_only_what_is_new(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"one\n\x1b[32mtwo\x1b[0m\nthr")
    found = read_log(log, 10, None)
    assert (found["lines"], found["fresh"]) == (["one", "two"], True)
    with log.open("ab") as file:
        file.write(b"ee\n\xff\n")
    more = read_log(log, 10, position(found))
    assert (more["lines"], more["fresh"]) == (["three", "\N{REPLACEMENT CHARACTER}"], False)
    assert read_log(log, 10, position(more))["lines"] == []


def test_log_is_bounded_whatever_it_holds(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"a line of some length\n" * 100_000)
    begun = read_log(log, 5, None)
    assert len(begun["lines"]) == 5
    behind = read_log(log, 5, (position(begun)[0], 0))
    assert behind["fresh"]
    log.write_bytes(b"x" * 3 * MAX_BYTES)  # never a line's end
    assert read_log(log, 5, None)["lines"] == []
    (tmp_path / "link.log").symlink_to(log)
    assert "There is no log" in read_log(tmp_path / "link.log", 5, None)["missing"]
    assert "no plain file" in read_log(tmp_path, 5, None)["missing"]
