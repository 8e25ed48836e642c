"""Requests made of a source's rows: filtered, with image, prompt and id, under the names that a manifest has."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.datasets.source_images import image_columns, image_source
from pia_batch.datasets.sources import Kind, Rows
from pia_batch.datasets.templates import Template, as_texts, find, values_of
from pia_batch.errors import ConfigError, ImageUnreadableError, ManifestError
from pia_batch.manifest.content_keys import image_identity
from pia_batch.manifest.request_ids import content_ids
from pia_batch.media import image_headers
from pia_batch.schema.columns import MAX_ID_BYTES, REQUEST, RESERVED
from pia_batch.schema.expressions import RowFilter
from pia_batch.schema.keys import digest, halves

OnMissing = Literal["fail", "drop", "empty"]
IdsFrom = Literal["column", "content", "location"]

REJECTS = pa.schema([("place", pa.string()), ("request_id", pa.string()), ("reason", pa.string())])
"""Columns of the rows that became no request because something is wrong with them."""

_TAKEN = ("request_id", "image", "image_bytes", "prompt")


@dataclass(frozen=True)
class RequestOptions:
    """Options that decide what becomes of a row.

    Attributes:
        kind: Kind of the source.
        columns: Sources of columns by their name in the manifest.
        prompt: Template of the prompt; None: the column.
        negative_prompt: Template of the negative prompt; None: the column, if there is one.
        on_missing: Treatment of rows in which a column of a template is null or blank.
        ids_from: Origin of request ids; None: the column if there is one, otherwise what suits the kind.
        where: Condition on the source's columns; None: all rows.
        sample: Share of the rows, above 0 to 1; always the same ones.
        shuffle: Seed of the order of rows; None: the source's order.
        probe: True to read every image's size, and to reject images that cannot be animated.
    """

    kind: Kind
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: Template | None = None
    negative_prompt: Template | None = None
    on_missing: OnMissing = "fail"
    ids_from: IdsFrom | None = None
    where: RowFilter | None = None
    sample: float | None = None
    shuffle: int | None = None
    probe: bool = False


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


class RequestTable:
    """Converter of a source's rows. It can be pickled.

    Args:
        options: Treatment of each row.
        schema: Columns that the source has in all rows or in its first ones; others are taken as they come.

    Raises:
        ConfigError: An option names a column that the source does not have.
        ManifestError: No column is the image, or none is the prompt.
    """

    def __init__(self, options: RequestOptions, schema: pa.Schema) -> None:
        self._options, self._schema = options, schema
        names = schema.names
        self._is_manifest = "request_id" in names and options.kind.prompt is None
        """The source has our own column names, which then mean what they mean in a manifest."""
        if options.where is not None:
            options.where.bind(schema)
        for name, source in options.columns.items():
            if name in RESERVED:
                near = difflib.get_close_matches(name, REQUEST.names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"--column {name}={source}: {name!r} is a column of results{hint}")
            find(names, schema, source, f"--column {name}={source}")
        for template in filter(None, (options.prompt, options.negative_prompt)):
            for name in template.columns:
                find(names, schema, name, template.option)
        if options.ids_from == "column" and self._source_of("request_id") is None:
            raise ConfigError("--request-id-from column: no column is the id; name it by --column request_id=COLUMN")
        self._image = image_source(schema, options.columns)
        if options.prompt is None and self._source_of("prompt") is None and options.kind.prompt not in names:
            shown = ", ".join(item.name for item in schema if pa.types.is_string(item.type)) or "none"
            raise ManifestError(
                f"no column is the prompt; write a template such as --prompt '{{NAME}}' (columns of text: {shown})"
            )

    @property
    def notes(self) -> list[str]:
        """Remarks on columns whose names have another meaning in a manifest, for the operator."""
        kept = [name for name in self._schema.names if self._carried_name(name) != name and name not in self._used()]
        if not kept:
            return []
        carried = ", ".join(f"{name} as {self._carried_name(name)}" for name in kept)
        setting = next((name for name in kept if name in REQUEST.names), None)
        remedy = f"; --column {setting}={setting} makes a setting of it" if setting else ""
        return [f"carried under other names, because a manifest's mean something else: {carried}{remedy}"]

    def __call__(self, rows: Rows) -> Requests:
        """Return the requests of some rows.

        Raises:
            ManifestError: A value that a template needs is missing, and `on_missing` is `fail`.
            ConfigError: The rows do not have a column of the condition, or another type.
        """
        counts = Counter(read=len(rows.table) + rows.skipped, failed_in_source=rows.skipped)
        table = self._with_missing(rows.table)
        places = rows.places
        chosen = self._chosen(table, places, counts)
        if len(chosen) < len(table):
            table, places = table.take(pa.array(chosen)), places.take(pa.array(chosen))
        columns, missing = self._columns(table, places)
        reasons = self._reasons(columns, missing)
        self._ids(columns, table, places, reasons)
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

    # --- rows -------------------------------------------------------------------------------------------------------

    def _with_missing(self, table: pa.Table) -> pa.Table:
        """Add the columns that these rows lack, as nulls: JSON objects need not have every name."""
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

    # --- columns ----------------------------------------------------------------------------------------------------

    def _source_of(self, name: str) -> str | None:
        """Return the source of a column of the manifest, or None."""
        if name in self._options.columns:
            return self._options.columns[name]
        if name not in self._schema.names:
            return None
        return name if self._is_manifest or name in (*_TAKEN, "negative_prompt") else None

    def _columns(self, table: pa.Table, places: pa.Array) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
        """Return the columns of the manifest, and by option the rows in which something is missing."""
        columns: dict[str, pa.Array] = {"request_id": pa.nulls(len(table), pa.string())}
        columns |= image_columns(values_of(table, self._image))
        missing: dict[str, pa.Array] = {}
        for name, template in (("prompt", self._options.prompt), ("negative_prompt", self._options.negative_prompt)):
            if template is None and name == "prompt" and self._source_of(name) is None:
                template = Template(f"{{{self._options.kind.prompt}}}", "--prompt")  # noqa: PLW2901
            source = self._source_of(name)
            if template is not None:
                columns[name], missing[name] = self._filled(template, table, places)
            elif source is not None:
                columns[name] = self._texts(table, source, f"--column {name}={source}")
        for name, source in self._options.columns.items():
            if name not in (*_TAKEN, "negative_prompt"):
                columns[name] = values_of(table, find(table.column_names, table, source, f"--column {name}"))
        used = self._used()
        for name in table.column_names:
            if name not in used and self._carried_name(name) not in columns:
                columns[self._carried_name(name)] = values_of(table, [name])
        return columns, missing

    def _used(self) -> set[str]:
        """Return the columns of the source that others stand for."""
        used = {*self._options.columns.values(), self._image[0]}
        if self._source_of("request_id") is not None and self._options.ids_from in (None, "column"):
            used.add("request_id")
        return used | {name for name in ("prompt", "negative_prompt") if self._is_column(name)}

    def _is_column(self, name: str) -> bool:
        """Return True if a text is a column of the source as it is, without a template."""
        template = self._options.prompt if name == "prompt" else self._options.negative_prompt
        return template is None and self._source_of(name) == name

    def _carried_name(self, name: str) -> str:
        """Return the name of a carried column: names that mean something else in a manifest get a prefix."""
        if self._is_manifest and name in REQUEST.names and name not in ("request_id", "prompt", "negative_prompt"):
            return name
        is_other = name in REQUEST.names or name in RESERVED or name in ("base_id", *self._options.columns)
        return f"source_{name}" if is_other else name

    def _texts(self, table: pa.Table, path: str, label: str) -> pa.Array:
        texts = as_texts(values_of(table, find(table.column_names, table, path, label)))
        if texts is None:
            raise ConfigError(f"{label}: column {path!r} has no text; choose a column of texts or numbers")
        return texts

    def _filled(self, template: Template, table: pa.Table, places: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Return the texts of a template, and the rows in which one of its columns is missing."""
        missing = pa.array(np.zeros(len(table), bool))

        def texts(path: str) -> pa.Array:
            nonlocal missing
            found = self._texts(table, path, template.option)
            absent = pc.is_null(found)
            if self._options.on_missing == "fail" and pc.any(absent).as_py():
                row = pc.index(absent, pa.scalar(True)).as_py()
                raise ManifestError(
                    f"{places[row].as_py()}: column {path!r} is null or blank, and {template.option} needs it; choose "
                    "--on-missing drop or --on-missing empty"
                )
            missing = pc.or_(missing, absent)
            return pc.fill_null(found, "") if self._options.on_missing == "empty" else found

        return template.fill(len(table), texts), missing

    # --- reasons ----------------------------------------------------------------------------------------------------

    def _reasons(self, columns: Mapping[str, pa.Array], missing: Mapping[str, pa.Array]) -> list[str | None]:
        """Return why each row becomes no request, or None."""
        reasons: list[str | None] = [None] * len(columns["request_id"])
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
        return reasons

    def _ids(self, columns: dict[str, pa.Array], table: pa.Table, places: pa.Array, reasons: list[str | None]) -> None:
        """Fill in the request ids."""
        source = self._source_of("request_id")
        ids_from = self._options.ids_from or ("column" if source is not None else self._options.kind.ids)
        if ids_from == "column" and source is not None:
            columns["request_id"] = self._texts(table, source, f"--column request_id={source}")
            _mark(reasons, pc.is_null(columns["request_id"]), f"column {source!r}, the request id, is null or blank")
        elif ids_from == "location":
            columns["request_id"] = places
        else:
            columns["request_id"] = _content_ids(columns)
        too_long = pc.greater(pc.binary_length(pc.fill_null(columns["request_id"], "")), MAX_ID_BYTES)
        _mark(reasons, too_long, f"the request id has more than {MAX_ID_BYTES} bytes; choose --request-id-from content")

    def _probe(self, columns: dict[str, pa.Array], reasons: list[str | None]) -> None:
        """Add the size of every image, and reject images whose header cannot be read."""
        if "image_bytes" not in columns:
            raise ConfigError("--probe: the source names images by URI; give it bytes, or leave --probe out")
        widths: list[int | None] = []
        heights: list[int | None] = []
        for row, image in enumerate(columns["image_bytes"]):
            width = height = None
            if image.is_valid:
                try:
                    width, height = image_headers.read(image.as_py()).upright
                except (ImageUnreadableError, image_headers.IncompleteError) as err:
                    reasons[row] = reasons[row] or f"the image cannot be read: {err or 'it ends too early'}"
            widths.append(width)
            heights.append(height)
        columns["image_width"] = pa.array(widths, pa.int64())
        columns["image_height"] = pa.array(heights, pa.int64())


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
