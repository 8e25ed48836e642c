"""What happens to a block of requests before it is animated: plain classes over Arrow tables that know nothing of Ray.

Validate → DropFinished → Arrange → FetchImages → `worker.Animate`. No stage raises for a bad request: it becomes a
failed result with a kind, and its neighbours go on.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.errors import ImageMismatchError, ImageUnavailableError, ImageUnreadableError, RequestError
from pia_batch.manifest import unify, validation
from pia_batch.manifest.files import BATCH_ROWS, plain_type
from pia_batch.media import fetch, images
from pia_batch.planning import selection
from pia_batch.schema.columns import (
    EFFECTIVE,
    FETCHED,
    GROUPED,
    REQUEST,
    Row,
    carried_columns,
    named_texts,
    rejected_keys,
)
from pia_batch.schema.keys import KeySet, keys_from_hex

RANK = "__rank__"
"""A column between Rank and the sort."""

DATASET = "this Dataset of requests"
"""What messages call it: it has no address."""

ERROR_KIND, ERROR = "__error_kind__", "__error__"
"""Columns between Judge and the result: why a row is rejected; null in sound ones."""

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


class Judge:
    """Turns rows that no plan has seen into effective requests with keys. Rejected ones stay, and say why.

    What `Validate` gives, and besides ERROR_KIND and ERROR, null but for the rejected rows, of which only the texts
    `records.NAMED` are there. Each row's key has a part of its own after a colon, for rows may be repeated here, and
    drawn more than once: `content_key` takes it off.
    """

    def __init__(self, config: RunConfig, engine_ids: Mapping[str, str]) -> None:
        self._config, self._engine_ids = config, engine_ids

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One row for each of `rows`, in their order; a ManifestError where a required column is missing."""
        unify.check_columns(rows.column_names, DATASET)
        starts = range(0, max(1, len(rows)), BATCH_ROWS)
        return pa.concat_tables([self._judge(_plain(rows.slice(at, BATCH_ROWS))) for at in starts])

    def _judge(self, rows: pa.Table) -> pa.Table:
        checked = validation.check(rows, self._config, self._engine_ids)
        rejected = self._rejected(rows.take(checked.rejected["row"]), checked.rejected)
        sound = checked.requests
        for name in (ERROR_KIND, ERROR):
            sound = sound.append_column(name, pa.nulls(len(sound), pa.string()))
        both = pa.concat_tables([sound, rejected.select(sound.column_names)])
        order = np.argsort(np.concatenate([checked.rows, checked.rejected["row"].to_numpy()]))
        return _numbered(both.take(pa.array(order)))

    def _rejected(self, rows: pa.Table, reasons: pa.Table) -> pa.Table:
        columns = {field.name: pa.nulls(len(rows), field.type) for field in EFFECTIVE}
        columns |= named_texts(rows, self._config.model.name)
        kinds, errors = (reasons[name].combine_chunks() for name in ("error_kind", "error"))
        columns |= {"key": rejected_keys(columns["request_id"], errors), ERROR_KIND: kinds, ERROR: errors}
        carried = carried_columns(rows)
        return pa.table(columns | {name: carried[name] for name in carried.column_names})


def _plain(rows: pa.Table) -> pa.Table:
    """`rows` with the values of a request's columns as they are, whatever their encoding."""
    for at, field in enumerate(rows.schema):
        plain = plain_type(field.type)
        if field.name in REQUEST.names and plain != field.type:
            rows = rows.set_column(at, field.name, rows[field.name].cast(plain))
    return rows


def _numbered(requests: pa.Table) -> pa.Table:
    keys = [f"{key}:{uuid.uuid4().hex}" for key in requests["key"].to_pylist()]
    return requests.set_column(requests.column_names.index("key"), "key", pa.array(keys, pa.string()))


def content_key(key: str) -> str:
    """What `Judge` found for the content of a request, out of its `key`."""
    return key.partition(":")[0]


class AroundRejected:
    """Another stage for the sound rows among those of `Judge`; the rejected ones follow them as they are."""

    def __init__(self, stage: Callable[[pa.Table], pa.Table]) -> None:
        self._stage = stage

    def __call__(self, requests: pa.Table) -> pa.Table:
        """What the stage makes of the sound rows, and the rejected ones; null in the columns that they lack."""
        sound, rejected = parted(requests)
        done = self._stage(sound)
        left = rejected.select([name for name in rejected.column_names if name in done.column_names])
        return pa.concat_tables([done, left], promote_options="default")


def parted(requests: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The sound and the rejected rows among those of `Judge`."""
    bad = pc.is_valid(requests[ERROR_KIND])
    return requests.filter(pc.invert(bad)), requests.filter(bad)


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
            head = row["image_bytes"] or fetch.read_image_head(row["image"], self._base_uri, self._config, _HEAD_BYTES)
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
            data = row["image_bytes"] or fetch.read_image(row["image"], self._base_uri, self._config)
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
        data = fetch.read_image(uri, self._base_uri, self._config, column="ip_adapter_image")
        try:
            images.decode(data, max_pixels=self._config.max_pixels, background=self._config.background)
        except ImageUnreadableError as err:
            msg = f"column 'ip_adapter_image': {err}"
            raise ImageUnreadableError(msg) from err
        return data
