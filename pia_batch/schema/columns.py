"""Columns of requests and results, each described once, and tables with them.

A request is *effective* once every null is replaced by the config's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.declaration import Setting, declared
from pia_batch.schema.keys import canonical_json, digest, keys_to_hex
from pia_batch.schema.settings import MAX_PROMPT_BYTES, ROW_SETTINGS, MotionWords
from pia_batch.storage.uris import REDACTIONS

SUCCEEDED = "succeeded"
FAILED = "failed"

MAX_ID_BYTES = 512
MAX_URI_BYTES = 4096


@dataclass(frozen=True)
class Column:
    """A column of manifests or results that is no setting.

    Attributes:
        name: Its name.
        data_type: Its Arrow type.
        description: Meaning, unit, and effect of null.
        allowed: Allowed values in words; empty for columns of results.
    """

    name: str
    data_type: pa.DataType
    description: str
    allowed: str = ""


SOURCE = (
    Column(
        "request_id",
        pa.string(),
        "Required. Two rows with the same id must have the same content.",
        f"1 to {MAX_ID_BYTES} bytes, no control characters",
    ),
    Column(
        "image",
        pa.string(),
        "Required, unless `image_bytes` is given.",
        f"URI, or a path relative to the manifest's folder; up to {MAX_URI_BYTES:,} bytes",
    ),
    Column("image_bytes", pa.large_binary(), "Instead of `image`: the encoded image.", "an encoded image"),
    Column(
        "image_sha256",
        pa.string(),
        "Checked against what was fetched; makes the key independent of the URI. null: not checked.",
        "64 hexadecimal digits",
    ),
    Column(
        "prompt",
        pa.string(),
        "Required, unless `prompts` is given. Text to animate the image by.",
        f"1 to {MAX_PROMPT_BYTES:,} bytes",
    ),
)
"""Columns that say which request this is, and what it animates."""

MODEL = (
    Column(
        "model",
        pa.string(),
        "Model of the config that generates the animation. null: `model.name`.",
        "`model.name`, or a name of the config's `models`",
    ),
    Column(
        "ip_adapter_image",
        pa.string(),
        "Image prompt, where the model has an `ip_adapter`. null: the image itself.",
        "URI, as `image`",
    ),
)
"""Columns that choose a model, and what only some models take."""

OUTCOME = (
    Column("request_id", pa.string(), "Id from the manifest."),
    Column("key", pa.string(), "Content key: 32 hexadecimal digits over everything that decides the animation."),
    Column("status", pa.string(), "`succeeded` or `failed`."),
    Column("error_kind", pa.string(), "Kind of the failure, from the table below; null if the request succeeded."),
    Column("error", pa.string(), "Failure in words: the column, the value and what is allowed; null as `error_kind`."),
    Column("attempts", pa.int64(), "Number of attempts in the run that finished the request; 0 for rejected rows."),
    Column("animation_uri", pa.string(), "URI of the animation's object."),
    Column("image", pa.string(), "Image from the manifest; credentials and signatures are removed from URIs."),
    Column("prompt", pa.string(), "Prompt from the manifest; null if the request has several, in `prompts`."),
)
"""Columns of a result before the settings."""

MEASURED = (
    Column("model", pa.string(), "Model of the config that the request asked for."),
    Column("ip_adapter_image", pa.string(), "Image prompt from the manifest, as `image`."),
    Column("duration_s", pa.float64(), "Duration of the animation, in seconds."),
    Column("num_bytes", pa.int64(), "Size of the stored object, in bytes."),
    Column("sha256", pa.string(), "SHA-256 of the stored object."),
    Column("poster_uri", pa.string(), "URI of the poster's object, a JPEG; null: `poster` is false."),
    Column("poster_num_bytes", pa.int64(), "Size of the poster, in bytes."),
    Column("poster_sha256", pa.string(), "SHA-256 of the poster."),
    Column(
        "prompt_tokens",
        pa.int64(),
        "Number of tokens of the prompt, or of the longest of `prompts`; start and end markers included.",
    ),
    Column("prompt_truncated", pa.bool_(), "true: a prompt has more tokens than the text encoder reads."),
    Column("frame_mean", pa.float64(), "Mean of all pixels, 0-255."),
    Column("frame_std", pa.float64(), "Standard deviation of all pixels, 0-255."),
    Column("motion", pa.float64(), "Mean absolute difference of neighbouring frames, 0-255."),
    Column(
        "first_frame_psnr_db",
        pa.float64(),
        "PSNR of the first frame (or `cond_frame`) against the fitted image, in dB; null: identical.",
    ),
    Column("nsfw_input", pa.bool_(), "true: `safety.checker` flags the image; null: it was not checked."),
    Column("nsfw_frames", pa.int64(), "Number of checked frames that `safety.checker` flags; null: none was checked."),
    Column(
        "nsfw_score",
        pa.float64(),
        "Highest score of the checked frames; a frame is flagged above 0. null: none was checked.",
    ),
    Column("image_sha256", pa.string(), "SHA-256 of the image as it was fetched."),
    Column("gpu_seconds", pa.float64(), "This request's share of the device time, in seconds."),
    Column("fetch_seconds", pa.float64(), "Time to read, check and fit the image, in seconds."),
    Column("encode_seconds", pa.float64(), "Time to encode the file and to decode it as a check, in seconds."),
    Column("finish_seconds", pa.float64(), "Time to finish the frames before they are encoded; null: not finished."),
    Column("device", pa.string(), "Device that generated the clip, such as `cuda:0`."),
    Column("engine_id", pa.string(), "Hash of weights, scheduler, dtype and engine version."),
    Column("run_id", pa.string(), "Run that finished the request."),
    Column("finished_at", pa.timestamp("us", tz="UTC"), "Time of the commit, UTC."),
)
"""Columns of a result after the settings."""


def _schema(*groups: tuple[Column | Setting, ...]) -> pa.Schema:
    return pa.schema([(each.name, each.data_type) for group in groups for each in group])


SETTINGS = _schema(ROW_SETTINGS)
"""Settings that may differ from row to row."""

REQUEST = _schema(SOURCE, declared(MotionWords), ROW_SETTINGS, MODEL)
"""The manifest's columns. Any other column is carried into the result untouched."""

