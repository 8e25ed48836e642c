"""Columns of JSON objects whose values have no declared types: JSONL files, and .json members of archives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import pyarrow as pa

from pia_batch.manifest.column_paths import member_at, path_of_member

_LARGEST = 2**63 - 1


def json_table(
    rows: Iterable[dict[str, Any]],
    num_rows: int,
    text: AbstractSet[str] = frozenset(),
    paths: AbstractSet[str] = frozenset(),
) -> pa.Table:
    """Return a table of JSON objects. Names that no object has a value for have no column.

    Whole numbers become int64; next to others, or beyond 64 bits, float64. Texts, booleans and lists of one such type
    keep it. Everything else, such as objects or values of several types, becomes JSON text.

    Args:
        rows: Objects, in order.
        num_rows: Number of them.
        text: Names whose values become text in any case.
        paths: Paths with dots into objects. The values there become columns of these names, beside the objects' own.
    """
    columns: dict[str, list[Any]] = {}
    inside = sorted(path for path in paths if "." in path)
    for number, row in enumerate(rows):
        for name, value in ({path: _inside(row, path) for path in inside} | row).items():
            if value is not None:
                columns.setdefault(name, [None] * num_rows)[number] = value
    if not columns:
        return pa.table({"": pa.nulls(num_rows)}).select([])
    return pa.table({name: _column(values, as_text=name in text) for name, values in columns.items()})


def _inside(row: Mapping[str, Any], source: str) -> Any:  # any JSON value
    """Return the value that a path leads to, or None: rows need not have every object."""
    path = path_of_member(row, source, lambda *_: None)
    return None if path is None else member_at(row, path)


def _column(values: list[Any], *, as_text: bool) -> pa.Array:
    kinds = {type(value) for value in values} - {type(None)}
    if not as_text:
        if kinds == {int} and all(value is None or abs(value) <= _LARGEST for value in values):
            return pa.array(values, pa.int64())
        if kinds <= {int, float}:
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
        if kinds == {bool}:
            return pa.array(values, pa.bool_())
        if kinds == {list} and (array := _lists(values)) is not None:
            return array
    return pa.array([_text(value) for value in values], pa.string())


def _lists(values: list[list[Any] | None]) -> pa.Array | None:
    """Return a column of lists if all of their values are texts, or all are numbers; otherwise None."""
    kinds = {type(item) for value in values if value for item in value}
    if kinds == {str}:
        return pa.array([_clean(value) for value in values], pa.list_(pa.string()))
    if kinds and kinds <= {int, float}:
        return pa.array([value and list(map(float, value)) for value in values], pa.list_(pa.float64()))
    return None


def _clean(value: list[Any] | None) -> list[str] | None:
    return None if value is None else [_text(item) or "" for item in value]


def _text(value: Any) -> str | None:  # any JSON value
    """Return a value as text that is valid UTF-8: JSON can spell half a surrogate pair."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "replace").decode()
