"""The report's page: one file that needs nothing else, and that a browser and a screen reader can use."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_journal import begin, measure
from twolane.bench.document import document
from twolane.bench.html import page
from twolane.bench.sweep import SIDES, Step

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    journal = begin(tmp_path / "run")
    for number in (0, 1):
        for side in SIDES:
            for rate in (1.0, 2.0):
                measure(journal, Step(side, number, rate), 0.05 * (1 + number + rate) * (2 if side == "lanes" else 1))
    journal.close()
    return document(journal.measured)


class Reader(HTMLParser):
    """Collects what the page would fetch, and whether its elements nest."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tables = 0
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        self.tables += tag == "table"
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def closed(self) -> bool:
        return not self._open


def test_the_page_needs_nothing_else_and_is_whole(report: dict[str, Any]) -> None:
    text = page(report)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.closed()
    assert reader.fetched == ["data:,"]
    assert not re.findall(r"@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    assert reader.tables == 4 + 1 + 1  # a chart each, what failed, settings


def test_what_others_wrote_is_text_in_the_page(report: dict[str, Any]) -> None:
    report["notes"].append("<script>alert(1)</script>")
    text = page(report)
    assert "<script>alert" not in text
    assert "a &lt;fast&gt; one" in text
    assert report["headline"] in text


def test_a_report_of_nothing_is_a_page_too(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.close()
    reader = Reader()
    text = page(document(journal.measured))
    reader.feed(text)
    assert reader.closed()
    assert "Nothing was measured" in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_and_nothing_is_wrong(report: dict[str, Any], tmp_path: Path, scheme: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    file = tmp_path / "report.html"
    file.write_text(page(report))
    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        assert tab.locator(".chart canvas").count() == 4
        assert not tab.evaluate("document.documentElement.scrollWidth > innerWidth")
        found = Axe().run(tab).response["violations"]
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [entry for entry in found if entry["impact"] in ("serious", "critical")] == []
