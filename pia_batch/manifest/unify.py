"""One schema for all files of a manifest, and tables converted to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from pia_batch.config import RequestIdFrom
from pia_batch.errors import ManifestError, message_of, printable
from pia_batch.manifest.arrow_types import EXTENSION, has_part, is_bytes, is_nested, plain_column, plain_type
from pia_batch.manifest.column_layout import MAX_COLUMNS
from pia_batch.schema.columns import REQUEST, RESERVED, conformed, is_mixed, mixed

Label = Callable[[str], str]
"""Function that returns a column's name for messages."""


def unify(schemas: list[pa.Schema], files: tuple[str, ...], label: Label = repr) -> pa.Schema:
    """Return one schema for all files; a column may be absent, wider, encoded differently or all null in some.

    Raises:
        ManifestError: a file has a column twice, or contradicts an earlier file.
    """
    unified = pa.schema([])
    for number, (schema, path) in enumerate(zip(schemas, files, strict=True)):
        repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if repeated:
            names = ", ".join(map(repr, repeated))
            msg = f"manifest file {path} has more than one column {names}; rename or drop the others"
            raise ManifestError(msg)
        schemas[number] = pa.schema([pa.field(item.name, plain_type(item.type)) for item in schema])
    _mix(schemas)
    for number, plain in enumerate(schemas):
        try:
            unified = _merged(unified, plain)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise ManifestError(_contradiction(schemas[: number + 1], files, label)) from None
    return unified


def _merged(first: pa.Schema, second: pa.Schema) -> pa.Schema:
    """Return a schema that holds the values of both.

    Raises:
        pa.ArrowException: They contradict each other, also by texts in one and bytes in the other, which Arrow joins.
    """
    merged = pa.unify_schemas([first, second], promote_options="permissive")
    for item in merged:
        types = [one.field(item.name).type for one in (first, second) if item.name in one.names]
        has_lost_texts = has_part(item.type, is_bytes) and not has_part(item.type, _is_text)
        if has_lost_texts and any(has_part(each, _is_text) for each in types):
            msg = f"column {item.name!r} has texts and bytes"
            raise pa.ArrowTypeError(msg)
    return merged


def _is_text(data_type: pa.DataType) -> bool:
    return data_type in (pa.string(), pa.large_string())


def _mix(schemas: list[pa.Schema]) -> None:
    """Give a column `mixed_type` in all files, in place, where values of one of them stand apart."""
    found = {item.name: item.type for schema in schemas for item in schema if is_mixed(item.type)}
    for number, schema in enumerate(schemas):
        for at, item in enumerate(schema):
            if item.name in found and _can_mix(item.type, found[item.name]):
                schema = schema.set(at, pa.field(item.name, found[item.name]))  # noqa: PLW2901 - as it grows
        schemas[number] = schema


def _can_mix(data_type: pa.DataType, mix: pa.DataType) -> bool:
    return data_type == mix or not is_nested(data_type) or _fits(data_type, mix.field(0).type)


def _fits(data_type: pa.DataType, wanted: pa.DataType) -> bool:
    """Return True if values of a type are those of `wanted`: texts, or lists."""
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(data_type))
    return _is_text(data_type)


