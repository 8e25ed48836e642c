"""The two Arrow schemas at the edges, request and result, and tables in them.

A request is *effective* once every null is replaced by the config's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.keys import canonical_json, digest, keys_to_hex
from pia_batch.storage.uris import REDACTIONS

SUCCEEDED = "succeeded"
FAILED = "failed"

SETTINGS = pa.schema(
    [
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("motion_scale", pa.int64()),
        ("loop", pa.bool_()),
        ("motion_curve", pa.list_(pa.float64())),
        ("cond_frame", pa.int64()),
        ("guidance_scale", pa.float64()),
        ("strength", pa.float64()),
        ("num_inference_steps", pa.int64()),
        ("num_frames", pa.int64()),
        ("size", pa.string()),
        ("long_side", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("clip_skip", pa.int64()),
        ("eta", pa.float64()),
        ("ip_adapter_scale", pa.float64()),
        ("free_init_iters", pa.int64()),
        ("free_init_method", pa.string()),
        ("free_init_order", pa.int64()),
        ("free_init_spatial_stop", pa.float64()),
        ("free_init_temporal_stop", pa.float64()),
        ("free_init_fast", pa.bool_()),
        ("fps", pa.float64()),
        ("format", pa.string()),
    ]
)
"""What may differ from row to row. Each but `seed` has its default and its range in `config.Defaults`."""

REQUEST = pa.schema(
    [
        ("request_id", pa.string()),
        ("image", pa.string()),
        ("image_bytes", pa.large_binary()),
        ("image_sha256", pa.string()),
        ("prompt", pa.string()),
        ("motion", pa.string()),
        ("style", pa.bool_()),
        *SETTINGS,
        ("model", pa.string()),
        ("ip_adapter_image", pa.string()),
    ]
)
"""The manifest's columns. Any other column is carried into the result untouched."""

EFFECTIVE = pa.schema([field for field in REQUEST if field.name not in ("motion", "style")])
"""A request after its defaults: `motion` and `style` are words for the `motion_scale` that stands here."""

GROUPED = ("model", "num_frames", "size", "long_side", "width", "height")
"""Requests that have all of these in common are drawn together."""

RESULT = pa.schema(
    [
        ("request_id", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int64()),
        ("animation_uri", pa.string()),
        ("image", pa.string()),
        ("prompt", pa.string()),
        *SETTINGS,
        ("model", pa.string()),
        ("ip_adapter_image", pa.string()),
        ("duration_s", pa.float64()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("prompt_truncated", pa.bool_()),
        ("frame_mean", pa.float64()),
        ("frame_std", pa.float64()),
        ("motion", pa.float64()),
        ("first_frame_psnr_db", pa.float64()),
        ("image_sha256", pa.string()),
        ("gpu_seconds", pa.float64()),
        ("fetch_seconds", pa.float64()),
        ("encode_seconds", pa.float64()),
        ("device", pa.string()),
        ("engine_id", pa.string()),
        ("run_id", pa.string()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row for every request of a run, whatever became of it; the carried columns follow."""

FETCHED = pa.schema(
    [
        ("pixels", pa.large_binary()),
        ("fetched_sha256", pa.string()),
        ("ip_adapter_bytes", pa.large_binary()),
        ("fetch_seconds", pa.float64()),
    ]
)
"""What fetching an image adds to a request on its way to the engine."""

NAMED = ("request_id", "image", "prompt", "model", "ip_adapter_image")
"""The texts that the result of a rejected request has, as far as they are texts."""

RESERVED = frozenset(RESULT.names + FETCHED.names) - frozenset(REQUEST.names)
"""Names that a manifest may not use for columns of its own."""

Row = dict[str, Any]
"""One row of a table, by column."""


def results_table(columns: Mapping[str, pa.Array | pa.Scalar], carried: pa.Table, num_rows: int) -> pa.Table:
    """A table in RESULT's order and types, nulls where a column is not given, then the carried columns.

    Credentials and signatures are taken out of URIs: results are read by more people than the manifest is.
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


def redacted(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """`uris.redacted_uri` of a whole string column."""
    for pattern, kept in REDACTIONS:
        column = pc.replace_substring_regex(column, pattern, kept)
    return column


def rejected_keys(request_ids: pa.Array, errors: pa.Array) -> pa.Array:
    """A `key` column for requests that have no content to make one of: of their ids and of what is wrong with them."""
    return keys_to_hex(digest(canonical_json({"rejected": errors, "request_id": request_ids})))


def named_texts(rows: pa.Table, default_model: str) -> dict[str, pa.Array]:
    """The columns of a rejected request that its result has: those NAMED that are there, and always `model`."""
    texts = {name: as_text(rows[name]) for name in NAMED if name in rows.column_names}
    texts["model"] = pc.fill_null(texts.get("model", pa.nulls(len(rows), pa.string())), default_model)
    return texts


def as_text(column: pa.ChunkedArray) -> pa.Array:
    """A column as strings, null where it holds something else."""
    array = column.combine_chunks()
    try:
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(array), pa.string())


def carried_columns(table: pa.Table) -> pa.Table:
    """The columns that are the manifest's own business."""
    return table.select([name for name in table.column_names if name not in REQUEST.names])
