"""The gallery in Chromium: cards, filters, keys, and charts above it."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import av
import numpy as np
import numpy.typing as npt
import pytest
from browsers import until
from report_visits import Site, Visit, build
from reported import (
    BEGAN,
    RUN,
    begin,
    commit,
    frames,
    result,
)

from pia_batch import report
from pia_batch.journal import layout
from pia_batch.storage.object_store import Store


def test_the_page_shows_animations_beside_their_images(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)

    assert page.locator("h1").inner_text() == "14 animations, 4 failures"
    assert page.locator("#count").inner_text() == "18 results"
    card = page.locator("#grid li").first
    assert "a red circle moving 0" in card.inner_text()
    assert "scale 0 · 8 frames · 64\N{MULTIPLICATION SIGN}64 · 25 steps" in card.inner_text()
    card.scroll_into_view_if_needed()
    until(page, "document.querySelector('#grid video').currentTime > 0.2")
    until(
        page, "[...document.querySelectorAll('#grid .condition img')].filter((image) => image.naturalWidth).length >= 4"
    )
    moving = page.locator("#grid li").nth(1).locator(".animation img")
    assert moving.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 64
    assert page.locator("#grid .badge").inner_text() == "zip"
    assert page.locator(".chart").count() == 4
    below = site.folder.as_uri()
    assert all(uri.startswith((below, "data:image/webp;base64,")) for uri in window.asked)


def test_posters_stand_for_videos_that_do_not_play_and_for_files_that_cannot(
    tmp_path: Path, visit: Callable[..., Visit]
) -> None:
    rows = [result(k, format=form) for k, form in enumerate(["mp4", "png_zip", "gif", "mp4"])]
    for row in rows[:3]:
        row |= {"poster": True, "poster_uri": "file:///elsewhere", "poster_num_bytes": 1, "poster_sha256": "0" * 64}
    site = build(tmp_path, rows, embed=False)
    window = visit(reduced_motion="reduce")
    page = window.open(site.uri)
    posters = [(site.folder / "out" / layout.poster_name(row["key"])).as_uri() for row in rows]

    page.locator("#grid video").first.wait_for()
    assert page.eval_on_selector_all("#grid video", "(videos) => videos.map((video) => video.poster)") == [
        posters[0], "",
    ]  # fmt: skip
    still = page.locator("#grid .first")
    assert still.evaluate("(image) => image.decode().then(() => [image.src, image.naturalWidth])") == [posters[1], 64]
    assert {uri for uri in window.asked if uri.endswith(".jpg")} == {posters[0], posters[1]}


def test_a_live_page_renews_itself(store: Store, visit: Callable[..., Visit]) -> None:
    begin(store, 2)
    commit(store, [result(0, format="gif", image="gone.png")])
    pages = report.follow(store, RUN, every_s=1)
    window = visit()
    page = window.open(next(pages).uri)
    assert window.ids() == ["r00000"]
    assert "Run in progress: 1 of 2 requests finished" in page.locator(".live").inner_text()

    commit(store, [result(1, format="gif", image="gone.png")])
    next(pages)

    page.wait_for_selector("#grid li:nth-child(2)")
    assert window.ids() == ["r00000", "r00001"]


def test_filters_search_and_order_are_in_the_address(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit(1280, 2400)  # all cards at once
    page = window.open(site.uri)

    page.get_by_label("Status").select_option("failed")
    assert window.ids() == ["r00014", "r00015", "r00016", "r00017"]
    page.get_by_label("Error kind").select_option("non_finite")
    assert page.locator("#count").inner_text() == "2 of 18 results"
    assert page.get_by_label("Error kind").locator("option").all_inner_texts() == [
        "any", "image_unavailable (1)", "non_finite (2)", "out_of_range (1)",
    ]  # fmt: skip
    page.get_by_label("Status").select_option("succeeded")
    assert page.locator("#nothing").is_visible()
    page.locator("#clear").click()
    assert page.locator("#count").inner_text() == "18 results"

    page.locator("select[name=motion]").select_option("own curve")
    assert window.ids() == ["r00004"]
    page.locator("select[name=motion]").select_option("scale 3, loop")
    assert window.ids() == ["r00003", "r00009", "r00015"]
    page.locator("select[name=motion]").select_option("")
    page.get_by_label("Model").select_option("second")
    assert window.ids() == ["r00007"]
    page.get_by_label("Model").select_option("")

    page.get_by_label("Search").fill("Boat moving")
    until(page, "document.getElementById('count').textContent.startsWith('6 of')")
    page.get_by_label("Sort by").select_option("motion")
    boats = sorted(site.rows[1::3], key=lambda row: (row["motion"] is None, -(row["motion"] or 0)))
    assert window.ids() == [row["request_id"] for row in boats]
    assert page.locator("#grid .sorted").first.inner_text() == f"{boats[0]['motion']:.3g}"
    page.get_by_label("Descending").click()
    assert window.ids()[-1] == "r00016"  # without a measure: last either way

    page.get_by_label("Search").fill(site.rows[8]["key"][:8].upper())
    until(page, "document.getElementById('count').textContent === '1 of 18 results'")
    assert window.ids() == ["r00008"]
    page.get_by_label("Search").fill("Boat moving")
    until(page, "document.getElementById('count').textContent.startsWith('6 of')")

    told = dict(parse_qsl(urlsplit(page.url).fragment))
    assert told == {"q": "Boat moving", "sort": "motion"}
    before = window.ids()
    page.reload()
    page.wait_for_selector("#grid li")
    assert window.ids() == before
    assert page.get_by_label("Search").input_value() == "Boat moving"


def test_identical_first_frames_are_the_most_alike(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(f"{site.uri}#sort=first_frame_psnr_db&order=down")
    assert window.ids()[0] == "r00003"
    assert page.locator("#grid .sorted").first.inner_text() == "identical"


def test_everything_can_be_done_by_keyboard(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)
    focused = "document.activeElement.querySelector('.id')?.textContent ?? document.activeElement.id"
    page.locator("#grid button").first.focus()

    for key, request_id in [
        ("ArrowRight", "r00001"), ("ArrowDown", "r00005"), ("ArrowLeft", "r00004"), ("ArrowUp", "r00000"),
        ("End", "r00017"), ("ArrowRight", "r00017"), ("Home", "r00000"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused) == request_id, key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    title = page.locator("#detail-title")
    assert title.inner_text() == "r00001"
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "r00002"
    assert page.locator("#detail .position").inner_text() == "3 of 18"
    page.get_by_label("Next result").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the button keeps the focus
    assert title.inner_text() == "r00004"
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    until(page, f"({focused}) === 'r00004'")  # where one had got to; the dialog's closing is told a moment later
    page.keyboard.press("/")
    page.keyboard.type("circle r00009")
    until(page, "document.getElementById('count').textContent === '1 of 18 results'")
    page.keyboard.press("Escape")


@pytest.mark.long
def test_ten_thousand_results_are_a_few_dozen_elements(large: Site, visit: Callable[..., Visit]) -> None:
    window = visit(missing=True)
    page = window.open(large.uri)

    assert page.locator("#count").inner_text() == "10,000 results"
    assert page.evaluate("document.querySelectorAll('#grid li').length") < 60
    page.locator("#grid button").first.focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.querySelector('.id').textContent") == "r09999"
    until(page, "document.activeElement.querySelector('video')?.currentTime > 0")
    assert page.evaluate("document.activeElement.parentElement.getAttribute('aria-posinset')") == "10000"
    assert page.evaluate("document.querySelectorAll('#grid li').length") < 60
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    until(page, "document.querySelector('#grid li').dataset.position > 4500")
    ids = window.ids()
    assert ids == sorted(ids)
    assert ids[0] > "r04500"
    page.get_by_label("Search").fill("cat moving 98")
    found = sum("cat" in row["prompt"] and "98" in row["prompt"] for row in large.rows)
    until(page, f"document.getElementById('count').textContent === '{found} of 10,000 results'")


def test_who_wants_no_motion_gets_stills_until_asking(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(reduced_motion="reduce").open(site.uri)
    page.locator("#grid li").first.scroll_into_view_if_needed()
    page.wait_for_selector("#grid li:nth-child(2) canvas:not([hidden])")  # the first frame, laid over the GIF
    assert page.evaluate("document.querySelector('#grid video').paused")
    page.locator("#grid li").first.hover()
    until(page, "document.querySelector('#grid video').currentTime > 0")
    page.locator("#grid li").nth(1).hover()
    page.wait_for_selector("#grid li:nth-child(2) canvas", state="hidden")
    assert page.evaluate("document.querySelector('#grid video').paused")


def test_what_is_missing_says_so(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit(missing=True)
    page = window.open(f"{site.uri}#q=gone.png")
    page.get_by_text("image not reachable from this page").wait_for()
    (site.folder / "aside").mkdir()
    clip = site.folder / "out" / layout.animation_name(site.rows[5]["key"], "mp4")
    moved = clip.rename(site.folder / "aside" / clip.name)
    page.get_by_label("Search").fill("r00005")
    page.locator("#grid").scroll_into_view_if_needed()
    page.get_by_text("animation missing, or not playable here").wait_for()
    moved.rename(clip)


@pytest.mark.long
def test_flagged_clips_are_covered_until_somebody_clicks(visit: Callable[..., Visit], tmp_path: Path) -> None:
    rows = [result(k, nsfw_frames=int(k == 1), nsfw_score=0.1 * k - 0.05, nsfw_input=False) for k in range(4)]
    rows[3] |= {"nsfw_input": True, "context": "windows", "num_frames": 8}
    page = visit().open(build(tmp_path, rows).uri)
    covered = "[...document.querySelectorAll('#grid li')].map((card) => card.querySelectorAll('.veiled').length)"
    until(page, "document.querySelectorAll('#grid video').length === 4")

    assert page.evaluate(covered) == [0, 2, 0, 2]
    assert "blur" in page.evaluate("getComputedStyle(document.querySelector('.veiled > *')).filter")
    assert page.locator("#grid .facts").all_inner_texts()[1].startswith("flagged · ")
    assert "8 frames, windows" in page.locator("#grid .facts").all_inner_texts()[3]
    page.locator("#grid li").nth(1).click()
    assert page.evaluate(covered) == [0, 0, 0, 2]
    assert not page.locator("dialog").is_visible()  # the first click only shows it
    page.locator("#grid li").nth(1).click()
    assert page.locator("dialog .veiled").count() == 0
    page.keyboard.press("Escape")
    until(page, "!location.hash.includes('id=')")  # or the event of closing closes the next one
    page.evaluate("location.hash = '#id=r00003'")
    until(page, "document.querySelector('dialog .strip') !== null")
    assert page.locator("dialog .veiled").count() == 3  # image, animation and film strip
    page.get_by_role("button", name="Show the flagged pictures").click()
    assert page.locator("dialog .veiled").count() == 0
    page.keyboard.press("Escape")
    page.select_option("select[name=safety]", "flagged")
    assert page.locator("#count").inner_text() == "2 of 4 results"


@pytest.mark.parametrize(("spacing_s", "unit"), [(1, "second"), (60, "minute"), (3600, "hour")])
def test_clips_over_time_are_a_rate_in_a_unit_that_a_bar_lasts(
    visit: Callable[..., Visit], tmp_path: Path, spacing_s: int, unit: str
) -> None:
    rows = [result(k, finished_at=BEGAN + timedelta(seconds=k * spacing_s)) for k in range(12)]
    page = visit().open(build(tmp_path, rows).uri)

    chart = page.locator(".chart").first
    assert chart.locator("figcaption").inner_text() == f"Clips a{'n' * (unit == 'hour')} {unit}"
    assert chart.locator("text").first.text_content() == "peak 1.3"  # 2 in one of 7 bars, which last 11 / 7 of a unit


def test_a_chosen_point_of_a_chart_opens_its_result(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(site.uri)
    chart = page.locator(".chart .pickable")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.click(
        box["x"] + box["width"] * 294 / 320, box["y"] + box["height"] * 20 / 180
    )  # the one that is identical
    assert page.locator("#detail-title").inner_text() == "r00003"


def test_a_video_that_the_browser_does_not_play_shows_its_first_frame_and_names_its_codec(
    visit: Callable[..., Visit], tmp_path: Path
) -> None:
    rows = [result(k, codec="hevc") for k in range(2)] + [result(2)]
    made = build(tmp_path, rows)
    clip = made.folder / "out" / layout.animation_name(rows[0]["key"], "mp4")
    clip.write_bytes(hevc(frames(0)))
    (made.folder / "out" / layout.animation_name(rows[1]["key"], "mp4")).unlink()
    report.write(Store(str(made.folder / "out")))
    page = visit().open(made.uri)
    assert page.evaluate("document.createElement('video').canPlayType('video/mp4; codecs=hvc1.1.6.L93.B0')") == ""

    until(page, "document.querySelector('#grid canvas.first')?.height === 72")
    assert page.locator("#grid .badge").all_inner_texts() == ["HEVC: first frame"]
    assert page.locator("#grid .absent").all_inner_texts() == ["this browser does not play HEVC"]
    assert page.locator("#grid video").count() == 1
    page.locator("#grid button").first.click()
    until(page, "document.querySelectorAll('#detail .strip canvas').length === 8")
    assert len({page.locator("#detail .strip canvas").nth(k).screenshot() for k in range(8)}) == 8


def hevc(clip: npt.NDArray[np.uint8]) -> bytes:
    """Encode a clip as HEVC."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4", options={"moov_size": "4096"}) as file:
        stream = file.add_stream("libx265", rate=8, options={"x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return sink.getvalue()
