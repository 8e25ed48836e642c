"""Layout of one file or table under our column names: what to read for each column, and how to make it of that.

A column is a column of the file, a field of a struct in it, one half of an image struct, or what is left of a struct.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.manifest.arrow_types import plain_column, plain_type

Path = tuple[str, ...]
"""Names from a column of the file down to a field of a struct."""

MAX_COLUMNS = 1000
"""Largest number of columns of a manifest."""

TEXTS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
"""Types of text and bytes."""


@dataclass(frozen=True)
class Value:
    """A column of the file, or a field of a struct in it.

    Attributes:
        field: Column under our name.
        path: Path of its values.
        reads: Paths to read, as pyarrow's Parquet reader takes them.
    """

    field: pa.Field
    path: Path
    reads: tuple[str, ...]

    @classmethod
    def at(cls, name: str, path: Path, item: pa.Field) -> Value:
        """Return the column `name` for a path that begins with the column `item` of the file."""
        if len(path) == 1:
            return cls(item.with_name(name), path, path)
        return cls(pa.field(name, type_at(path, item)), path, _reads(path, item))

    @property
    def is_unchanged(self) -> bool:
        """True if the file has this column under our name."""
        return self.path == (self.field.name,)

    def values(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the values from a table with at least the paths `reads`."""
        return _at(table, self.path)


