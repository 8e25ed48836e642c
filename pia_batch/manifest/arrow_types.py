"""Arrow types of columns: encodings that are removed, and types that results cannot hold, refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import ManifestError, message_of
from pia_batch.schema.type_cache import cached_by_type

EXTENSION = b"ARROW:extension:"
"""Prefix of the metadata by which a field names its extension type."""


def plain_type(data_type: pa.DataType) -> pa.DataType:  # noqa: PLR0911 - one line for each kind of type
    """Return the type of the values without their encoding, at every depth; few of Arrow's functions take encoded ones.

    Dictionaries, run-end encoding and extension types become the type of their values; views become large types, and
    lists of views plain lists.
    """
    types = pa.types
    if isinstance(data_type, pa.BaseExtensionType):
        return plain_type(data_type.storage_type)
    if types.is_dictionary(data_type) or types.is_run_end_encoded(data_type):
        return plain_type(data_type.value_type)
    if types.is_map(data_type):
        return pa.map_(plain_type(data_type.key_type), plain_type(data_type.item_type))
    if types.is_struct(data_type):
        return pa.struct([(item.name, plain_type(item.type)) for item in data_type])
    if types.is_fixed_size_list(data_type):
        return pa.list_(plain_type(data_type.value_type), data_type.list_size)
    for test, make in _LISTS:
        if test(data_type):
            return make(plain_type(data_type.value_type))
    return _VIEWS.get(data_type, data_type)


_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_),
    (pa.types.is_large_list_view, pa.large_list),
)

_VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


def is_nested(data_type: pa.DataType) -> bool:
    """Return True for lists, maps and structs."""
    return bool(pa.types.is_nested(data_type))


def has_part(data_type: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Return True if a plain type passes a test at any depth."""
    children = (data_type.field(number).type for number in range(data_type.num_fields))
    return test(data_type) or (is_nested(data_type) and any(has_part(child, test) for child in children))


def has_lists(data_type: pa.DataType) -> bool:
    """Return True if a plain type has lists or maps at any depth, and no bytes."""
    leaves, lists = [data_type], False
    for one in leaves:
        if is_nested(one):
            lists |= not pa.types.is_struct(one)
            leaves += [one.field(number).type for number in range(one.num_fields)]
    return lists and not any(is_bytes(one) for one in leaves)


def is_bytes(data_type: pa.DataType) -> bool:
    """Return True for bytes of any length, which are no texts."""
    return bool(pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type))


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the same values in `plain_type`.

    Raises:
        pa.ArrowException: Arrow cannot convert this type.
    """
    wanted = plain_type(column.type)
    return pa.chunked_array([_plain_array(chunk, wanted) for chunk in column.chunks], wanted)


def _plain_array(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        return _plain_array(array.storage, wanted)
    if pa.types.is_dictionary(array.type):  # some dictionaries cannot be cast: decode by index
        if not len(array.dictionary):  # under a null parent, an index of it may be 0 all the same
            return pa.nulls(len(array), wanted)
        return _plain_array(array.dictionary, wanted).take(array.indices)
    if pa.types.is_run_end_encoded(array.type):
        return _plain_array(pc.run_end_decode(array), wanted)
    return array if array.type == wanted else _with_plain_children(array, wanted)


def _with_plain_children(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Return a nested array with plain children. Arrow's own cast fails for some dictionaries inside of others."""
    types = pa.types
    missing = array.is_null()
    if types.is_struct(wanted):
        children = [_plain_array(array.field(at), item.type) for at, item in enumerate(wanted)]
        return pa.StructArray.from_arrays(children, fields=list(wanted), mask=missing)
    if types.is_fixed_size_list(wanted):
        values = array.values.slice(array.offset * wanted.list_size, len(array) * wanted.list_size)
        return pa.FixedSizeListArray.from_arrays(_plain_array(values, wanted.value_type), type=wanted, mask=missing)
    if types.is_map(wanted):
        keys, items = _plain_array(array.keys, wanted.key_type), _plain_array(array.items, wanted.item_type)
        return pa.MapArray.from_arrays(_offsets(array), keys, items, wanted, mask=missing)
    for test, kind in ((types.is_list, pa.ListArray), (types.is_large_list, pa.LargeListArray)):
        if test(wanted):
            is_view = types.is_list_view(array.type) or types.is_large_list_view(array.type)
            values = _plain_array(array.flatten() if is_view else array.values, wanted.value_type)
            offsets = _ends(array) if is_view else _offsets(array)
            return kind.from_arrays(offsets, values, type=wanted, mask=missing)
    return array.cast(wanted)


def _ends(array: pa.Array) -> pa.Array:
    """Return the offsets of a list view's values once they are flattened."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    data_type = pa.int32() if pa.types.is_list_view(array.type) else pa.int64()
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), data_type)


def _offsets(array: pa.Array) -> pa.Array:
    return pa.array(array.offsets.to_numpy())  # a copy: a slice of offsets cannot have a mask


def first_invalid(rows: pa.Table) -> tuple[str, int, str]:
    """Return column, row and problem of a value that makes `validate(full=True)` fail, the first of its kind.

    Args:
        rows: Table of which one value at least is none of its type.
    """
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        if _problem(column) is None:
            continue
        first, last = 0, len(column)
        while last - first > 1:
            middle = (first + last) // 2
            # Copied, because a slice is validated with all the values of its array.
            half = column.slice(first, middle - first).take(pa.array(np.arange(middle - first)))
            first, last = (middle, last) if _problem(half) is None else (first, middle)
        return name, first, _problem(column.slice(first, 1).take(pa.array([0]))) or "invalid value"
    msg = "every value is valid"
    raise ValueError(msg)


def _problem(column: pa.ChunkedArray) -> str | None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as err:
        return _AT.sub("", message_of(err).rpartition("Invalid: ")[2])
    return None


_AT = re.compile(r" at string index [0-9]+$")
"""End of Arrow's message about a text, whose index is that of a copy."""


