"""Stages over a block of requests before it is animated: plain classes over Arrow tables that do not use Ray.

Validate → DropFinished → Arrange → FetchImages → `animate.Animate`. No stage raises for a bad request: the stage sets
`error_kind` and `error` of its row, and the later stages pass the row through.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.config.model_limits import NO_LIMITS, Limits
from pia_batch.errors import ImageMismatchError, ImageUnavailableError, ImageUnreadableError, RequestError
from pia_batch.manifest import unify, validation
from pia_batch.manifest.arrow_types import can_be_moved, plain_column, refuse_unsupported
from pia_batch.manifest.column_layout import Layout
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.files import BATCH_ROWS
from pia_batch.media import fetch, images
from pia_batch.pipeline.request_rows import ROW_ERROR, with_row_error
from pia_batch.planning import selection
from pia_batch.planning.statistics import call_frames
from pia_batch.schema.columns import (
    ATTEMPT_KEY,
    CALL_FRAMES,
    EFFECTIVE,
    FETCHED,
    GROUPED,
    RANK,
    REQUEST,
    Row,
    carried_columns,
    named_texts,
    rejected_keys,
)
from pia_batch.schema.keys import KeySet, keys_from_hex

DATASET = "this Dataset of requests"
"""Name of a user's Dataset in messages, as it has no address."""

_HEAD_BYTES = 64 * 1024
"""Number of bytes at the start of an image that hold its width and height in nearly every file."""


def checked_layout(schema: pa.Schema, column_map: ColumnMap) -> Layout:
    """Return the columns of a user's Dataset under our names, after checking that they can be those of requests.

    Raises:
        ManifestError: A required column or a mapped source is missing, or a column has the name of a result's, or a
            type that results cannot hold.
    """
    layout = column_map.layout(schema, DATASET)
    names = layout.schema.names
    if not column_map.has_all(names):
        raise column_map.not_found(names, schema, DATASET)
    unify.check_columns(names, DATASET, column_map.ids)
    refuse_unsupported([field for field in layout.schema if field.name not in REQUEST.names], DATASET)
    return layout


