"""Chromium, as tests of pages use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium_browser() -> Iterator[Browser]:
    """Start the system's Chromium or Chrome, else Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.fail("no Chromium: `make browser` installs one")
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()
