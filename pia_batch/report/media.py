"""Animations and condition images as a page names them: by reference where a browser can get at them there."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import ValidationError

from pia_batch.config import Format, ImagesConfig
from pia_batch.errors import ConfigError, RequestError
from pia_batch.journal import layout
from pia_batch.media import codecs, fetch, images
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.storage import schemes, uris
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.object_store import Store

NO_ANSWER_S = 5.0
"""Seconds that one condition image may take to become a thumbnail."""

_THUMBNAIL_PX = 160
_STRIP_PX = 72
_STRIP_FRAMES = 16
_THREADS = 16


class Places:
    """Where things lie as seen from the page."""

    def __init__(
        self, output: str, page: str, folder: str, media_url: str | None, images_config: dict[str, Any] | None
    ) -> None:
        """Where everything is.

        Args:
            output: the URI of the output.
            page: the URI of the page.
            folder: the URI of the manifest's folder, from which relative image paths start; empty: not known.
            media_url: the http address of the output, if it has one.
            images_config: the section `images` of the run's config.

        Raises:
            ConfigError: nothing at `page` could find the animations.
        """
        self.folder, self._output, self._page, self._media_url = folder, Place.of(output), Place.of(page), media_url
        try:
            self.images = ImagesConfig.model_validate(images_config or {})
        except ValidationError:  # of another version
            self.images = ImagesConfig()
        self._policy = uris.Policy(folder, self.images.allow)
        if media_url is not None and not _is_web(media_url):
            msg = f"--media-url {media_url}: the http or https address of the output folder is wanted"
            raise ConfigError(msg)
        if media_url is None and self._page.root != self._output.root:
            msg = (
                f"a page at {page} cannot show what lies in {output}; leave out --out to store it there, or name the "
                "http address of the output by --media-url"
            )
            raise ConfigError(msg)

    def animation(self, key: str, extension: str) -> str:
        """The reference of an animation."""
        name = layout.animation_name(key, extension)
        if self._media_url is not None:
            return f"{self._media_url.rstrip('/')}/{name}"
        return self._relative((*self._output.parts, *name.split("/")))

    def image(self, image: str | None) -> str | None:
        """The reference of a condition image; None where a browser that shows the page cannot get at it."""
        if not image or not (self.folder or image.startswith("/") or "://" in image):
            return None
        try:
            location = self._policy.locate(image)
        except uris.RefusedError:
            return None
        if location.is_web:
            return location.target
        same = (location.scheme, location.authority) == self._page.root
        return self._relative(location.parts) if same else None

    @property
    def sources(self) -> dict[str, str]:
        """Where pictures and films may come from, as directives of a content security policy."""
        site = [] if self._media_url is None else [_origin(uris.parse(self._media_url))]
        opened = [uris.parse_prefix(entry) for entry in self.images.allow]
        web = [_origin(place) for place in opened if place.is_web]
        return {"img-src": " ".join(["'self'", "data:", *site, *web]), "media-src": " ".join(["'self'", *site])}

    def _relative(self, parts: tuple[str, ...]) -> str:
        """A relative reference, percent-encoded segment by segment. It never has a scheme: no colon is left."""
        here = self._page.parts[:-1]
        common = 0
        while common < min(len(here), len(parts) - 1) and here[common] == parts[common]:
            common += 1
        down = [quote(part, safe="") for part in parts[common:]]
        return "/".join([".."] * (len(here) - common) + down) if len(here) > common else "/".join([".", *down])


@dataclass(frozen=True)
class Place:
    """A URI in two parts: what a relative reference can never leave, and the way from there."""

    root: tuple[str, str]
    parts: tuple[str, ...]

    @classmethod
    def of(cls, uri: str) -> Place:
        """Of the output or of the page; images are judged by `uris.Policy`."""
        scheme, _, rest = schemes.canonical(uri).partition("://")
        authority, _, path = rest.partition("/")
        path = unquote(path) if scheme == "file" else path  # keys are spelled as they are
        return cls((scheme, authority), tuple(path.split("/")))


def _is_web(url: str) -> bool:
    try:
        return uris.parse(url).is_web
    except uris.RefusedError:
        return False


def _origin(place: uris.Location) -> str:
    return f"{place.scheme}://{place.authority}"


def with_media(rows: pa.Table, places: Places) -> pa.Table:
    """`rows` with `media`, the reference of each animation, and `image_ref`, that of its condition image, or null."""
    media = [
        places.animation(key, codecs.CODECS[form].extension) if status == SUCCEEDED else None
        for key, form, status in zip(*(rows[name].to_pylist() for name in ("key", "format", "status")), strict=True)
    ]
    references = {image: places.image(image) for image in pc.unique(rows["image"]).to_pylist()}
    found = [references[image] for image in rows["image"].to_pylist()]
    return _extended(rows, media=media, image_ref=found)


def with_embedded(rows: pa.Table, store: Store, places: Places) -> pa.Table:
    """`rows` with `thumbnail` and `strip`: data URIs of what a browser cannot get by itself, null elsewhere."""
    unreachable = [
        image if reference is None else None
        for image, reference in zip(rows["image"].to_pylist(), rows["image_ref"].to_pylist(), strict=True)
    ]
    drawn = zip(*(rows[name].to_pylist() for name in ("key", "format", "status")), strict=True)
    wanted = sorted({image for image in unreachable if image})
    made = map_in_threads(lambda image: _thumbnail(image, places), wanted, _THREADS)
    thumbnails = dict(zip(wanted, made, strict=True))
    strips = list(store.each(lambda row: _strip(store, *row), drawn, _THREADS))
    return _extended(rows, thumbnail=[thumbnails.get(image) for image in unreachable], strip=strips)


def _extended(rows: pa.Table, **columns: list[str | None]) -> pa.Table:
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values, pa.string()))
    return rows


def _thumbnail(image: str, places: Places) -> str | None:
    settings = places.images.model_copy(update={"timeout_s": min(places.images.timeout_s, NO_ANSWER_S)})
    try:
        data = fetch.read_image(image, places.folder, settings)
        picture = images.decode(data, max_pixels=settings.max_pixels, background=settings.background)
    except RequestError:  # as its request did, or it went away since
        return None
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _data_uri(picture)


def _strip(store: Store, key: str, form: Format, status: str) -> str | None:
    """Up to `_STRIP_FRAMES` frames of an animation, side by side. None for MP4, which the browser itself can seek."""
    if status != SUCCEEDED or codecs.CODECS[form].player == "video":
        return None
    try:
        data = store.read(layout.animation_name(key, codecs.CODECS[form].extension))
        frames = codecs.decode(data, form)
    except (FileNotFoundError, RequestError):  # `verify` is there to complain
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
