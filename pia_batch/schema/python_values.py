"""Values of Arrow columns as Python has them, and text in the place of those that it has not."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pyarrow as pa


def of_column(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of a column, of any type.

    Python has no dates before the year 1 or after 9999, no durations over 999,999,999 days and no time zones but those
    of its database. Such values become texts: ISO 8601 with times in UTC, or a number and its unit.
    """
    try:
        values: list[Any] = column.to_pylist()
    except _LACKS:
        return [_value(value) for value in column]
    return values


def of_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table, with values as `of_column` gives them."""
    columns = {name: of_column(table[name]) for name in table.column_names}
    return [{name: values[number] for name, values in columns.items()} for number in range(len(table))]


def group_key(value: Any) -> Hashable:
    """Return a key that is the same for equal values, of those that `of_column` gives; NaN is equal to itself."""
    if isinstance(value, dict):
        return frozenset((name, group_key(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(group_key, value))
    return _NAN if value != value else value  # noqa: PLR0124 - what NaN is


_NAN = object()


_LACKS = (ArithmeticError, LookupError, ValueError)
"""Exceptions of `as_py`: OverflowError, the KeyError of a time zone, and Arrow's errors, which are ValueErrors."""

_DAYS = {pa.date32(): "days", pa.date64(): "ms"}
"""Units of dates."""


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _LACKS:
        pass
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.MapScalar):
        return [(_value(pair["key"]), _value(pair["value"])) for pair in scalar.values]
    if isinstance(scalar, pa.ListScalar):
        return [_value(item) for item in scalar.values]
    return _text(scalar)


def _text(scalar: pa.Scalar) -> str:
    """Return the text of a date, a time or a duration."""
    if isinstance(scalar, pa.DurationScalar):
        return f"{scalar.value} {scalar.type.unit}"
    zone = ""
    if isinstance(scalar, pa.TimestampScalar) and scalar.type.tz is not None:
        scalar, zone = scalar.cast(pa.timestamp(scalar.type.unit)), "Z"
    text = str(scalar.cast(pa.string()).as_py())
    if text.startswith("<"):  # Arrow has no text for years after 32767
        return f"{scalar.value} {_DAYS.get(scalar.type) or scalar.type.unit} since 1970-01-01"
    return text + zone
