"""One result in Chromium: its frames, its settings and its commands."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from browsers import until
from inputs import requests_table
from PIL import Image, ImageSequence
from playwright.sync_api import Page
from report_visits import Site, Visit, build, inspected
from reported import (
    RUN,
    frames,
    result,
)
from servers import serving

from pia_batch.config import RunConfig
from pia_batch.journal import layout
from pia_batch.manifest import validation
from pia_batch.media import codecs, fetch
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import SETTINGS

DRAWN = "[...document.querySelectorAll('.strip canvas')].every((canvas) => canvas.height < 100)"  # 150 at first


@pytest.mark.long
def test_a_result_has_an_address_of_its_own(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00016")
    detail = page.locator("#detail")
    assert detail.locator("h2").inner_text() == "r00016"
    assert "column 'image': images/gone.png does not exist" in detail.inner_text()
    assert "the image is missing" in detail.inner_text()
    page.get_by_role("button", name="Close").click()
    page.locator("#failures a", has_text="r00014").click()
    assert detail.locator("h2").inner_text() == "r00014"
    page.evaluate("location.hash = 'id=r00003'")
    until(page, "document.getElementById('detail-title').textContent === 'r00003'")
    page.evaluate("location.hash = 'id=unknown'")
    page.locator("#nothing").wait_for(state="attached")
    until(page, "!document.getElementById('nothing').hidden")


def test_the_detail_shows_every_frame_and_stops_at_one(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00000")

    until(page, DRAWN)
    cropped = page.evaluate("""[...document.querySelectorAll('#detail .picture > *')].filter((element) => {
      const [inner, outer] = [element.getBoundingClientRect(), element.parentElement.getBoundingClientRect()];
      return inner.height > outer.height + 1 || inner.width > outer.width + 1;
    }).length""")
    assert cropped == 0
    assert page.locator(".strip canvas").count() == 8
    shots = {page.locator(".strip canvas").nth(k).screenshot() for k in range(8)}
    assert len(shots) == 8
    page.get_by_label("Frame 3 of 8: stop there").click()
    stopped = page.locator("#detail video").evaluate("(video) => [video.paused, video.currentTime]")
    assert stopped == [True, 2.5 / 8]
    settings = page.locator("#detail .settings").first.inner_text()
    assert f"seed\n{site.rows[0]['seed']}" in settings
    assert page.locator("#detail a", has_text="download").get_attribute("href").endswith(f"{site.rows[0]['key']}.mp4")


@pytest.mark.long
@pytest.mark.parametrize(("position", "frames_shown"), [(1, 8), (2, 8), (3, 8)])
def test_other_formats_bring_their_strip_along(
    site: Site, visit: Callable[..., Visit], position: int, frames_shown: int
) -> None:
    page = visit().open(f"{site.uri}#id=r{position:05d}")
    until(page, DRAWN)
    assert len({page.locator(".strip canvas").nth(k).screenshot() for k in range(frames_shown)}) == frames_shown


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 4, 5])
def test_the_copied_commands_ask_for_the_same_clip(
    site: Site, visit: Callable[..., Visit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).open(f"{site.uri}#id=r{index:05d}")

    page.locator(".again").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()

    commands = page.evaluate("navigator.clipboard.readText()")
    assert commands == page.locator("#again").inner_text()
    files, _, run = commands.rpartition("\n")
    subprocess.run(["bash", "-euo", "pipefail", "-c", files], cwd=tmp_path, check=True)
    assert run == "pia-batch run again.yaml --manifest again.jsonl --output again"
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load(Path("again.yaml"), {"manifest": "again.jsonl", "output": "again"})
    made = make_plan(config)
    assert (made.num_pending, made.num_rejected) == (1, 0)
    table = next(iter(made.manifest.batches())).table
    request = validation.check(table, config, made.engine_ids).requests.to_pylist()[0]
    wanted = site.rows[index] | ({"width": None, "height": None} if index == 5 else {})  # they come from the image
    for name in ("request_id", "prompt", "image_sha256", *SETTINGS.names):
        assert request[name] == wanted.get(name, request[name]), name
    image = fetch.read_image(request["image"], made.manifest.folder, config.images)
    assert image == (site.folder / "manifest" / "images" / f"{index % 5}.png").read_bytes()


@pytest.mark.parametrize("index", [0, 3])
def test_the_file_of_a_result_can_be_inspected(site: Site, visit: Callable[..., Visit], index: int) -> None:
    row = site.rows[index]
    name = layout.animation_name(row["key"], codecs.CODECS[row["format"]].extension)
    assert inspected(visit().open(f"{site.uri}#id={row['request_id']}")) == site.folder / "out" / name


def test_prompts_by_frame_are_under_the_frames_where_they_begin(visit: Callable[..., Visit], tmp_path: Path) -> None:
    keys = [{"frame": 0, "prompt": "a red circle"}, {"frame": 4, "prompt": "a blue square"}]
    rows = [result(0, prompt=None, prompts=keys, prompt_interpolation="linear", prompt_hold=0.5), result(1)]
    page = visit().open(f"{build(tmp_path, rows).uri}#id=r00000")
    until(page, "document.querySelectorAll('dialog .strip .key').length === 2")

    assert page.locator("dialog .strip .key").all_inner_texts() == ["a red circle", "a blue square"]
    left = "(node) => Math.round(node.getBoundingClientRect().left)"
    starts = [key.evaluate(left) for key in page.locator("dialog .strip .key").all()]
    frames_at = [frame.evaluate(left) for frame in page.locator("dialog .strip > li:not(.key)").all()]
    assert starts == [frames_at[0], frames_at[4]]
    assert "linear between texts, each held for 0.5 of the way" in page.locator("dialog .frames .note").inner_text()
    assert page.locator("dialog .detail-body > .prompt").inner_text() == "0: a red circle / 4: a blue square"


@pytest.mark.parametrize(("file_format", "codec"), [("webm", None), ("mp4", "av1")])
def test_other_videos_play_and_show_their_frames(
    file_format: str, codec: str | None, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    page = visit().open(f"{build(tmp_path, [result(0, format=file_format, codec=codec), result(1)]).uri}#id=r00000")

    until(page, "document.querySelectorAll('dialog .strip canvas').length === 8")
    until(page, DRAWN)
    assert page.evaluate("document.querySelector('dialog video').videoWidth") == 64


@contextmanager
def served(site: Site) -> Iterator[str]:
    """A plain web server over the site; the address of the page. From a disk a browser shows no pixels to scripts."""
    handler = functools.partial(QuietHandler, directory=site.folder)
    with serving(handler) as address:
        yield f"{address}/out/_runs/{RUN}/report.html"


def strip_of(page: Page) -> npt.NDArray[np.int_]:
    """The frame strip of the result that is open; shape (8, 64, 64, 3), 0-255."""
    until(page, "[...document.querySelectorAll('.strip canvas')].every((canvas) => canvas.height === 64)")
    pixels = page.evaluate("""[...document.querySelectorAll('.strip canvas')].map((canvas) =>
      [...canvas.getContext('2d').getImageData(0, 0, 64, 64).data])""")
    return np.asarray(pixels).reshape(-1, 64, 64, 4)[..., :3].astype(int)


LATE = """
const tell = HTMLVideoElement.prototype.requestVideoFrameCallback;
HTMLVideoElement.prototype.requestVideoFrameCallback = function (callback) {
  this.late = !this.late;
  return this.late ? setTimeout(() => callback(0, { mediaTime: -1 })) : tell.call(this, callback);
};"""
"""A browser that says of each frame first that it still shows the one before."""

SILENT = "delete HTMLVideoElement.prototype.requestVideoFrameCallback;"


@pytest.mark.long
@pytest.mark.parametrize("browser", ["", LATE], ids=["as it is", "late"])
def test_a_plain_web_server_is_enough(site: Site, visit: Callable[..., Visit], browser: str) -> None:
    window = visit()
    window.page.add_init_script(browser)
    with served(site) as uri:
        page = window.open(f"{uri}#id=r00000")

        shown = strip_of(page)
        page.context.close()

    assert max(np.abs(shown - frames(0)).mean(axis=(1, 2, 3))) < 4  # frame k of the strip is frame k of the animation
    origin = uri.removesuffix(f"/out/_runs/{RUN}/report.html")
    assert all(asked.startswith((origin, "data:")) for asked in window.asked)


def test_a_browser_that_does_not_tell_which_frame_it_shows_gets_a_strip_too(
    site: Site, visit: Callable[..., Visit]
) -> None:
    window = visit()
    window.page.add_init_script(SILENT)
    with served(site) as uri:
        shown = strip_of(window.open(f"{uri}#id=r00000"))
        window.page.context.close()

    assert shown.std(axis=(1, 2, 3)).min() > 4  # pictures, whichever they are


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name for it
        pass


@pytest.mark.long
def test_the_copied_commands_make_the_same_frames(
    visit: Callable[..., Visit], write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    table = requests_table(2, num_inference_steps=[2, 3], motion_scale=[0, 4], format=["gif", "webp"])
    output = tmp_path / "out"
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = functools.partial(subprocess.run, check=True, capture_output=True, text=True, env=os.environ | programs)
    start(["pia-batch", "run", "--manifest", write_manifest(table), "--output", output])
    printed = start(["pia-batch", "report", output]).stdout
    page = visit().open(f"{re.search('report: (.*)', printed)[1]}#id=r001")

    assert "prompt" in start(["bash", "-euc", page.locator("#inspect").inner_text()]).stdout
    start(["bash", "-euc", page.locator("#again").inner_text()], cwd=tmp_path)

    (drawn,), (again,) = output.glob("animations/*/*.webp"), tmp_path.glob("again/animations/*/*")
    assert pixels(again) == pixels(drawn)


def pixels(animation: Path) -> list[bytes]:
    with Image.open(animation) as opened:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(opened)]
