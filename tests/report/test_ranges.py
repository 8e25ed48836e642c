"""Measures of an evaluation in Chromium: their distributions, and ranges of them as filters."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

import pyarrow.parquet as pq
import pytest
from browsers import until
from evaluated import publish_evaluation, publish_output, shifted
from playwright.sync_api import Page
from report_visits import Visit

from pia_batch import cli
from pia_batch.storage.object_store import Store

IDS = [f"r{k:02d}" for k in range(16)]
CLIP_T = [0.2 + 0.005 * k for k in range(16)]
"""0.2, 0.205 … 0.275: the edges of the bins are multiples of 0.005."""
STEP = 0.005
"""Width of a bin of `clip_t`: a round number that makes at most 24 of them."""


def address(page: Page) -> dict[str, str]:
    """The filters in the address, as the page has it: Playwright hears of changes a moment later."""
    return dict(parse_qsl(page.evaluate("location.hash.slice(1)")))


def ends(page: Page, name: str) -> tuple[float | None, ...]:
    """The ends of a range, as the address has them."""
    written = address(page).get(name, "..")
    return tuple(float(end) if end else None for end in written.split(".."))


@pytest.fixture(scope="session")
def evaluated_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of sixteen animations and a failure, all but one of them measured, by the command; its address."""
    store = Store(str(tmp_path_factory.mktemp("evaluated") / "out"))
    publish_output(store, {each: shifted(4, 32, seed=k) for k, each in enumerate(IDS)} | {"r99": None})
    numbers = {"clip_t": [*CLIP_T[:-1], None, None], "dynamic_degree": [float(k % 2) for k in range(16)] + [None]}
    errors = [None] * 15 + ["timeout", "not_animated"]
    publish_evaluation(store, numbers, errors=errors)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", store.uri])
    return store.uri_of("_runs/run-1/report.html")


@pytest.mark.long
def test_ends_of_a_range_are_typed_and_are_in_the_address(evaluated_page: str, visit: Callable[..., Visit]) -> None:
    window = visit(1280, 2400)  # all cards at once
    page = window.open(evaluated_page)
    assert page.locator("#ranges figure").count() == 2  # of the thirteen, those with values
    assert page.locator("#measured").inner_text().strip() == "15 of 16 animations measured, 1 in part."
    picture = page.get_by_role("img", name="Distribution of clip_t: 15 results, median 0.235")
    assert picture.count() == 1

    page.get_by_label("clip_t at least").fill("0.21")
    page.get_by_label("clip_t at least").press("Enter")
    assert page.locator("#count").inner_text() == "13 of 17 results"
    page.get_by_label("clip_t at most").fill("0.22")
    page.get_by_label("clip_t at most").press("Tab")
    assert window.ids() == ["r02", "r03", "r04"]  # both ends included
    assert page.locator("#chips").inner_text() == "clip_t 0.21 to 0.22 \N{MULTIPLICATION SIGN}"
    page.get_by_role("img", name="Distribution of clip_t: 3 results, median 0.215").wait_for()
    page.get_by_label("dynamic_degree at least").fill("1")
    page.get_by_label("dynamic_degree at least").press("Enter")
    assert window.ids() == ["r03"]

    assert address(page) == {"clip_t": "0.21..0.22", "dynamic_degree": "1.."}
    page.reload()
    page.wait_for_selector("#grid li")
    assert window.ids() == ["r03"]
    assert page.get_by_label("clip_t at most").input_value() == "0.22"
    page.get_by_role("button", name="Remove the filter dynamic_degree ≥ 1").click()
    assert window.ids() == ["r02", "r03", "r04"]
    page.get_by_role("button", name="Clear the range of clip_t").click()
    assert page.locator("#count").inner_text() == "17 results"
    assert page.get_by_label("clip_t at least").evaluate("(input) => input === document.activeElement")
    page.get_by_label("clip_t at least").fill("some")  # no number
    page.get_by_label("clip_t at least").press("Enter")
    assert page.locator("#count").inner_text() == "17 results"


def test_a_range_is_chosen_by_dragging_and_by_arrow_keys(evaluated_page: str, visit: Callable[..., Visit]) -> None:
    window = visit(1280, 2400)
    page = window.open(evaluated_page)
    box = page.get_by_role("img", name="Distribution of clip_t").bounding_box()
    bins = round((CLIP_T[-2] - CLIP_T[0]) / STEP)
    at = [box["x"] + box["width"] * (k + 0.5) / bins for k in (1, 3)]
    middle = box["y"] + box["height"] / 2

    page.mouse.move(at[1], middle)
    page.mouse.down()
    page.mouse.move(at[0], middle, steps=3)
    assert page.locator("#count").inner_text() == "17 results"  # until the button is released
    page.mouse.up()

    assert ends(page, "clip_t") == (0.205, 0.22)  # the edges of the second and the fourth bin
    assert window.ids() == ["r01", "r02", "r03", "r04"]
    page.mouse.click(at[0], middle)
    assert ends(page, "clip_t") == (0.205, 0.21)
    page.mouse.click(at[0], middle)  # the same again
    assert page.locator("#count").inner_text() == "17 results"

    page.get_by_label("dynamic_degree at most").press("ArrowDown")
    assert page.locator("#count").inner_text() == "8 of 17 results"
    page.get_by_label("dynamic_degree at most").press("ArrowUp")
    page.get_by_label("dynamic_degree at most").press("ArrowUp")
    assert ends(page, "dynamic_degree") == (None, 1)  # not beyond what there is


def test_the_copied_command_selects_the_requests_of_the_ranges(
    evaluated_page: str, visit: Callable[..., Visit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = visit(1280, 2400)
    page = window.open(f"{evaluated_page}#clip_t=0.21..0.26&dynamic_degree=..0.5")
    program, *arguments = shlex.split(page.locator("#select").inner_text())
    assert program == "pia-batch"
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)

    selected = pq.read_table("selected.parquet")["request_id"].to_pylist()
    assert selected == window.ids() == [f"r{k:02d}" for k in range(2, 13, 2)]


def test_the_detail_has_the_measures_or_the_reason_for_none(evaluated_page: str, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{evaluated_page}#sort=clip_t&order=down")
    page.select_option("select[name=evaluation]", "timeout")
    assert page.locator("#count").inner_text() == "1 of 17 results"
    page.locator("#grid button").first.click()
    assert re.search(r"Evaluation\s+dynamic_degree\s+1\s+not measured\s+timeout", page.locator("#detail").inner_text())
    page.keyboard.press("Escape")
    page.select_option("select[name=evaluation]", "measured")
    assert page.locator("#grid .sorted").first.inner_text() == "0.27"
    page.locator("#grid button").first.click()
    assert re.search(r"Evaluation\s+dynamic_degree\s+0\s+clip_t\s+0.27", page.locator("#detail").inner_text())


@pytest.mark.parametrize("width", [320, 390])
def test_distributions_fit_a_narrow_screen(evaluated_page: str, visit: Callable[..., Visit], width: int) -> None:
    page = visit(width, 800, has_touch=True).open(f"{evaluated_page}#clip_t=0.21..0.26")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.get_by_role("img", name="Distribution of clip_t").tap()  # one bin
    until(page, "!location.hash.includes('clip_t=0.21..0.26')")
    low, high = ends(page, "clip_t")
    assert high - low == pytest.approx(STEP)
