"""Requests made of a source's rows: filtered, with image, prompt and id, under the names that a manifest has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.datasets.image_reader import ImageReader
from pia_batch.datasets.request_columns import RequestColumns, RequestOptions
from pia_batch.datasets.sources import PART_BYTES, Rows
from pia_batch.errors import ConfigError
from pia_batch.manifest import inline_images
from pia_batch.manifest.arrow_types import plain_column, plain_type
from pia_batch.manifest.content_keys import image_identity
from pia_batch.manifest.request_ids import content_ids
from pia_batch.schema.columns import MAX_ID_BYTES, REQUEST
from pia_batch.schema.keys import digest, halves

REJECTS = pa.schema([("place", pa.string()), ("request_id", pa.string()), ("reason", pa.string())])
"""Columns of the rows that became no request because something is wrong with them."""


@dataclass(frozen=True)
class Requests:
    """Requests of some rows, before their variations.

    Attributes:
        table: Columns of a manifest.
        order: Numbers that define the order of requests with `shuffle`, one each; uint64.
        rejects: Rows with REJECTS' columns.
        counts: Numbers of rows by what became of them.
    """

    table: pa.Table
    order: npt.NDArray[np.uint64]
    rejects: pa.Table
    counts: Counter[str]

    def first(self, num_rows: int) -> Requests:
        """Return the first requests, with the others counted as `beyond_limit`."""
        return self.filter(np.arange(len(self.table)) < num_rows)

    def filter(self, kept: npt.NDArray[np.bool_]) -> Requests:
        """Return some of the requests, with the others counted as `beyond_limit`."""
        if kept.all():
            return self
        counts = self.counts + Counter(beyond_limit=int((~kept).sum()))
        return Requests(self.table.filter(pa.array(kept)), self.order[kept], self.rejects, counts)


@dataclass(frozen=True)
class _Draft:
    """Rows that pass the condition and the sample, on their way to requests.

    Attributes:
        columns: Columns of the manifest.
        places: Place of each row.
        reasons: Reason for which each row becomes no request, or None.
        counts: Numbers of rows that were left out before.
    """

    columns: dict[str, pa.Array]
    places: pa.Array
    reasons: list[str | None]
    counts: Counter[str]

    @property
    def num_good(self) -> int:
        """Number of rows that may become requests."""
        return self.reasons.count(None)

    def first(self, num_rows: int) -> _Draft:
        """Return the rows without those that come after the first `num_rows` good ones, which are counted."""
        good = np.fromiter((reason is None for reason in self.reasons), bool, len(self.reasons))
        kept = ~good | (np.cumsum(good) <= num_rows)
        columns = {name: column.filter(pa.array(kept)) for name, column in self.columns.items()}
        reasons = [reason for reason, keep in zip(self.reasons, kept, strict=True) if keep]
        counts = self.counts + Counter(beyond_limit=int((~kept).sum()))
        return _Draft(columns, self.places.filter(pa.array(kept)), reasons, counts)

    def rows(self, start: int, stop: int) -> _Draft:
        """Return some of the rows; the counts go to the first ones."""
        columns = {name: column.slice(start, stop - start) for name, column in self.columns.items()}
        places = self.places.slice(start, stop - start)
        return _Draft(columns, places, self.reasons[start:stop], self.counts if start == 0 else Counter())


class RequestTable:
    """Converter of a source's rows. It can be pickled.

    Args:
        options: Treatment of each row.
        schema: Columns that the source has in all rows or in its first ones; others are taken as they come.
        base_uri: Folder that relative URIs of images start from; empty: none.

    Raises:
        ConfigError: An option names a column that the source does not have, or cannot be with this source.
        ManifestError: No column is the image, or none is the prompt.
    """

    def __init__(self, options: RequestOptions, schema: pa.Schema, base_uri: str = "") -> None:
        self._options = options
        self._schema = pa.schema([pa.field(item.name, plain_type(item.type)) for item in schema])
        if options.where is not None:
            options.where.bind(self._schema)
        self._columns = RequestColumns(options, self._schema)
        self._reader = ImageReader(base_uri, options.fetching, ".".join(self._columns.image))
        if options.images == "uris" and not self._columns.may_have_uris:
            raise ConfigError(_NO_URIS)

    @property
    def notes(self) -> list[str]:
        """Remarks on columns whose names have another meaning in a manifest, for the operator."""
        return self._columns.notes

    @property
    def reads_images(self) -> bool:
        """True if images may be fetched, so that the requests of the same rows can differ from call to call."""
        return self._columns.may_have_uris and (self._options.images == "bytes" or self._options.probe)

    def parts(self, rows: Rows, limit: int | None = None) -> Iterator[Requests]:
        """Yield the requests of some rows; of images that are fetched, in parts of about PART_BYTES.

        Args:
            rows: Rows of the source.
            limit: Largest number of requests; images beyond it are not fetched. None: no limit.

        Raises:
            ManifestError: A value that a template needs is missing, and `on_missing` is `fail`.
            ConfigError: The rows do not have a column of the condition, or another type.
        """
        draft = self._drafted(rows)
        if not self.reads_images:
            requests = self._finished(draft)
            yield requests if limit is None else requests.first(limit)
            return
        for some in self._with_bytes(draft if limit is None else draft.first(limit)):
            yield self._finished(some)

    def count(self, rows: Rows) -> int:
        """Return the number of rows that a limit counts: those that become requests, if their images can be fetched."""
        draft = self._drafted(rows)
        return draft.num_good if self.reads_images else len(self._finished(draft).table)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _drafted(self, rows: Rows) -> _Draft:
        counts = Counter(read=len(rows.table) + rows.skipped, failed_in_source=rows.skipped)
        table, places = self._completed(rows.table), rows.places
        chosen = self._chosen(table, places, counts)
        if len(chosen) < len(table):
            table, places = table.take(pa.array(chosen)), places.take(pa.array(chosen))
        columns, missing = self._columns.made(table, places)
        reasons: list[str | None] = [None] * len(table)
        data = columns.get("image_bytes")
        if self._options.images == "uris" and data is not None and data.null_count < len(data):
            raise ConfigError(_NO_URIS)
        self._resolve(columns, reasons, rows.folder)
        self._reject(columns, missing, reasons)
        self._own_ids(columns, table, places, reasons)
        return _Draft(columns, places, reasons, counts)

    def _completed(self, table: pa.Table) -> pa.Table:
        """Return plain columns, and nulls for those that these rows lack: JSON objects need not have every name."""
        for at, item in enumerate(table.schema):
            if item.type != plain_type(item.type):
                table = table.set_column(at, item.name, plain_column(table.column(at)))
            elif pa.types.is_null(item.type) and item.name in self._schema.names:
                table = table.set_column(at, item.name, pa.nulls(len(table), self._schema.field(item.name).type))
        for item in self._schema:
            if item.name not in table.column_names:
                table = table.append_column(item, pa.nulls(len(table), item.type))
        return table

    def _chosen(self, table: pa.Table, places: pa.Array, counts: Counter[str]) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows that pass the condition and the sample."""
        chosen = np.arange(len(table))
        if self._options.where is not None:
            read = table.select(sorted(self._options.where.columns)).append_column("__row__", pa.array(chosen))
            chosen = self._options.where.keep(read)["__row__"].to_numpy()
            counts["filtered"] = len(table) - len(chosen)
        if self._options.sample is not None:
            most = int(self._options.sample * 2.0**64)
            kept = np.fromiter((int(n) < most for n in _numbers(places.take(pa.array(chosen)), "sample ")), bool)
            counts["not_sampled"] = int((~kept).sum())
            chosen = chosen[kept]
        return chosen

    def _finished(self, draft: _Draft) -> Requests:
        """Return the requests of rows whose images are there, with ids and sizes."""
        columns, places, reasons, counts = dict(draft.columns), draft.places, list(draft.reasons), Counter(draft.counts)
        if self._ids_from == "content":
            columns["request_id"] = _content_ids(columns)
        if self._options.probe:
            self._probe(columns, reasons)
        dropped = np.fromiter((reason == _DROPPED for reason in reasons), bool, len(reasons))
        bad = np.fromiter((reason is not None for reason in reasons), bool, len(reasons))
        counts["dropped_missing"], counts["rejected"] = int(dropped.sum()), int((bad & ~dropped).sum())
        made = pa.table(columns)
        rejected = pa.table(
            [places, columns["request_id"], pa.array([None if r == _DROPPED else r for r in reasons], pa.string())],
            schema=REJECTS,
        ).filter(pa.array(bad & ~dropped))
        if bad.any():
            made, places = made.filter(pa.array(~bad)), places.filter(pa.array(~bad))
        counts["requests"] = len(made)
        return Requests(made, _numbers(places, f"shuffle {self._options.shuffle} "), rejected, counts)

    # --- reasons ----------------------------------------------------------------------------------------------------

    def _reject(
        self, columns: Mapping[str, pa.Array], missing: Mapping[str, pa.Array], reasons: list[str | None]
    ) -> None:
        """Note why rows become no request."""
        absent = pc.is_null(columns["image_bytes"]) if "image_bytes" in columns else None
        if "image" in columns:
            no_uri = pc.is_null(columns["image"])
            absent = no_uri if absent is None else pc.and_(absent, no_uri)
        _mark(reasons, absent, "the image is null")
        if self._options.on_missing == "drop":
            for rows in missing.values():
                _mark(reasons, rows, _DROPPED)
        prompts = pc.fill_null(columns["prompt"], "")
        _mark(reasons, pc.equal(pc.utf8_trim_whitespace(prompts), ""), "the prompt is null or blank")

    # --- ids --------------------------------------------------------------------------------------------------------

    @property
    def _ids_from(self) -> str:
        has_column = self._columns.source_of("request_id") is not None
        return self._options.ids_from or ("column" if has_column else self._options.kind.ids)

    def _own_ids(
        self, columns: dict[str, pa.Array], table: pa.Table, places: pa.Array, reasons: list[str | None]
    ) -> None:
        """Fill in the request ids that do not depend on the image."""
        source = self._columns.source_of("request_id")
        if self._ids_from == "column" and source is not None:
            columns["request_id"] = self._columns.texts(table, source, f"--column request_id={source}")
            _mark(reasons, pc.is_null(columns["request_id"]), f"column {source!r}, the request id, is null or blank")
        elif self._ids_from == "location":
            columns["request_id"] = places
        too_long = pc.greater(pc.binary_length(pc.fill_null(columns["request_id"], "")), MAX_ID_BYTES)
        _mark(reasons, too_long, f"the request id has more than {MAX_ID_BYTES} bytes; choose --request-id-from content")

    # --- images -----------------------------------------------------------------------------------------------------

    def _resolve(self, columns: dict[str, pa.Array], reasons: list[str | None], folder: str) -> None:
        """Make relative URIs full ones, and note images as text, which only `--images bytes` decodes."""
        for name in ("image", "ip_adapter_image"):
            if name not in columns or not pa.types.is_string(columns[name].type):
                continue
            columns[name], refused = self._reader.resolve(columns[name], folder)
            for row, reason in refused.items():
                reasons[row] = reasons[row] or reason
            if name == "image" and self._options.images != "bytes":
                inline = pc.match_substring_regex(columns[name], inline_images.PATTERN)
                _mark(reasons, pc.fill_null(inline, False), _INLINE)

    def _with_bytes(self, draft: _Draft) -> Iterator[_Draft]:
        """Yield all rows; with `--images bytes`, in parts with the bytes of the images that are named by URI."""
        columns, reasons = draft.columns, draft.reasons
        if self._options.images != "bytes" or "image" not in columns:
            yield draft
            return
        self._refuse_shuffle("--images bytes")
        uris = columns["image"].to_pylist()
        wanted = (uri if reason is None else None for uri, reason in zip(uris, reasons, strict=True))
        found: list[bytes | None] = []
        start = num_bytes = 0
        for row, (content, reason) in enumerate(self._reader.contents(wanted)):
            found.append(content)
            reasons[row] = reasons[row] or reason
            num_bytes += len(content or b"")
            if num_bytes >= PART_BYTES:
                yield self._filled(draft.rows(start, row + 1), found)
                start, num_bytes, found = row + 1, 0, []
        if found or not uris:
            yield self._filled(draft.rows(start, len(uris)), found)

    def _filled(self, draft: _Draft, found: list[bytes | None]) -> _Draft:
        """Return rows with fetched images; their URIs are carried, except for images as text."""
        columns, data = dict(draft.columns), pa.array(found, pa.large_binary())
        uris = columns.pop("image")
        if "image_bytes" in columns:
            data = pc.coalesce(columns["image_bytes"], data)
        inline = pc.fill_null(pc.match_substring_regex(uris, inline_images.PATTERN), False)
        carried = pc.if_else(inline, pa.scalar(None, pa.string()), uris)
        columns["image_bytes"] = data
        columns.setdefault(self._columns.carried_name(self._columns.image[-1]), carried)
        return replace(draft, columns=columns)

    def _probe(self, columns: dict[str, pa.Array], reasons: list[str | None]) -> None:
        """Add the size of every image, and reject images whose header cannot be read."""
        count = len(columns["request_id"])
        data = columns.get("image_bytes", pa.nulls(count, pa.large_binary()))
        uris = columns.get("image", pa.nulls(count, pa.string()))
        if pc.any(pc.is_valid(uris)).as_py():
            self._refuse_shuffle("--probe")
        chosen = (
            None if reason is not None else image.as_py() if image.is_valid else uri.as_py()
            for image, uri, reason in zip(data, uris, reasons, strict=True)
        )
        sizes: list[tuple[int, int] | None] = []
        for row, size in enumerate(self._reader.sizes(chosen)):
            if isinstance(size, str):
                reasons[row] = reasons[row] or size
            sizes.append(None if isinstance(size, str) else size)
        columns["image_width"] = pa.array([size and size[0] for size in sizes], pa.int64())
        columns["image_height"] = pa.array([size and size[1] for size in sizes], pa.int64())

    def _refuse_shuffle(self, option: str) -> None:
        """Refuse to fetch in a shuffle, whose tasks Ray repeats: an image may be there in one, and not in the next.

        Raises:
            ConfigError: Rows are shuffled.
        """
        if self._options.shuffle is not None:
            raise ConfigError(
                f"{option}: images that are named by URI cannot be fetched while rows are shuffled; prepare with "
                f"{option} first, and prepare that manifest with --shuffle"
            )


