"""A browser for the tests of what people see: Debian's Chromium, driven by Playwright.

A page tells of every error on its console and of every request that leaves the machine, and its
test fails if there were any.
"""

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:  # the tests are skipped where Playwright is not there
    from playwright.sync_api import Browser, Page, Request

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# Not of the session: while Playwright runs, asyncio.run is refused in this process, also to the
# tests of other modules.
@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window, for the tests of one module."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright here: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=[*QUIET])
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What went wrong on the pages of this test; what a test expects, it may take out."""
    return []


@pytest.fixture
def page(browser: "Browser", complaints: list[str]) -> Iterator["Page"]:
    """An empty page of 1280 × 800; at the end nothing may have been wrong on it, or on its popups."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})

    def heard(message) -> None:
        if message.type == "error":
            complaints.append(f"console: {message.text} ({message.location['url']})")

    def asked(url: str) -> None:
        if not stays(url):
            complaints.append(f"request that leaves the machine: {url}")

    def opened(page: "Page") -> None:
        page.on("websocket", lambda socket: asked(socket.url))

    def requested(request: "Request") -> None:
        asked(request.url)

    context.on("console", heard)
    context.on("weberror", lambda error: complaints.append(f"exception: {error.error}"))
    context.on("request", requested)
    context.on("page", opened)
    yield context.new_page()
    context.close()
    if complaints:
        pytest.fail(os.linesep.join(["on the pages of this test:", *complaints]), pytrace=False)


def stays(url: str) -> bool:
    """Does a request for this address stay on the machine?

    >>> [stays(url) for url in ("file:///a.css", "http://localhost:8/x", "https://example.org/")]
    [True, True, False]
    """
    parts = urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    return local or parts.scheme in ("file", "data", "blob", "about")
