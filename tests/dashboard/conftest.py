"""One Chromium for all, the system's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.dashboard.stage import DEADLINE_S, Stage


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no `chromium` here: install it, on Debian with `apt install chromium`")
    with sync_playwright() as playwright:
        # As root Chromium won't start with its sandbox; these pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Complaints(list[str]):
    """What the page's console said that it shouldn't have."""

    def watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("console", self._heard)

    def _heard(self, message: ConsoleMessage) -> None:
        # The browser itself says so while the proxy is away, and when a key is asked for.
        is_known = "ERR_CONNECTION" in message.text or "status of 401" in message.text
        if message.type in {"error", "warning"} and not is_known:
            self.append(message.text)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh one, in whose console nothing may be said."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(DEADLINE_S * 1000)
    page = context.new_page()
    complaints = Complaints()
    complaints.watch(page)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A proxy, and nobody behind it yet."""
    with Stage(tmp_path) as stage:
        yield stage
