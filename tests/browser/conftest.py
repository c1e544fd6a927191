"""One Chromium for all browser tests. A page that logs an error, or asks anything of a network, fails its test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HERE = {"", "127.0.0.1", "localhost"}


@pytest.fixture(scope="module")  # not the session: while it is open, other tests of this process cannot use asyncio
def browser() -> Iterator[Any]:
    """Chromium, or a skip that names what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="browser tests need the package playwright")
    path = shutil.which("chromium") or CHROMIUM
    if not shutil.which(path):
        pytest.skip(f"browser tests need Chromium at {CHROMIUM}")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page, 1280 wide. `page.problems` gathers errors and strangers asked; it must be empty at the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    made.set_default_timeout(15_000)
    made.problems = watched(made)
    yield made
    context.close()
    assert made.problems == []


def watched(page: Any) -> list[str]:
    """A list that fills with console errors, uncaught exceptions and requests that leave this machine."""
    found: list[str] = []
    page.on("console", lambda m: found.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: found.append(f"exception: {e}"))
    page.on("request", lambda r: None if urlsplit(r.url).hostname in HERE | {None} else found.append(f"asked {r.url}"))
    return found