EFFECTIVE = _schema(SOURCE, ROW_SETTINGS, MODEL)
"""A request after its defaults: `motion` and `style` are resolved into `motion_scale`."""

CALL_FRAMES = "call_frames"
"""Column with the number of frames of one UNet call: of a window or a piece, else of the whole clip."""

GROUPED = ("model", CALL_FRAMES, "size", "long_side", "width", "height")
"""Requests that have all of these in common can be generated in one batch."""

RESULT = _schema(OUTCOME, ROW_SETTINGS, MEASURED)
"""One row for every request of a run, finished or not; the carried columns follow."""

FETCHED = pa.schema(
    [
        ("pixels", pa.large_binary()),
        ("fetched_sha256", pa.string()),
        ("ip_adapter_bytes", pa.large_binary()),
        ("fetch_seconds", pa.float64()),
    ]
)
"""Columns that fetching an image adds to a request on its way to the engine."""

NAMED = ("request_id", "image", "prompt", "model", "ip_adapter_image")
"""Texts of a rejected request that its result has, as far as they are texts."""

ATTEMPT_KEY = "__attempt_key__"
"""Column of keys under which attempts are counted, where rows may be repeated. Without it, `key` serves."""

RANK = "__rank__"
"""Column by which requests are sorted, where they have priorities."""

RESERVED = frozenset([*RESULT.names, *FETCHED.names, ATTEMPT_KEY, RANK]) - frozenset(REQUEST.names)
"""Names that a manifest may not use for columns of its own."""

Row = dict[str, Any]
"""One row of a table, by column."""


def results_table(columns: Mapping[str, pa.Array | pa.Scalar], carried: pa.Table, num_rows: int) -> pa.Table:
    """Return a table in RESULT's order and types, nulls for columns that are not given, then the carried columns.

    Credentials and signatures are removed from URIs: more people read results than manifests.
    """
    arrays: dict[str, pa.Array | pa.ChunkedArray] = {}
    for field in RESULT:
        value = columns.get(field.name)
        if value is None:
            arrays[field.name] = pa.nulls(num_rows, field.type)
        elif isinstance(value, pa.Scalar):
            arrays[field.name] = pa.repeat(value.cast(field.type), num_rows)
        else:
            arrays[field.name] = value.cast(field.type)
    for name in ("image", "ip_adapter_image"):
        arrays[name] = redacted(arrays[name])
    return pa.table(arrays | {name: carried[name] for name in carried.column_names})


def conformed(
    table: pa.Table,
    schema: pa.Schema,
    cast: Callable[[pa.ChunkedArray, pa.Field], pa.ChunkedArray] = lambda column, field: column.cast(field.type),
) -> pa.Table:
    """Return `table` with the columns and types of `schema`; columns that it lacks are null.

    Args:
        table: Table to convert.
        schema: Columns of the result, in order.
        cast: Function that converts a column to the type of a field.
    """
    columns = [
        cast(table[field.name], field) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def redacted(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a string column with `uris.redacted_uri` applied to every value."""
    for pattern, kept in REDACTIONS:
        column = pc.replace_substring_regex(column, pattern, kept)
    return column


def rejected_keys(request_ids: pa.Array, errors: pa.Array) -> pa.Array:
    """Return a `key` column for rejected requests, which have no content key: hashes of their ids and errors."""
    return keys_to_hex(digest(canonical_json({"rejected": errors, "request_id": request_ids})))


def named_texts(rows: pa.Table, default_model: str) -> dict[str, pa.Array]:
    """Return the columns that results of rejected requests have: those NAMED that exist, always an id, and `model`."""
    texts = {"request_id": pa.nulls(len(rows), pa.string())}
    texts |= {name: as_text(rows[name]) for name in NAMED if name in rows.column_names}
    texts["model"] = pc.fill_null(texts.get("model", pa.nulls(len(rows), pa.string())), default_model)
    return texts


def mixed_type(data_type: pa.DataType) -> pa.DataType:
    """Return the type of a JSONL column whose values are not all of `data_type`: the others stand apart, as JSON."""
    return pa.struct([("__value__", data_type), ("__other__", pa.string())])


def mixed(values: pa.Array, others: pa.Array) -> pa.Array:
    """Return an array of `mixed_type`."""
    return pa.StructArray.from_arrays([values, others], fields=list(mixed_type(values.type)))


def is_mixed(data_type: pa.DataType) -> bool:
    """Return True for a `mixed_type`."""
    return pa.types.is_struct(data_type) and [item.name for item in data_type] == ["__value__", "__other__"]


def as_text(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as strings; all null if its type has none."""
    array = column.combine_chunks()
    if is_mixed(array.type):
        array = array.field(0)
    try:
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(array), pa.string())


def carried_columns(table: pa.Table) -> pa.Table:
    """Return the columns that a run carries from the manifest into the results."""
    return table.select([name for name in table.column_names if name not in REQUEST.names])
