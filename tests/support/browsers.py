"""Chromium, as tests of pages use it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


@contextmanager
def chromium_browser() -> Iterator[Browser]:
    """Start the system's Chromium or Chrome, else Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.fail("no Chromium: `make browser` installs one")
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield browser
        finally:
            browser.close()


def until(page: Page, condition: str) -> None:
    """Wait for a condition in JavaScript. Playwright's own way would need `unsafe-eval`, which the policy refuses."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def faint(page: Page, pairs: list[tuple[str, str]]) -> list[tuple[str, str, float]]:
    """Return the pairs of CSS variables, ink and paper, with less contrast than WCAG 2.2 asks of text (1.4.3)."""
    return [(ink, paper, ratio) for ink, paper, ratio in page.evaluate(_CONTRAST, pairs) if ratio < 4.5]


_CONTRAST = """(pairs) => {
  const rgb = (colour) => {
    const context = document.createElement('canvas').getContext('2d');
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = (colour) => rgb(colour).reduce((sum, part, k) => sum + part * [0.2126, 0.7152, 0.0722][k], 0);
  const probe = document.body.appendChild(document.createElement('i'));
  const colour = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  return pairs.map(([ink, paper]) => {
    const [a, b] = [light(colour(ink)), light(colour(paper))].sort((x, y) => y - x);
    return [ink, paper, (a + 0.05) / (b + 0.05)];
  });
}"""