def _mixed(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    """Return a column of one type as `mixed_type`: all of its values fit, or stand apart."""
    array, wanted = column.combine_chunks(), item.type.field(0).type
    is_id = item.name == "request_id" and pa.types.is_integer(array.type)
    if pa.types.is_null(array.type) or is_id or _fits(array.type, wanted):
        return pa.chunked_array([mixed(array.cast(wanted), pa.nulls(len(array), pa.string()))])
    return pa.chunked_array([mixed(pa.nulls(len(array), wanted), array.cast(pa.string()))])


def published(schema: pa.Schema, stored: Sequence[pa.Schema]) -> pa.Schema:
    """Return `schema` with the extension types that all files agree on, as results are published.

    Rows are processed as the values that an extension type stores, because not every process knows every such type.
    """
    fields = []
    for item in schema:
        of_files = [one.field(item.name) for one in stored if item.name in one.names]
        first = of_files[0] if of_files else item
        same = all(one.equals(first, check_metadata=True) for one in of_files)
        known = isinstance(first.type, pa.BaseExtensionType) and plain_type(first.type) == item.type
        marks = {key: value for key, value in (first.metadata or {}).items() if key.startswith(EXTENSION)}
        if same and known and _restores(first.type):
            fields.append(pa.field(item.name, first.type))
        else:
            fields.append(item.with_metadata(marks) if same and marks and first.type == item.type else item)
    return pa.schema(fields)


def _restores(extension: pa.DataType) -> bool:
    """Return True if Arrow makes values of an extension type from what it stores."""
    try:
        return bool(pa.nulls(1, plain_type(extension)).cast(extension).type == extension)
    except pa.ArrowException:
        return False


def _contradiction(schemas: list[pa.Schema], files: tuple[str, ...], label: Label) -> str:
    """Return a message about the column in which the last schema contradicts an earlier file."""
    last = schemas[-1]
    for name in last.names:
        for schema, path in zip(schemas[:-1], files, strict=False):
            if name not in schema.names:
                continue
            try:
                _merged(*(pa.schema([each.field(name)]) for each in (schema, last)))
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return (
                    f"manifest files disagree on column {label(name)}: {schema.field(name).type} in {path}, "
                    f"{last.field(name).type} in {files[len(schemas) - 1]}; write it with one type"
                )
    return f"manifest file {files[len(schemas) - 1]} contradicts the files before it; write all with one schema"


def check_columns(names: Sequence[str], place: str, ids: RequestIdFrom = "column") -> None:
    """Refuse columns that cannot be those of requests.

    Args:
        names: Names of the columns, ours.
        place: Name of their file for messages.
        ids: Origin of request ids; with `content`, they are no column.

    Raises:
        ManifestError: there are too many, a required one is absent, or one has the name of a result column.
    """
    if len(names) > MAX_COLUMNS:
        msg = f"{place} has {len(names)} columns; at most {MAX_COLUMNS} are read"
        raise ManifestError(msg)
    missing = [name for name in ("request_id",) if name not in names and ids != "content"]
    if "prompt" not in names and "prompts" not in names:
        missing.append("prompt")
    if "image" not in names and "image_bytes" not in names:
        missing.append("image")
    if missing:
        columns = ", ".join(map(_shown, names[:30])) + (", ..." if len(names) > 30 else "")  # noqa: PLR2004 - some lines
        lacking = " and no column ".join(map(repr, missing))
        likely = [f"--column {name}={source}" for name in missing if (source := _likely_source(name, names))]
        remedy = f"add it, or say which column is meant: {' '.join(likely) or f'--column {missing[0]}=NAME'}"
        if missing[0] == "request_id":
            remedy += (
                ". Without ids of your own, set request_id_from (--request-id-from): content makes them of image, "
                "prompt and settings, location of file and row"
            )
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            remedy = "write CSV with commas between the columns"
        msg = f"{place} has no column {lacking}; it has: {columns}; {remedy}"
        raise ManifestError(msg)
    taken = sorted(RESERVED.intersection(names))
    if taken:
        msg = (
            f"{place}: column {', '.join(map(repr, taken))} has the name of a result column; rename it, such as by "
            f"--column source_{taken[0]}={taken[0]}"
        )
        raise ManifestError(msg)


_SYNONYMS = {
    "request_id": ("__key__", "key", "id", "uid", "uuid", "image_id", "sample_id", "hash", "file_name", "filename"),
    "prompt": ("caption", "text", "txt", "description", "title", "captions", "TEXT"),
    "image": ("file_name", "image_path", "img_path", "path", "url", "image_url", "URL", "uri", "img", "photo"),
}
"""Names that other people's datasets have for the required columns, the likeliest first."""


def _likely_source(name: str, names: Sequence[str]) -> str | None:
    """Return the column that is likely meant by `name`: of the same spelling but for case and spaces, or a synonym."""
    alike = (each for each in names if each.strip().casefold() == name and each == each.strip())
    return next(alike, next((each for each in _SYNONYMS[name] if each in names), None))


def _shown(name: str) -> str:
    """Return a column's name on one line, in quotes if it has spaces around it."""
    return printable(name) if name == name.strip() else repr(name)


def conform(
    table: pa.Table,
    schema: pa.Schema,
    partitions: Mapping[str, str | None] | None = None,
    label: Label = repr,
) -> pa.Table:
    """Return `table` with the columns and types of `schema`; missing columns come from `partitions`, or are null."""
    for name, value in (partitions or {}).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
    return conformed(table, schema, lambda column, item: _cast(column, item, label))


def _cast(column: pa.ChunkedArray, item: pa.Field, label: Label) -> pa.ChunkedArray:
    try:
        if is_mixed(item.type) and not is_mixed(column.type):
            return _mixed(column, item)
        plain = column if plain_type(column.type) == column.type else plain_column(column)
        return plain if plain.type == item.type else _widened(plain, item)  # some casts to the same are invalid
    except pa.ArrowException as err:
        msg = (
            f"column {label(item.name)} is {column.type} here, and {item.type} with the other files: "
            f"{message_of(err)}; write it with one type"
        )
        raise ManifestError(msg) from None


def _widened(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    """Return the same values in the type that several files have in common; settings that are floats are rounded.

    Raises:
        pa.ArrowException: A value is not the same in it.
    """
    wanted = item.type
    if pa.types.is_integer(column.type) and pa.types.is_decimal(wanted):  # Arrow looks at the types, not the values
        return column.cast(pa.decimal128(_DIGITS, 0)).cast(wanted)
    found = column.cast(wanted)
    is_rounded = item.name in REQUEST.names and pa.types.is_floating(REQUEST.field(item.name).type)
    if not is_rounded and has_part(column.type, pa.types.is_decimal) and has_part(wanted, pa.types.is_floating):
        back = found.cast(column.type, safe=False)
        if not back.equals(column):
            msg = "a decimal number is not the same as a floating-point number"
            raise pa.ArrowInvalid(msg)
    return found


_DIGITS = 20
"""Number of decimal digits that hold any integer of 64 bits."""