class Validate:
    """Stage that turns manifest rows into effective requests with keys and the columns ROW_ERROR.

    A run drops the rejected rows, because its plan has reported them. Without a plan they are kept: `error_kind` and
    `error` give the reason, only the texts `columns.NAMED` are filled in, and every row gets an ATTEMPT_KEY of its own,
    because rows may be repeated, and each of them is animated.

    Args:
        config: Config of the run.
        engine_ids: Identity of each model's engine.
        limits: Limits of each model that its files decide.
        keep_rejected: Keep rejected rows, in their place.
    """

    def __init__(
        self,
        config: RunConfig,
        engine_ids: Mapping[str, str],
        limits: Limits = NO_LIMITS,
        *,
        keep_rejected: bool = False,
    ) -> None:
        self._config, self._engine_ids, self._limits, self._keep_rejected = config, engine_ids, limits, keep_rejected

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the requests in the order of `rows`.

        Args:
            rows: Rows as `manifest.pieces.Piece.tables` gives them, or of a user's Dataset if rejected ones are kept.

        Raises:
            ManifestError: A required column is missing in a user's Dataset, or one has a type that results cannot hold.
        """
        if self._keep_rejected:
            rows = checked_layout(rows.schema, ColumnMap.of(self._config)).table(rows)
        # In parts: a block may be a whole row group of a million rows, and checking a row takes about 2 KiB.
        starts = range(0, max(1, len(rows)), BATCH_ROWS)
        validate = self._all if self._keep_rejected else self._valid
        return pa.concat_tables([validate(rows.slice(start, BATCH_ROWS)) for start in starts])

    def _valid(self, rows: pa.Table) -> pa.Table:
        return with_row_error(validation.check(rows, self._config, self._engine_ids, self._limits).requests)

    def _all(self, rows: pa.Table) -> pa.Table:
        rows = _plain(rows)
        checked = validation.check(rows, self._config, self._engine_ids, self._limits)
        valid = with_row_error(checked.requests)
        rejected = self._rejected(rows.take(checked.rejected["row"]), checked.rejected)
        both = pa.concat_tables([valid, rejected.select(valid.column_names)])
        order = np.argsort(np.concatenate([checked.rows, checked.rejected["row"].to_numpy()]))
        attempt_keys = pa.array([uuid.uuid4().hex for _ in order], pa.string())
        return both.take(pa.array(order)).append_column(ATTEMPT_KEY, attempt_keys)

    def _rejected(self, rows: pa.Table, reasons: pa.Table) -> pa.Table:
        columns = {field.name: pa.nulls(len(rows), field.type) for field in EFFECTIVE}
        columns |= named_texts(rows, self._config.model.name)
        columns |= {name: reasons[name].combine_chunks() for name in ROW_ERROR.names}
        columns["key"] = rejected_keys(columns["request_id"], columns["error"])
        carried = carried_columns(rows)
        return pa.table(columns | {name: carried[name] for name in carried.column_names})


def _plain(rows: pa.Table) -> pa.Table:
    """Return `rows` with decoded columns: those of a request, and those that Arrow cannot move as they are."""
    for at, field in enumerate(rows.schema):
        decoded = field.name in REQUEST.names and not pa.types.is_nested(field.type)
        if decoded or not can_be_moved(field.type):
            rows = rows.set_column(at, field.name, plain_column(rows[field.name]))
    return rows


class DropFinished:
    """Stage that drops finished requests.

    Args:
        finished: Keys of the requests to drop.
        chosen: Keys of the requests to keep, where a run animates only some of them; None: all others.
    """

    def __init__(self, finished: KeySet, chosen: KeySet | None = None) -> None:
        self._finished, self._chosen = finished, chosen

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return the pending ones of `requests`, in order."""
        keys = keys_from_hex(requests["key"])
        pending = ~self._finished.contains(keys)
        return requests.filter(pa.array(pending if self._chosen is None else pending & self._chosen.contains(keys)))


class Rank:
    """Stage that adds the column RANK, by which the requests are sorted, from the numbers of another column."""

    def __init__(self, column: str) -> None:
        self._column = column

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return `requests` with RANK, float64; -inf where the column has no number."""
        return requests.append_column(RANK, pa.array(selection.ranks(requests[self._column])))


class Arrange:
    """Stage that orders a window of requests so that neighbours can share a batch and the model seldom changes.

    Sizes that come from the image (`size: auto`) are read from its first bytes. Where that fails, the size stays null,
    and FetchImages determines it, or the image's error.

    Args:
        config: Section `images` of the config.
        base_uri: Folder that relative image URIs start from.
        original: Names of the models with the arithmetic of PIA's authors, who choose sizes in their own way.
    """

    def __init__(self, config: ImagesConfig, base_uri: str, original: Collection[str] = ()) -> None:
        self._config, self._base_uri, self._original = config, base_uri, original

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return all of `requests`, ordered by GROUPED and then by number of frames, and otherwise as they came."""
        unsized = pc.and_(pc.is_null(requests["width"]), pc.is_null(requests["error_kind"]))
        if pc.any(unsized).as_py():
            rows = requests.filter(unsized).select(["image", "image_bytes", "long_side", "model"]).to_pylist()
            with ThreadPoolExecutor(self._config.threads) as pool:
                sizes = list(pool.map(self._size, rows))
            for index, name in enumerate(("width", "height")):
                found = pa.array([size and size[index] for size in sizes], pa.int64())
                column = pc.replace_with_mask(requests[name].combine_chunks(), unsized.combine_chunks(), found)
                requests = requests.set_column(requests.column_names.index(name), name, column)
        keyed = requests.append_column(CALL_FRAMES, call_frames(requests))
        order = pc.sort_indices(keyed, sort_keys=[(name, "ascending") for name in (*GROUPED, "num_frames")])
        return requests.take(order)

    def _size(self, row: Row) -> tuple[int, int] | None:
        try:
            head = row["image_bytes"] or fetch.read_image_head(row["image"], self._base_uri, self._config, _HEAD_BYTES)
            size = images.size_of(head)
        except RequestError:
            return None
        return None if size is None else _own_size(size, row, self._original)


