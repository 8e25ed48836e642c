"""Columns with dates, times or durations beyond those of Python, which `datasets` cannot read: they become texts."""

from __future__ import annotations

import json
from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema import plain_values, python_values

_DAY_S = 86_400
_FIRST_S, _LAST_S = -62_135_596_800 + _DAY_S, 253_402_300_799 - _DAY_S
"""First and last second of Python's years, 1 and 9999, less a day for the zones."""

_LONGEST_S = 999_999_999 * _DAY_S
"""Longest duration of Python."""

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def can_have(data_type: pa.DataType) -> bool:
    """Return True if values of a type have dates, times or durations at any depth."""
    return _is_time(data_type) or any(can_have(data_type.field(at).type) for at in range(data_type.num_fields))


def columns_with(table: pa.Table) -> list[str]:
    """Return the names of columns of a table that have such a value, at any depth."""
    return [item.name for item in table.schema if can_have(item.type) and _has(table[item.name])]


def with_texts(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Return a table with columns as texts: times in ISO 8601, and JSON where they are inside of lists or structs."""
    for at, name in enumerate(table.column_names):
        if name in names:
            texts = pa.array(map(_text, python_values.of_column(table[name])), pa.string())
            table = table.set_column(at, name, texts)
    return table


def schema_with_texts(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """Return the schema of `with_texts`."""
    fields = [field.with_type(pa.string()) if field.name in names else field for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def _text(value: object) -> str | None:
    shown = plain_values.of_any(value)
    return shown if shown is None or isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)


def _is_time(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(data_type) or pa.types.is_date(data_type) or pa.types.is_duration(data_type))


def _has(column: pa.ChunkedArray) -> bool:
    """Return True if a column of one of the types that datasets have, without maps, has such a value."""
    data_type = column.type
    if pa.types.is_struct(data_type):
        return any(_has(pc.struct_field(column, [at])) for at in range(data_type.num_fields))
    if pa.types.is_nested(data_type):
        return _has(pc.list_flatten(column))
    if not _is_time(data_type):
        return False
    days = pa.types.is_date32(data_type)
    number = pc.min_max(column.cast(pa.int32()).cast(pa.int64()) if days else column.cast(pa.int64())).as_py()
    if number["min"] is None:
        return False
    low, high = (-_LONGEST_S, _LONGEST_S) if pa.types.is_duration(data_type) else (_FIRST_S, _LAST_S)
    in_second = 1 / _DAY_S if days else _PER_SECOND[getattr(data_type, "unit", "ms")]
    return bool(number["min"] < low * in_second or number["max"] > high * in_second)
