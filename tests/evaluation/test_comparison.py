"""Comparison of two outputs: pairs, intervals, and the page in Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browsers import faint, until
from columns_of_types import types, values
from evaluated import publish_evaluation, publish_output, shifted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser

from pia_batch import cli
from pia_batch.config import ImagesConfig
from pia_batch.errors import ConfigError
from pia_batch.evaluation.bootstrap import MAX_UNITS, interval
from pia_batch.evaluation.comparison import ALL, OF_RESULTS, Side, compare, open_side
from pia_batch.evaluation.comparison_page import render
from pia_batch.evaluation.work import RunResults
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.storage.object_store import Store

IDS = [f"r{k}" for k in range(6)]


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Store, Store]:
    made = []
    for name, by in (("a", 2), ("b", 3)):
        store = Store(str(tmp_path / name / "out"))
        clips = {each: shifted(4, 32, (by, 0), seed=k) for k, each in enumerate(IDS)}
        clips |= {f"only-{name}": shifted(4, 32), "failed": None}
        models = ["x" if k % 2 else "y" for k in range(6)] + [None, "x"]
        publish_output(store, clips, form="webp", carried={"base": [*range(6), 7, 8], "kind": models})
        order = sorted([*IDS, f"only-{name}", "failed"])
        publish_evaluation(
            store, {"warp_error": [None if each == "failed" else len(each) + by * 1.0 for each in order]}
        )
        made.append(store)
    return made[0], made[1]


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(100):
        differences = rng.normal(0.5, 2, 40)
        found = interval(np.zeros(40), differences, seed)
        assert found.difference == pytest.approx(differences.mean())
        hits += found.low <= 0.5 <= found.high
    assert 88 <= hits <= 99


@pytest.mark.parametrize("count", [30, MAX_UNITS * 10 + 3])
def test_an_interval_has_the_width_of_the_standard_error_and_is_repeatable(count: int) -> None:
    a, b = np.random.default_rng(1).normal(0, 1, (2, count))

    found = interval(a, b, 3)

    expected = 2 * 1.96 * (b - a).std() / np.sqrt(count)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found == interval(a, b, 3)
    assert found != interval(a, b, 4)


def test_pairs_have_the_differences_of_their_measures_in_all_and_in_each_group(outputs: tuple[Store, Store]) -> None:
    a, b = (open_side(store.uri, None, None, ["request_id"], ["kind"]) for store in outputs)

    found = compare(a, b, ("request_id",), ("kind",))

    assert found.rows_a["request_id"].to_pylist() == found.rows_b["request_id"].to_pylist() == IDS
    assert list(found.groups) == [ALL, "kind x", "kind y"]
    for group, count in ((ALL, 6), ("kind x", 3), ("kind y", 3)):
        each = found.groups[group]["warp_error"]
        assert (each.count, each.difference, each.low, each.high) == (count, 1.0, 1.0, 1.0)
    assert found.groups[ALL]["motion"].difference == 0
    assert (found.record()["only_a"], found.record()["only_b"]) == (1, 1)


def test_pairs_by_other_columns_must_be_unique(outputs: tuple[Store, Store]) -> None:
    a, b = (open_side(store.uri, None, None, ["base", "kind"], []) for store in outputs)

    assert len(compare(a, b, ("base",), ()).rows_a) == 7
    with pytest.raises(ConfigError, match="several animations of B have kind 'y'; add a column"):
        compare(a, b, ("kind",), ())
    with pytest.raises(ConfigError, match="no column 'shop' in the evaluation and its results"):
        open_side(outputs[0].uri, None, None, ["shop"], [])


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_columns_of_any_type_make_pairs_and_groups(data: st.DataObject) -> None:
    one = data.draw(types)
    column = pa.array([*data.draw(st.lists(values(one), min_size=3, max_size=3)), None], one)
    column = plain_column(pa.chunked_array([column]))  # as results have it
    own = {"request_id": list("abcd"), "x": column} | {name: [1.0, 2.0, 3.0, 4.0] for name in OF_RESULTS}
    side = Side(RunResults(None, "r", "", (), "", ImagesConfig()), None, pa.table(own))  # type: ignore[arg-type]

    found = compare(side, side, ("x", "request_id"), ("x",))

    assert found.rows_a.column("request_id").to_pylist() == list("abcd")
    assert found.rows_b.column("request_id").to_pylist() == list("abcd")
    assert sum(each["motion"].count for name, each in found.groups.items() if name != ALL) == 4
    assert "x is null" in found.groups


def test_only_alike_animations_pair(outputs: tuple[Store, Store]) -> None:
    a, b = (open_side(store.uri, None, None, ["seed", "request_id"], []) for store in outputs)
    b.table.validate()
    renamed = b.table.set_column(0, "request_id", [[f"other {k}" for k in range(len(b.table))]])

    with pytest.raises(ConfigError, match="no animation of A has the request_id of one of B"):
        compare(a, type(b)(b.results, b.evaluation, renamed), ("request_id",), ())


@pytest.mark.slow
def test_the_page_plays_pairs_in_step_and_follows_the_keyboard(
    outputs: tuple[Store, Store], chromium: Browser, tmp_path: Path
) -> None:
    page_file = tmp_path / "compare.html"
    sides = (open_side(store.uri, None, None, ["request_id"], []) for store in outputs)
    page_file.write_text(render(compare(*sides, ("request_id",), ()), ("<b>two</b>", "three")), encoding="utf-8")

    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(page_file.as_uri())
    until(page, "cards.filter((card) => card.frames).length > 0")
    assert page.locator("h1").inner_text() == "A <b>two</b> and B three"
    assert page.locator("#pairs li").count() == 6
    assert page.locator("#figures tbody tr").first.inner_text().startswith("warp_error")
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[state.current, state.playing]") == [1, False]
    until(page, "cards[state.order[1]].frames && cards[state.order[1]].canvas.width === 64")
    # Frame k of both sides at once: the texture of A has moved by 2 k pixels, that of B by 3 k.
    page.evaluate("state.frame = 2; paintAll()")
    pixels = page.evaluate("Array.from(cards[state.order[1]].canvas.getContext('2d').getImageData(0, 0, 64, 32).data)")
    shown = np.array(pixels, dtype=float).reshape(32, 64, 4)[..., :3]
    index = page.evaluate("Number(cards[state.order[1]].pair.key.slice(1))")
    for side, by in ((shown[:, :32], 2), (shown[:, 32:], 3)):
        distances = np.abs(side - shifted(4, 32, (by, 0), seed=index)).mean(axis=(1, 2, 3))
        assert distances.argmin() == 2
        assert distances[2] < 12  # of 255: colours at half the resolution
    page.keyboard.press("a")
    assert page.evaluate("[state.view, cards[state.order[1]].canvas.width]") == ["a", 32]
    page.keyboard.press("d")
    page.locator("#play").focus()
    page.keyboard.press("m")
    assert page.locator("#measure option").all_text_contents()[:2] == ["warp_error", "motion"]  # others have no values
    assert page.locator("#pairs li").first.locator("tr.sorted th").text_content() == "motion"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_screen_and_has_contrast_and_rests_for_who_wants_no_motion(
    outputs: tuple[Store, Store], chromium: Browser, tmp_path: Path, scheme: str
) -> None:
    page_file = tmp_path / "compare.html"
    sides = (open_side(store.uri, None, None, ["request_id"], ["kind"]) for store in outputs)
    page_file.write_text(render(compare(*sides, ("request_id",), ("kind",)), ("two", "three")), encoding="utf-8")

    page = chromium.new_page(
        viewport={"width": 390, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",  # type: ignore[arg-type]
    )
    page.goto(page_file.as_uri())
    until(page, "cards.filter((card) => card.frames).length > 0")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    hidden = "[...document.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth).length"
    assert page.evaluate(hidden) == 0  # no table is cut off either
    assert page.locator("#play").inner_text() == "Play"
    inks = ("--text", "--soft", "--a", "--b", "--up", "--down")
    assert faint(page, [(ink, paper) for ink in inks for paper in ("--ground", "--card")]) == []
    page.get_by_label("Group").select_option("kind x")
    assert page.locator("#figures .count").first.text_content() == "3"
    page.keyboard.press("m")
    assert (
        page.locator("#pairs li").first.locator("tr.sorted th").text_content()
        == page.locator("#measure option").nth(1).text_content()
    )


def test_the_command_writes_the_page_and_prints_the_figures(
    outputs: tuple[Store, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "deep" / "page.html"
    a, b = outputs
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", a.uri, b.uri, "--by", "kind", "--out", str(page), "--max-pairs", "2", "--json"])

    payload = json.loads(capsys.readouterr().out)
    assert (end.value.code, payload["pairs"], payload["page"]) == (0, 6, page.as_uri())
    assert payload["groups"]["kind x"]["warp_error"]["difference"] == 1.0
    assert page.read_text(encoding="utf-8").count("data:video/mp4") == 2
