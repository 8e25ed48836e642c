"""Fixtures of the report: pages of two sizes, and windows of Chromium that open them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser
from report_visits import Site, Visit, build
from reported import (
    failure,
    publish,
    result,
    store_clip,
)

from pia_batch import report
from pia_batch.storage.object_store import Store


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens browser windows; in the end none of them may have complained."""
    visits: list[Visit] = []

    def start(width: int = 1280, height: int = 900, *, missing: bool = False, **options: Any) -> Visit:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        made = Visit(context.new_page(), missing)
        made.page.on("console", lambda message: made.hear(message.text, message.location["url"]))
        made.page.on("pageerror", lambda error: made.told.append(str(error)))
        made.page.on("request", lambda request: made.asked.append(request.url))
        visits.append(made)
        return made

    yield start
    for made in visits:
        made.page.context.close()
    assert [made.told for made in visits if made.told] == []


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Eighteen results: MP4 but for one of each other format, two models, three kinds of failure."""
    formats = dict(enumerate(("gif", "webp", "png_zip"), start=1))
    rows = [result(k, format=formats.get(k, "mp4"), model=("default", "second")[k == 7]) for k in range(14)]
    rows[3] |= {"first_frame_psnr_db": None, "motion": 99.0}
    rows[4] |= {"motion_scale": 1, "motion_curve": [1.0, 0.5, 0.25]}
    rows[5] |= {"size": "auto", "long_side": 64}
    rows += [failure(k, "non_finite", "the latents of this request are not finite") for k in (14, 15)]
    rows += [
        failure(16, "image_unavailable", "column 'image': images/gone.png does not exist", image="images/gone.png")
    ]
    rows += [failure(17, "out_of_range", "requests.parquet row 17: column 'motion_scale': 9", attempts=0)]
    return build(tmp_path_factory.mktemp("site"), rows)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Ten thousand results, of which one image and two animations are there."""
    rows = [result(k) if k % 50 else failure(k, "non_finite", "not finite") for k in range(10_000)]
    folder = tmp_path_factory.mktemp("large")
    store = publish(Store(str(folder / "out")), rows)
    for k in (1, 9_999):
        store_clip(store, rows[k])
    report.write(store)
    return Site(folder, rows)
