"""Images that a source names by URI: full URIs, and on demand their bytes or their sizes, several at a time."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ImagesConfig
from pia_batch.errors import ImageUnreadableError, RequestError
from pia_batch.manifest import inline_images
from pia_batch.media import fetch, images
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.uris import Policy, RefusedError, redacted_uri

HTTP = fetch.HTTP
"""Reader of http and https URLs, which are read from public hosts only."""

_HEAD_BYTES = 64 * 1024
"""Number of bytes at the start of an image that hold its width and height in nearly every file."""

_IS_FULL = r"^([a-zA-Z][a-zA-Z0-9+.-]+://|/)"

Reason = str
"""Text that says why an image cannot be used."""


@dataclass(frozen=True)
class ImageReader:
    """Reader of the images of one source. It can be pickled.

    Attributes:
        base_uri: Folder that relative URIs start from, and whose images may be read; empty: none.
        config: Limits of fetching, and further places that images may come from.
        column: Column of the source, for messages.
    """

    base_uri: str
    config: ImagesConfig
    column: str

    def resolve(self, uris: pa.Array, folder: str = "") -> tuple[pa.Array, dict[int, Reason]]:
        """Return full URIs in place of relative ones, which would be relative to the manifest, and why some have none.

        Args:
            uris: URIs, paths, or images as text, which stay as they are.
            folder: Folder inside `base_uri` that relative ones start from.

        Returns:
            The URIs, and reasons by row.
        """
        is_other = pc.or_(
            pc.match_substring_regex(uris, _IS_FULL), pc.match_substring_regex(uris, inline_images.PATTERN)
        )
        relative = pc.and_(pc.is_valid(uris), pc.invert(pc.fill_null(is_other, True)))
        if not pc.any(relative).as_py():
            return uris, {}
        policy, reasons, texts = Policy(self.base_uri, self.config.allow), dict[int, Reason](), uris.to_pylist()
        for row in pc.indices_nonzero(relative).to_pylist():
            try:
                texts[row] = policy.meaning(posixpath.join(folder, texts[row])).target
            except RefusedError as err:
                reasons[row] = self._reason(f"column {self.column!r}: {redacted_uri(texts[row])} {err}")
        return pa.array(texts, pa.string()), reasons

    def contents(self, uris: Iterable[str | None]) -> Iterator[tuple[bytes | None, Reason | None]]:
        """Yield the bytes of each image, or why there are none; both are None for no URI."""
        return map_in_threads(self._content, uris, self.config.threads)

    def sizes(self, images_or_uris: Iterable[bytes | str | None]) -> Iterator[tuple[int, int] | Reason | None]:
        """Yield the upright width and height of each image in pixels, or why it has none; None for no image."""
        return map_in_threads(self._size, images_or_uris, self.config.threads)

    def _content(self, uri: str | None) -> tuple[bytes | None, Reason | None]:
        if uri is None:
            return None, None
        try:
            inline = inline_images.decoded(uri)
            if inline is None:
                return fetch.read_image(uri, self.base_uri, self.config, column=self.column, http=HTTP), None
        except RequestError as err:
            return None, self._reason(str(err))
        except ValueError as err:
            return None, f"column {self.column!r}: {err}"
        if len(inline) > self.config.max_bytes:
            return None, f"column {self.column!r}: {len(inline)} bytes, above the limit of {self.config.max_bytes}"
        return inline, None

    def _size(self, image: bytes | str | None) -> tuple[int, int] | Reason | None:
        if image is None:
            return None
        try:
            if isinstance(image, bytes):
                return images.size_of(image) or "the image cannot be read: it ends too early"
            head = fetch.read_image_head(image, self.base_uri, self.config, _HEAD_BYTES, column=self.column, http=HTTP)
            size = images.size_of(head)
            if size is None:
                size = images.size_of(
                    fetch.read_image(image, self.base_uri, self.config, column=self.column, http=HTTP)
                )
            return size or f"column {self.column!r}: {redacted_uri(image)} cannot be read: it ends too early"
        except ImageUnreadableError as err:
            return f"the image cannot be read: {err}"
        except RequestError as err:
            return self._reason(str(err))

    @staticmethod
    def _reason(text: str) -> Reason:
        """Return an error of a run with the option that `prepare` has in place of the config's key."""
        return text.replace("images.allow", "--allow")