@dataclass(frozen=True)
class ImageUri(Value):
    """The path of an image struct, where it has no bytes; next to bytes it is only the name that the file had."""

    @classmethod
    def of(cls, path: Path, item: pa.Field) -> ImageUri:
        """Return the column `image` for the image struct at a path."""
        reads = tuple(read for name in ("bytes", "path") for read in _reads((*path, name), item))
        return cls(pa.field("image", type_at((*path, "path"), item)), path, tuple(dict.fromkeys(reads)))

    def values(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the paths, null where there are bytes."""
        data, uris = (_at(table, (*self.path, name)) for name in ("bytes", "path"))
        chunks = [_blanked(uri, _is_filled(one)) for one, uri in zip(data.chunks, uris.chunks, strict=True)]
        return pa.chunked_array(chunks, uris.type)


@dataclass(frozen=True)
class Rest:
    """Fields of a struct that no other column takes, as a struct with the same name.

    Attributes:
        field: The column, with the type of these fields.
        reads: Paths to read.
    """

    field: pa.Field
    reads: tuple[str, ...]
    is_unchanged = False

    @property
    def path(self) -> Path:
        """Path of the struct."""
        return (self.field.name,)

    @classmethod
    def of(cls, item: pa.Field, taken: Collection[Path]) -> Rest | None:
        """Return what is left of the column `item` without the paths `taken`; None if that is nothing."""
        left = _without(plain_type(item.type), {path[1:] for path in taken})
        if left is None:
            return None
        paths = _leaves(left, (item.name,))
        return cls(pa.field(item.name, left), tuple(dict.fromkeys(r for path in paths for r in _reads(path, item))))

    def values(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the structs, null where the file has null."""
        column = plain_column(table[self.field.name])
        return pa.chunked_array([_narrowed(chunk, self.field.type) for chunk in column.chunks], self.field.type)


@dataclass(frozen=True)
class Layout:
    """Columns of one file under our names."""

    columns: tuple[Value | Rest, ...]

    @property
    def schema(self) -> pa.Schema:
        """Columns in the order of the file."""
        return pa.schema([column.field for column in self.columns])

    def select(self, names: Collection[str]) -> Layout:
        """Return the part with the columns `names`."""
        return Layout(tuple(column for column in self.columns if column.field.name in names))

    @property
    def reads(self) -> list[str]:
        """Paths to read for these columns: of a struct, only the fields that are used."""
        return list(dict.fromkeys(read for column in self.columns for read in column.reads))

    @property
    def is_nested(self) -> bool:
        """True if a field of a struct is read: pyarrow reads such dictionaries from one row group at a time."""
        return any(read != column.path[0] for column in self.columns for read in column.reads)

    @property
    def texts(self) -> list[str]:
        """The part of `reads` that becomes columns of text or bytes."""
        values = (column for column in self.columns if isinstance(column, Value))
        return [read for column in values for read in column.reads if plain_type(column.field.type) in TEXTS]

    def table(self, rows: pa.Table) -> pa.Table:
        """Return the columns, made of a table that has at least the paths `reads`; more is left out."""
        if all(column.is_unchanged for column in self.columns):
            return rows.select([column.field.name for column in self.columns])
        arrays = [column.values(rows) for column in self.columns]
        fields = [
            column.field.with_type(array.type)  # texts may be read as dictionaries
            for column, array in zip(self.columns, arrays, strict=True)
        ]
        return pa.table(arrays, schema=pa.schema(fields))


def is_image(data_type: pa.DataType) -> bool:
    """Return True for struct<bytes, path>, as Hugging Face datasets store images, with or without the path."""
    if not pa.types.is_struct(data_type) or not {"bytes"} <= {item.name for item in data_type} <= {"bytes", "path"}:
        return False
    fields = {item.name: item.type for item in data_type}
    is_data = fields["bytes"] in (pa.binary(), pa.large_binary(), pa.null())
    return is_data and fields.get("path", pa.null()) in (pa.string(), pa.large_string(), pa.null())


def image_columns(path: Path, item: pa.Field) -> list[Value | Rest]:
    """Return `image` and `image_bytes` for the image struct at a path that begins with the column `item`."""
    data = Value.at("image_bytes", (*path, "bytes"), item)
    has_path = type_at(path, item).get_field_index("path") >= 0
    return [ImageUri.of(path, item), data] if has_path else [data]


def type_at(path: Path, item: pa.Field) -> pa.DataType:
    """Return the plain type at a path that begins with the column `item`."""
    data_type = plain_type(item.type)
    for name in path[1:]:
        data_type = data_type.field(name).type
    return data_type


def leaves_of(schema: pa.Schema) -> Iterator[str]:
    """Yield every column and every field of structs, as paths with dots."""
    for item in schema:
        yield item.name
        for path in _leaves(plain_type(item.type), (item.name,)):
            if len(path) > 1:
                yield ".".join(path)


def _reads(path: Path, item: pa.Field) -> tuple[str, ...]:
    """Return the path to read: of the field alone, unless an encoding around it must be read whole."""
    data_type = item.type
    for name in path[1:]:
        if not pa.types.is_struct(data_type):
            return (item.name,)
        data_type = data_type.field(name).type
    return (".".join(path),)


def _at(table: pa.Table, path: Path) -> pa.ChunkedArray:
    """Return the values at a path; null where a struct on the way is null."""
    column = table[path[0]]
    for name in path[1:]:
        if not pa.types.is_struct(column.type):
            column = plain_column(column)
        column = pc.struct_field(column, name)
    return column


def _is_filled(data: pa.Array) -> pa.Array:
    """Return the rows with at least one byte."""
    if pa.types.is_null(data.type):
        return pa.repeat(pa.scalar(False), len(data))
    if pa.types.is_dictionary(data.type):
        filled = pc.fill_null(pc.greater(pc.binary_length(data.dictionary), 0), False)
        return pc.fill_null(filled.take(data.indices), False)
    return pc.fill_null(pc.greater(pc.binary_length(data), 0), False)


def _blanked(values: pa.Array, blank: pa.Array) -> pa.Array:
    """Return values, texts or a dictionary of them, with null in the rows `blank`."""
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(pc.if_else(blank, None, values.indices), values.dictionary)
    return pc.if_else(blank, pa.scalar(None, values.type), values)


def _leaves(data_type: pa.DataType, path: Path) -> Iterator[Path]:
    if not pa.types.is_struct(data_type) or not data_type.num_fields:
        yield path
        return
    for item in data_type:
        yield from _leaves(item.type, (*path, item.name))


def _without(data_type: pa.DataType, taken: Collection[Path]) -> pa.DataType | None:
    """Return a struct type without the paths `taken`; None if nothing is left."""
    fields = []
    for item in data_type:
        below = {path[1:] for path in taken if path[0] == item.name}
        if () in below:
            continue
        left = _without(item.type, below) if below else item.type
        if left is not None:
            fields.append(pa.field(item.name, left))
    return pa.struct(fields) if fields else None


def _narrowed(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Return an array with those fields of its structs that `wanted` has."""
    if array.type == wanted:
        return array
    children = [_narrowed(array.field(item.name), item.type) for item in wanted]
    return pa.StructArray.from_arrays(children, fields=list(wanted), mask=array.is_null())
