"""Outcome rows: the few bytes per request that the last stage returns after the commit."""

from __future__ import annotations

import pyarrow as pa

from pia_batch.schema.columns import Row

INTERRUPTED = "interrupted"
"""Status of a request that has not begun because the run is stopping. It is never written to the journal."""

OUTCOME = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
        ("animation_uri", pa.string()),
    ]
)
"""Columns of an outcome. `key` is the one under which the request's attempts are counted."""


def interrupted(key: str) -> Row:
    """Return the outcome of a request that has not begun because the run is stopping."""
    return {"key": key, "status": INTERRUPTED}


def outcome_of(key: str, result: Row) -> Row:
    """Return the outcome of a request with this result, under the key that its attempts are counted by."""
    return {name: result.get(name) for name in OUTCOME.names} | {"key": key}


def outcomes_table(rows: list[Row]) -> pa.Table:
    """Return outcomes as a table with the columns OUTCOME."""
    return pa.Table.from_pylist(rows, OUTCOME)
