"""Media that a small run embeds."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from inputs import png
from PIL import Image
from reported import (
    data_in,
    frames,
    page_of,
    publish,
    result,
    store_clip,
    values_of,
)

from pia_batch import report
from pia_batch.report.embedded import with_embedded
from pia_batch.report.links import MediaLinks
from pia_batch.schema.columns import RESULT
from pia_batch.storage.object_store import Store


def picture_in(data_uri: str) -> Image.Image:
    kind, _, encoded = data_uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_a_small_run_embeds_what_a_browser_cannot_get_by_itself(store: Store, tmp_path: Path) -> None:
    rows = [result(k, format=form) for k, form in enumerate(["mp4", "gif", "webp", "png_zip"])]
    for row in rows:
        store_clip(store, row)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1, 320, 160))
    table = pa.Table.from_pylist(rows, RESULT)
    table = table.append_column("image_ref", pa.array(["at/0.png", None, None, "at/3.png"]))  # the third is missing

    local = MediaLinks(store.uri, store.uri_of("report.html"), tmp_path.as_uri(), None, {})
    embedded = with_embedded(table, store, local)

    thumbnails, strips = embedded["thumbnail"].to_pylist(), embedded["strip"].to_pylist()
    assert [thumbnail is None for thumbnail in thumbnails] == [True, False, True, True]
    assert picture_in(thumbnails[1]).size == (160, 80)
    assert strips[0] is None  # a browser seeks in MP4
    assert [picture_in(strip).size for strip in strips[1:]] == [(8 * 72, 72)] * 3
    shown = np.asarray(picture_in(strips[3]).convert("RGB"), dtype=int)[36, 36::72]
    assert np.abs(shown - frames(0)[:, 32, 32]).max() < 24  # the frames, in order, but for what WebP loses


def test_a_page_embeds_as_it_is_asked(store: Store) -> None:
    rows = [result(0, format="gif")]
    publish(store, rows)
    store_clip(store, rows[0])
    assert values_of(data_in(page_of(store)), "strip") != [None]
    assert "strip" not in data_in(page_of(store, embed=False))["columns"]


def test_a_larger_run_embeds_nothing_unless_asked(store: Store) -> None:
    publish(store, [result(k, format="gif") for k in range(report.EMBED_UP_TO + 1)])
    assert "strip" not in data_in(page_of(store))["columns"]
    assert values_of(data_in(page_of(store, embed=True)), "strip") == [None] * (report.EMBED_UP_TO + 1)  # none is there