class FetchImages:
    """Stage that reads, checks, decodes and fits the images of a block, several at a time.

    It replaces `image_bytes` by the columns FETCHED. `pixels` is RGB, uint8, height x width x 3 bytes, or null where
    the row has an error. `ip_adapter_bytes` is the image prompt as it was stored, known to decode. Sizes that are still
    null become the image's own.

    Args:
        config: Section `images` of the config.
        base_uri: Folder that relative image URIs start from.
        original: Names of the models with the arithmetic of PIA's authors, who resample in their own way.
    """

    def __init__(self, config: ImagesConfig, base_uri: str, original: Collection[str] = ()) -> None:
        self._config, self._base_uri, self._original = config, base_uri, original

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return all of `requests`, with the columns FETCHED."""
        with ThreadPoolExecutor(self._config.threads) as pool:
            rows = list(pool.map(self._fetched, requests.select(_FETCH_READS).to_pylist()))
        table = requests.drop_columns(["image_bytes"])
        for field in [*(EFFECTIVE.field(name) for name in ("width", "height")), *ROW_ERROR]:
            column = pa.array([row[field.name] for row in rows], field.type)
            table = table.set_column(table.column_names.index(field.name), field, column)
        for field in FETCHED:
            table = table.append_column(field, pa.array([row[field.name] for row in rows], field.type))
        return table

    def _fetched(self, row: Row) -> Row:
        row |= dict.fromkeys(FETCHED.names)
        if row["error_kind"] is not None:
            return row
        started = time.monotonic()
        try:
            self._fetch(row)
        except RequestError as err:
            row |= {"error_kind": err.kind, "error": str(err), "pixels": None}
        return row | {"fetch_seconds": time.monotonic() - started}

    def _fetch(self, row: Row) -> None:
        """Fill in the columns FETCHED of a row, and its size."""
        data = row["image_bytes"] or fetch.read_image(row["image"], self._base_uri, self._config)
        if len(data) > self._config.max_bytes:
            msg = (
                f"column 'image_bytes': {len(data)} bytes, above images.max_bytes {self._config.max_bytes}; raise the "
                "limit, or store a smaller image"
            )
            raise ImageUnavailableError(msg)
        row["fetched_sha256"] = hashlib.sha256(data).hexdigest()
        if row["image_sha256"] not in (None, row["fetched_sha256"]):
            msg = (
                f"column 'image_sha256': the image has {row['fetched_sha256']}, the manifest says "
                f"{row['image_sha256']}; correct the column, or restore the image"
            )
            raise ImageMismatchError(msg)
        image = images.decode(data, max_pixels=self._config.max_pixels, background=self._config.background)
        if row["width"] is None:
            row["width"], row["height"] = _own_size(image.size, row, self._original)
        if row["size"] == "auto" and row["model"] in self._original:
            fitted = images.shrink(image, row["long_side"])
        else:
            fitted = images.fit(image, row["width"], row["height"], self._config.fit, self._config.background)
        row["ip_adapter_bytes"] = self._image_prompt(row["ip_adapter_image"])
        row["pixels"] = fitted.tobytes()

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


def _own_size(size: tuple[int, int], row: Row, original: Collection[str]) -> tuple[int, int]:
    """Return the size of a clip that keeps an image's shape, by the rule of the row's model."""
    own = images.original_size if row["model"] in original else images.bucket
    return own(*size, row["long_side"])


_FETCH_READS = [
    *("image", "image_bytes", "image_sha256", "model", "size", "width", "height", "long_side", "ip_adapter_image"),
    *ROW_ERROR.names,
]
"""Columns that FetchImages reads."""
