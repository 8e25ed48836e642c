"""What happens to a block of requests before it is animated: plain classes over Arrow tables that know nothing of Ray.

Validate → DropFinished → Arrange → FetchImages → `worker.Animate`. No stage raises for a bad request: it becomes a
failed result with a kind, and its neighbours go on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch import images, selection, sources, validation
from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.errors import ImageMismatchError, ImageUnavailableError, ImageUnreadableError, RequestError
from pia_batch.manifest_files import BATCH_ROWS
from pia_batch.records import FETCHED, GROUPED, KeySet, Row, keys_from_hex

RANK = "__rank__"
"""A column between Rank and the sort."""

_HEAD_BYTES = 64 * 1024
"""Of an image, for its size. What nearly every file has its width and height in."""


class Validate:
    """Turns manifest rows into effective requests with keys. Rejected rows are dropped: the plan has reported them."""

    def __init__(self, config: RunConfig, engine_ids: Mapping[str, str]) -> None:
        self._config, self._engine_ids = config, engine_ids

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Manifest rows as `manifest.Piece.tables` gives them to `validation.Checked.requests`."""
        # In parts: a block of Ray's may be a whole row group of a million rows, and checking one takes about 2 KiB.
        starts = range(0, max(1, len(rows)), BATCH_ROWS)
        parts = [validation.check(rows.slice(at, BATCH_ROWS), self._config, self._engine_ids) for at in starts]
        return pa.concat_tables([part.requests for part in parts])


class DropFinished:
    """Passes on the requests whose key is not in `finished`, and in `chosen` where a run draws some of them only."""

    def __init__(self, finished: KeySet, chosen: KeySet | None = None) -> None:
        self._finished, self._chosen = finished, chosen

    def __call__(self, requests: pa.Table) -> pa.Table:
        """The unfinished ones of `requests`, in order."""
        keys = keys_from_hex(requests["key"])
        due = ~self._finished.contains(keys)
        return requests.filter(pa.array(due if self._chosen is None else due & self._chosen.contains(keys)))


class Rank:
    """Adds the column RANK, by which the requests are sorted: the numbers of another column."""

    def __init__(self, column: str) -> None:
        self._column = column

    def __call__(self, requests: pa.Table) -> pa.Table:
        """`requests` with RANK, float64; -inf where the column has no number."""
        return requests.append_column(RANK, pa.array(selection.ranks(requests[self._column])))


class Arrange:
    """Orders a window of requests so that neighbours can be drawn together, and models change seldom.

    Sizes that come from the image (`size: auto`) are read off the first bytes of it. Where that fails, the size stays
    null, and FetchImages finds it, or says what is wrong with the image.
    """

    def __init__(self, config: ImagesConfig, base_uri: str) -> None:
        self._config, self._base_uri = config, base_uri

    def __call__(self, requests: pa.Table) -> pa.Table:
        """`requests`, every one of them, in another order: by model, frames and size, else as they came."""
        unsized = pc.is_null(requests["width"])
        if pc.any(unsized).as_py():
            rows = requests.filter(unsized).select(["image", "image_bytes", "long_side"]).to_pylist()
            with ThreadPoolExecutor(self._config.threads) as pool:
                sizes = list(pool.map(self._size, rows))
            for index, name in enumerate(("width", "height")):
                found = pa.array([size and size[index] for size in sizes], pa.int64())
                column = pc.replace_with_mask(requests[name].combine_chunks(), unsized.combine_chunks(), found)
                requests = requests.set_column(requests.column_names.index(name), name, column)
        return requests.take(pc.sort_indices(requests, sort_keys=[(name, "ascending") for name in GROUPED]))

    def _size(self, row: Row) -> tuple[int, int] | None:
        try:
            head = row["image_bytes"] or sources.read_image_head(
                row["image"], self._base_uri, self._config, _HEAD_BYTES
            )
            size = images.size_of(head)
        except RequestError:
            return None
        return None if size is None else images.bucket(*size, row["long_side"])


class FetchImages:
    """Reads, checks, decodes and fits the images of a block, several at a time.

    Replaces `image_bytes` by the columns FETCHED: `pixels` is RGB, uint8, height x width x 3 bytes; or null, and then
    `fetch_error_kind` and `fetch_error` say why. `ip_adapter_bytes` is the image prompt as it was stored, known to
    decode. Sizes that are still null are the image's own.
    """

    def __init__(self, config: ImagesConfig, base_uri: str) -> None:
        self._config, self._base_uri = config, base_uri

    def __call__(self, requests: pa.Table) -> pa.Table:
        """`requests`, every one of them, with the columns FETCHED."""
        needed = ["image", "image_bytes", "image_sha256", "width", "height", "long_side", "ip_adapter_image"]
        with ThreadPoolExecutor(self._config.threads) as pool:
            fetched = list(pool.map(self._fetch, requests.select(needed).to_pylist()))
        table = requests.drop_columns(["image_bytes"])
        for name in ("width", "height"):
            column = pa.array([row[name] for row in fetched], pa.int64())
            table = table.set_column(table.column_names.index(name), name, column)
        for field in FETCHED:
            table = table.append_column(field, pa.array([row[field.name] for row in fetched], field.type))
        return table

    def _fetch(self, row: Row) -> Row:
        started = time.monotonic()
        fetched: Row = dict.fromkeys(FETCHED.names) | {"width": row["width"], "height": row["height"]}
        try:
            data = row["image_bytes"] or sources.read_image(row["image"], self._base_uri, self._config)
            if len(data) > self._config.max_bytes:
                msg = f"column 'image_bytes': {len(data)} bytes, above images.max_bytes {self._config.max_bytes}"
                raise ImageUnavailableError(msg)
            fetched["fetched_sha256"] = hashlib.sha256(data).hexdigest()
            if row["image_sha256"] not in (None, fetched["fetched_sha256"]):
                msg = (
                    f"column 'image_sha256': the image has {fetched['fetched_sha256']}, the manifest says "
                    f"{row['image_sha256']}; correct the column, or restore the image"
                )
                raise ImageMismatchError(msg)
            image = images.decode(data, max_pixels=self._config.max_pixels, background=self._config.background)
            if row["width"] is None:
                fetched["width"], fetched["height"] = images.bucket(*image.size, row["long_side"])
            fitted = images.fit(image, fetched["width"], fetched["height"], self._config.fit, self._config.background)
            fetched["ip_adapter_bytes"] = self._image_prompt(row["ip_adapter_image"])
            fetched["pixels"] = fitted.tobytes()
        except RequestError as err:
            fetched["fetch_error_kind"], fetched["fetch_error"] = err.kind, str(err)
        fetched["fetch_seconds"] = time.monotonic() - started
        return fetched

    def _image_prompt(self, uri: str | None) -> bytes | None:
        if uri is None:
            return None
        data = sources.read_image(uri, self._base_uri, self._config, column="ip_adapter_image")
        try:
            images.decode(data, max_pixels=self._config.max_pixels, background=self._config.background)
        except ImageUnreadableError as err:
            msg = f"column 'ip_adapter_image': {err}"
            raise ImageUnreadableError(msg) from err
        return data