def can_be_moved(data_type: pa.DataType) -> bool:
    """Return True if Arrow and Ray can select, join and send rows of this type as it is."""
    return not _has_views(data_type) and _moves(data_type)


def _has_views(data_type: pa.DataType) -> bool:
    """Return True if the type has views or run-end encoding at any depth, which Ray does not send."""
    types = pa.types
    if isinstance(data_type, pa.BaseExtensionType):
        return _has_views(data_type.storage_type)
    if types.is_dictionary(data_type):
        return _has_views(data_type.value_type)
    own = (types.is_run_end_encoded, types.is_list_view, types.is_large_list_view)
    if data_type in _VIEWS or any(test(data_type) for test in own):
        return True
    children = (data_type.field(number).type for number in range(data_type.num_fields))
    return is_nested(data_type) and any(map(_has_views, children))


def refuse_unsupported(fields: Iterable[pa.Field], place: str) -> None:
    """Refuse columns whose type a run cannot carry into Parquet, the format of results.

    Args:
        fields: Columns that are carried, in any encoding.
        place: Name of the manifest or Dataset for the message.

    Raises:
        ManifestError: a type cannot be carried; the message names column, type and remedy.
    """
    for field in fields:
        repeated = _repeated_name(plain_type(field.type))
        if repeated is not None:
            msg = (
                f"{place}: column {field.name!r} has a struct with two fields {repeated!r}, of which most programs "
                "read one; rename one of them, or drop the column"
            )
            raise ManifestError(msg)
        if not _is_carried(field.type):
            msg = (
                f"{place}: column {field.name!r} has the type {str(field.type)[:200]}, which Parquet, the format of "
                "results, cannot store and give back; drop the column, or write it as text, such as JSON"
            )
            raise ManifestError(msg)


def _repeated_name(data_type: pa.DataType) -> str | None:
    """Return a name that two fields of one struct have, at any depth of a plain type."""
    if not is_nested(data_type):
        return None
    children = [data_type.field(number) for number in range(data_type.num_fields)]
    names: list[str] = [child.name for child in children]
    if pa.types.is_struct(data_type) and len(set(names)) < len(names):
        return next(name for name in names if names.count(name) > 1)
    return next(filter(None, (_repeated_name(child.type) for child in children)), None)


@cached_by_type
def _is_carried(data_type: pa.DataType) -> bool:
    """Return True if two rows of this type, null and not null, survive everything that a run does to them."""
    try:
        plain = plain_type(data_type)
        rows = pa.chunked_array([pa.array([None, _sample(plain)], plain)])
        if not can_be_moved(data_type):
            plain_column(pa.chunked_array([pa.nulls(2, data_type)]))
        table = pa.table({"column": rows})
        if not _moves(plain):
            return False
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        stored = pq.ParquetFile(pa.BufferReader(sink.getvalue())).read()["column"]
        stored.validate(full=True)
        return bool(stored.cast(plain).equals(rows))
    except (pa.ArrowException, OSError, TypeError, ValueError, NotImplementedError):
        return False


@cached_by_type
def _moves(data_type: pa.DataType) -> bool:
    try:
        table = pa.table({"column": pa.nulls(2, data_type)})
        table = pa.concat_tables([table, table]).combine_chunks().take(pa.array([1, 3]))
        table = table.filter(pa.array([True, False]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return bool(pa.ipc.open_stream(sink.getvalue()).read_all().schema.field(0).type == data_type)
    except (pa.ArrowException, TypeError, NotImplementedError):
        return False


def _sample(data_type: pa.DataType) -> Any:  # noqa: PLR0911 - one line for each kind of type
    """Return a Python value that `pa.array` takes for the type."""
    types = pa.types
    if types.is_map(data_type):
        return [(_sample(data_type.key_type), _sample(data_type.item_type))]
    if types.is_struct(data_type):
        return {item.name: _sample(item.type) for item in data_type}
    if types.is_fixed_size_list(data_type):
        return [_sample(data_type.value_type)] * data_type.list_size
    if any(test(data_type) for test, _ in _LISTS):
        return [_sample(data_type.value_type), None]
    if types.is_fixed_size_binary(data_type):
        return bytes(data_type.byte_width)
    for test, value in _SAMPLES:
        if test(data_type):
            return value
    return 0  # numbers, and everything that counts from 1970


_SAMPLES: tuple[tuple[Any, Any], ...] = (
    (pa.types.is_null, None),
    (pa.types.is_boolean, False),
    (pa.types.is_string, ""),
    (pa.types.is_large_string, ""),
    (pa.types.is_binary, b""),
    (pa.types.is_large_binary, b""),
    (pa.types.is_decimal, Decimal(0)),
    (pa.types.is_floating, 0.0),
)