_NO_URIS = "--images uris: the source has the images themselves, not their URIs; leave --images out"

_INLINE = "the image is text (a data: URI or base64), not a URI; --images bytes decodes it"

_DROPPED = "\0dropped"
"""Reason of rows that `--on-missing drop` drops: they are counted, and not rejected."""


def _mark(reasons: list[str | None], rows: pa.Array | None, reason: str) -> None:
    if rows is None or not pc.any(rows).as_py():
        return
    for row in np.flatnonzero(rows.to_numpy(zero_copy_only=False)):
        reasons[row] = reasons[row] or reason


def _content_ids(columns: Mapping[str, pa.Array]) -> pa.Array:
    """Return the ids that a run gives these rows by `request_id_from: content`."""
    num_rows = len(columns["request_id"])
    typed = {item.name: pa.nulls(num_rows, item.type) for item in REQUEST}
    for item in REQUEST:
        if item.name in columns:
            with suppress(pa.ArrowException):  # a run rejects values that have another type
                typed[item.name] = columns[item.name].cast(item.type)
    return content_ids(typed, image_identity(typed))


def _numbers(places: pa.Array, prefix: str) -> npt.NDArray[np.uint64]:
    """Return a number of 64 random bits for each place; always the same ones."""
    if not len(places):
        return np.zeros(0, np.uint64)
    return halves(digest(places, prefix=prefix))[0]
