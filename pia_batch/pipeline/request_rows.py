"""Columns that accompany a request from validation to its result, next to its settings and its carried columns.

A row has one pair `error_kind`, `error`. It is null until a stage finds that the request cannot be animated. Every
later stage passes such a row through, and the last one turns it into a failed result.
"""

from __future__ import annotations

import pyarrow as pa
from PIL import Image

from pia_batch.schema.columns import ATTEMPT_KEY, EFFECTIVE, FETCHED, Row

ROW_ERROR = pa.schema([("error_kind", pa.string()), ("error", pa.string())])
"""Error of a row, null in rows that can be animated."""

NSFW_INPUT = "nsfw_input"
"""Member of a row, and column of its result: the safety checker's flag of the condition image."""

INTERNAL = frozenset({"key", ATTEMPT_KEY, *FETCHED.names, *ROW_ERROR.names})
"""Columns that are neither settings nor carried into the result."""

ANIMATED = frozenset(EFFECTIVE.names) | INTERNAL
"""Columns that the last stage reads row by row."""


def with_row_error(requests: pa.Table) -> pa.Table:
    """Return `requests` with the columns ROW_ERROR, all null."""
    for field in ROW_ERROR:
        requests = requests.append_column(field, pa.nulls(len(requests), field.type))
    return requests


def attempt_key(row: Row) -> str:
    """Return the key under which the attempts of this request are counted."""
    key: str = row.get(ATTEMPT_KEY) or row["key"]
    return key


def is_rejected(row: Row) -> bool:
    """Return True if validation rejected the request, so that it was never fetched."""
    return row["error_kind"] is not None and row["fetch_seconds"] is None


def condition_image(row: Row) -> Image.Image:
    """Return the fitted condition image of a fetched request, RGB."""
    return Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
