"""One schema for all files of a manifest, and tables converted to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from pia_batch.errors import ManifestError, message_of
from pia_batch.manifest.files import MAX_COLUMNS, plain_type
from pia_batch.schema.columns import RESERVED, conformed


def unify(schemas: list[pa.Schema], files: tuple[str, ...]) -> pa.Schema:
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
        plain = pa.schema([pa.field(item.name, plain_type(item.type)) for item in schema])
        schemas[number] = plain
        try:
            unified = pa.unify_schemas([unified, plain], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise ManifestError(_contradiction(schemas[: number + 1], files)) from None
    return unified


def _contradiction(schemas: list[pa.Schema], files: tuple[str, ...]) -> str:
    """Return a message about the column in which the last schema contradicts an earlier file."""
    last = schemas[-1]
    for name in last.names:
        for schema, path in zip(schemas[:-1], files, strict=False):
            if name not in schema.names:
                continue
            try:
                pa.unify_schemas([pa.schema([s.field(name)]) for s in (schema, last)], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return (
                    f"manifest files disagree on column {name!r}: {schema.field(name).type} in {path}, "
                    f"{last.field(name).type} in {files[len(schemas) - 1]}; write it with one type"
                )
    return f"manifest file {files[len(schemas) - 1]} contradicts the files before it; write all with one schema"


def check_columns(names: Sequence[str], place: str) -> None:
    """Refuse columns that cannot be those of requests; `place` names their file for messages.

    Raises:
        ManifestError: there are too many, a required one is absent, or one has the name of a result column.
    """
    if len(names) > MAX_COLUMNS:
        msg = f"{place} has {len(names)} columns; at most {MAX_COLUMNS} are read"
        raise ManifestError(msg)
    missing = [name for name in ("request_id", "prompt") if name not in names]
    if "image" not in names and "image_bytes" not in names:
        missing.append("image")
    if missing:
        columns = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")  # noqa: PLR2004 - some lines
        lacking = " and no column ".join(map(repr, missing))
        remedy = "add it, or rename the column that is meant"
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            remedy = "write CSV with commas between the columns"
        msg = f"{place} has no column {lacking}; it has: {columns}; {remedy}"
        raise ManifestError(msg)
    taken = sorted(RESERVED.intersection(names))
    if taken:
        msg = f"{place}: column {', '.join(map(repr, taken))} has the name of a result column; rename it"
        raise ManifestError(msg)


def conform(table: pa.Table, schema: pa.Schema, partitions: Mapping[str, str] | None = None) -> pa.Table:
    """Return `table` with the columns and types of `schema`; missing columns come from `partitions`, or are null."""
    for name, value in (partitions or {}).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(value, len(table)))
    return conformed(table, schema, _cast)


def _cast(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(item.type)
    except pa.ArrowInvalid as err:
        msg = f"column {item.name!r} is {column.type} here, and {item.type} with the other files: {message_of(err)}"
        raise ManifestError(msg) from None
