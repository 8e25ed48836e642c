"""References from a page to animations and condition images, as a browser that shows the page can reach them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pia_batch.config import ImagesConfig
from pia_batch.errors import ConfigError
from pia_batch.journal import layout
from pia_batch.media import codecs
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.storage import schemes, uris
from pia_batch.storage.object_store import Store
from pia_batch.storage.store_uris import absolute

_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)


class MediaLinks:
    """References to media, relative to the page."""

    def __init__(
        self, output: str, page: str, folder: str, media_url: str | None, images_config: dict[str, Any] | None
    ) -> None:
        """Check that a page can reach the output.

        Args:
            output: URI of the output.
            page: URI of the page.
            folder: URI of the manifest's folder, to which image paths may be relative; empty: not known.
            media_url: HTTP address of the output folder; None: it has none.
            images_config: Section `images` of the run's config.

        Raises:
            ConfigError: A page at `page` could not reach the animations.
        """
        self.folder, self._media_url = folder, media_url
        self._output, self._page = BaseLocation.of(output), BaseLocation.of(page)
        try:
            self.images = ImagesConfig.model_validate(images_config or {})
        except ValidationError:  # of another version
            self.images = ImagesConfig()
        self._policy = uris.Policy(folder, self.images.allow)
        if media_url is not None and not _is_web(media_url):
            msg = f"--media-url: invalid URL (got {media_url}, expected the http or https address of the output folder)"
            raise ConfigError(msg)
        if media_url is None and self._page.root != self._output.root:
            msg = (
                f"a page at {page} cannot show media in {output}; leave out --out to store it there, or give the "
                "http address of the output with --media-url"
            )
            raise ConfigError(msg)

    def animation(self, key: str, extension: str) -> str:
        """Return the reference to an animation."""
        return self._stored(layout.animation_name(key, extension))

    def poster(self, key: str) -> str:
        """Return the reference to the poster of an animation."""
        return self._stored(layout.poster_name(key))

    def _stored(self, name: str) -> str:
        """Return the reference to an object of the output."""
        if self._media_url is not None:
            return f"{self._media_url.rstrip('/')}/{name}"
        return self._relative((*self._output.parts, *name.split("/")))

    def image(self, image: str | None) -> str | None:
        """Return the reference to a condition image; None if a browser that shows the page cannot reach it."""
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

    def linked_page(self, uri: str) -> tuple[str, str]:
        """Return title and reference of another page of this package.

        Args:
            uri: HTTP(S) address, or a file or URI at which the page is stored.

        Raises:
            ConfigError: There is no such page, or a browser that shows this one could not reach it.
            StorageError: The store refused or did not answer.
        """
        if _is_web(uri):
            return uri.rstrip("/").rpartition("/")[2], uri
        parent, _, name = absolute(uri).rpartition("/")
        name = unquote(name) if parent.startswith("file://") else name
        store = Store(parent)
        place = BaseLocation.of(store.uri_of(name))
        if place.root != self._page.root:
            msg = (
                f"--comparison: the page of the run cannot link to {uri}; store both in one place, or give the http "
                "address of the comparison"
            )
            raise ConfigError(msg)
        try:
            html = store.read(name).decode(errors="replace")
        except FileNotFoundError:
            msg = f"--comparison: {uri} does not exist; `pia-batch compare A B --out {uri}` writes it"
            raise ConfigError(msg) from None
        title = _TITLE.search(html)
        return unescape(title[1]) if title else name, self._relative(place.parts)

    @property
    def sources(self) -> dict[str, str]:
        """Permitted sources of pictures and videos, as directives of a content security policy."""
        site = [] if self._media_url is None else [_origin(uris.parse(self._media_url))]
        opened = [uris.parse_prefix(entry) for entry in self.images.allow]
        web = [_origin(place) for place in opened if place.is_web]
        return {"img-src": " ".join(["'self'", "data:", *site, *web]), "media-src": " ".join(["'self'", *site])}

    def _relative(self, parts: tuple[str, ...]) -> str:
        """Return a relative reference, percent-encoded segment by segment. It has no colon, so never a scheme."""
        here = self._page.parts[:-1]
        common = 0
        while common < min(len(here), len(parts) - 1) and here[common] == parts[common]:
            common += 1
        down = [quote(part, safe="") for part in parts[common:]]
        return "/".join([".."] * (len(here) - common) + down) if len(here) > common else "/".join([".", *down])


@dataclass(frozen=True)
class BaseLocation:
    """URI of the output or of the page, in two parts."""

    root: tuple[str, str]
    """Scheme and authority, which a relative reference cannot change."""
    parts: tuple[str, ...]
    """Segments of the path."""

    @classmethod
    def of(cls, uri: str) -> BaseLocation:
        """Parse the URI of the output or of the page; image URIs are parsed by `uris.Policy`."""
        scheme, _, rest = schemes.canonical(uri).partition("://")
        authority, _, path = rest.partition("/")
        path = unquote(path) if scheme == "file" else path  # object keys are not percent-encoded
        return cls((scheme, authority), tuple(path.split("/")))


def _is_web(url: str) -> bool:
    try:
        return uris.parse(url).is_web
    except uris.RefusedError:
        return False


def _origin(place: uris.Location) -> str:
    return f"{place.scheme}://{place.authority}"


def with_media(rows: pa.Table, links: MediaLinks) -> pa.Table:
    """Return `rows` with references to files.

    They are `media` to each animation, `poster_ref` to its poster or null, and `image_ref` to its condition image or
    null.
    """
    keys, formats, states, sizes = (rows[name].to_pylist() for name in ("key", "format", "status", "poster_num_bytes"))
    media = [
        links.animation(key, codecs.CODECS[form].extension) if status == SUCCEEDED else None
        for key, form, status in zip(keys, formats, states, strict=True)
    ]
    posters = [None if size is None else links.poster(key) for key, size in zip(keys, sizes, strict=True)]
    references = {image: links.image(image) for image in pc.unique(rows["image"]).to_pylist()}
    found = [references[image] for image in rows["image"].to_pylist()]
    return extended(rows, media=media, poster_ref=posters, image_ref=found)


def extended(rows: pa.Table, **columns: list[str | None]) -> pa.Table:
    """Return `rows` with further text columns."""
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values, pa.string()))
    return rows
