"""Embedded media of a page: thumbnails and frame strips that a browser cannot get by itself, as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import pyarrow as pa
from PIL import Image

from pia_batch.config import Format
from pia_batch.errors import RequestError, StorageError
from pia_batch.journal import layout
from pia_batch.media import codecs, fetch, images
from pia_batch.report.links import MediaLinks, extended
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.object_store import Store

NO_ANSWER_S = 5.0
"""Time limit for fetching one condition image for a thumbnail, in seconds."""

_THUMBNAIL_PX = 160
_STRIP_PX = 72
_STRIP_FRAMES = 16
_THREADS = 16
_PLAYED_EVERYWHERE = (None, "h264")
"""Video codecs of results that every browser plays; None: that of a WebM file."""


def with_embedded(rows: pa.Table, store: Store, links: MediaLinks) -> pa.Table:
    """Return `rows` with `thumbnail` and `strip`: data URIs of media that a browser cannot get by itself, else null."""
    unreachable = [
        image if reference is None else None
        for image, reference in zip(rows["image"].to_pylist(), rows["image_ref"].to_pylist(), strict=True)
    ]
    animations = zip(*(rows[name].to_pylist() for name in ("key", "format", "codec", "status")), strict=True)
    wanted = sorted({image for image in unreachable if image})
    made = map_in_threads(lambda image: _thumbnail(image, links), wanted, _THREADS)
    thumbnails = dict(zip(wanted, made, strict=True))
    strips = list(store.each(lambda row: _strip(store, *row), animations, _THREADS))
    return extended(rows, thumbnail=[thumbnails.get(image) for image in unreachable], strip=strips)


def _thumbnail(image: str, links: MediaLinks) -> str | None:
    settings = links.images.model_copy(update={"timeout_s": min(links.images.timeout_s, NO_ANSWER_S)})
    try:
        data = fetch.read_image(image, links.folder, settings)
        picture = images.decode(data, max_pixels=settings.max_pixels, background=settings.background)
    except (RequestError, StorageError):  # its request failed for the same reason, or the image cannot be had any more
        return None
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _data_uri(picture)


def _strip(store: Store, key: str, form: Format, codec: str | None, status: str) -> str | None:
    """Return up to `_STRIP_FRAMES` frames of an animation, side by side; None for a video that every browser seeks."""
    if status != SUCCEEDED or (codecs.CODECS[form].player == "video" and codec in _PLAYED_EVERYWHERE):
        return None
    try:
        data = store.read(layout.animation_name(key, codecs.CODECS[form].extension))
        frames = codecs.decode(data, form)
    except (FileNotFoundError, RequestError):  # `pia-batch verify` reports it
        return None
    chosen = np.unique(np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int))
    width = max(1, round(frames.shape[2] * _STRIP_PX / frames.shape[1]))
    strip = Image.new("RGB", (width * len(chosen), _STRIP_PX))
    for place, index in enumerate(chosen):
        strip.paste(Image.fromarray(frames[index]).resize((width, _STRIP_PX)), (place * width, 0))
    return _data_uri(strip)


def _data_uri(picture: Image.Image) -> str:
    sink = io.BytesIO()
    picture.save(sink, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"
