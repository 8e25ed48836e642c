"""The look of the page in Chromium: widths, themes, contrast, names of controls, and no JavaScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browsers import faint
from report_visits import Site, Visit


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_of_a_narrow_screen(site: Site, visit: Callable[..., Visit], width: int) -> None:
    page = visit(width, 800).open(site.uri)
    fits = "document.scrollingElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator("#failures summary").first.click()
    page.locator(".config summary").click()
    assert page.evaluate(fits)
    page.locator("#grid button").first.click()
    assert page.evaluate(fits)
    assert page.evaluate("document.getElementById('detail').scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(site: Site, visit: Callable[..., Visit], scheme: str) -> None:
    page = visit(color_scheme=scheme).open(site.uri)
    inks = ("--ink", "--soft", "--accent", "--bad")
    pairs = [[ink, paper] for ink in inks for paper in ("--paper", "--raised", "--sunken")] + [["--bad", "--bad-soft"]]
    assert faint(page, pairs) == []


def test_the_theme_follows_the_system_or_the_reader(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(color_scheme="dark").open(site.uri)
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Theme: system").click()
    light = page.evaluate(ground)
    assert (dark, light) == ("rgb(19, 20, 22)", "rgb(252, 252, 251)")
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(ground) == dark


def test_every_control_has_a_name(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00000")
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, a, [role=img]')]
      .filter((element) => !element.getAttribute('aria-label') && !element.textContent.trim())
      .filter((element) => !element.labels?.length)
      .map((element) => element.outerHTML)""")
    assert unnamed == []


def test_without_javascript_the_head_and_the_failures_stay(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(java_script_enabled=False).page
    page.goto(site.uri)
    assert page.locator("h1").inner_text() == "14 animations, 4 failures"
    assert page.locator("noscript p").bounding_box()["height"] > 10
    assert not page.get_by_role("button", name="Copy").is_visible()
    assert page.locator("#failures .kind").count() == 3
