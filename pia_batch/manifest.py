"""Manifests: finding their files and reading them in batches. `validation` judges the rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from pia_batch import storage
from pia_batch.errors import ManifestError
from pia_batch.records import RESERVED

FileFormat = Literal["parquet", "jsonl", "csv"]

EXTENSIONS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}

BATCH_ROWS = 65_536
BATCH_ROWS_WITH_BYTES = 256
"""Rows read at a time where the images lie in the manifest: a few hundred images fit in memory, 65,536 do not."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a manifest, and where they stand in it."""

    table: pa.Table
    file: str
    first_row: int
    """Row number inside `file`, from 0."""
    ordinal: int
    """Row number inside the manifest, from 0."""


@dataclass(frozen=True)
class Manifest:
    """The files of a manifest, in order, with one schema over all of them."""

    uri: str
    format: FileFormat
    files: tuple[str, ...]
    """Paths inside the file system."""
    schema: pa.Schema
    num_rows: int
    filesystem: pyarrow.fs.FileSystem = field(repr=False)
    _root: str
    _tables: dict[str, pa.Table] = field(repr=False)
    """JSONL and CSV files, which are read whole. Parquet is streamed."""

    @classmethod
    def open(cls, uri: str) -> Manifest:
        """Find the files and their schema. Reads Parquet footers, and JSONL and CSV files whole.

        Raises:
            ManifestError: nothing there, unreadable, empty, mixed formats, files that contradict each other,
                a required column missing, or a column that bears the name of a result's.
        """
        uri = storage.absolute(uri).rstrip("/")
        with _reading(uri):
            filesystem, root = storage.arrow_filesystem(uri)
            files, file_format = _discover(filesystem, root, uri)
        tables: dict[str, pa.Table] = {}
        if file_format == "parquet":
            with ThreadPoolExecutor(16) as pool:
                footers = list(pool.map(lambda path: _footer(filesystem, path), files))
            schemas, num_rows = [schema for schema, _ in footers], sum(rows for _, rows in footers)
        else:
            read = _read_jsonl if file_format == "jsonl" else _read_csv
            tables = {path: read(filesystem, path) for path in files}
            schemas, num_rows = [table.schema for table in tables.values()], sum(map(len, tables.values()))
        if not num_rows:
            msg = f"manifest {uri} has no rows"
            raise ManifestError(msg)
        schema = _unify(schemas, files)
        for name in _partitions(files[0], root):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        _check_columns(schema, uri)
        return cls(uri, file_format, files, schema, num_rows, filesystem, root, tables)

    @property
    def folder(self) -> str:
        """The URI that relative image paths start from."""
        return self.uri.rsplit("/", 1)[0] if self.files == (self._root,) else self.uri

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """The rows in order, `columns` only (those that exist).

        Raises:
            ManifestError: a file is corrupt, or went away.
        """
        names = [name for name in self.schema.names if columns is None or name in columns]
        schema = pa.schema([self.schema.field(name) for name in names])
        ordinal = 0
        for path in self.files:
            first_row = 0
            for read in self._read(path, names):
                with _reading(path):
                    table = conform(read, schema, _partitions(path, self._root))
                    table.validate(full=True)  # text that is no UTF-8 would stop the checks half-way
                yield Batch(table, path, first_row, ordinal)
                first_row += len(table)
                ordinal += len(table)

    def _read(self, path: str, names: list[str]) -> Iterator[pa.Table]:
        if self.format != "parquet":
            table = self._tables[path]
            yield table.select([name for name in names if name in table.column_names])
            return
        rows = BATCH_ROWS_WITH_BYTES if "image_bytes" in names else BATCH_ROWS
        with _reading(path), self.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            present = [name for name in names if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=rows, columns=present):
                yield pa.Table.from_batches([batch])


def conform(table: pa.Table, schema: pa.Schema, partitions: Mapping[str, str] | None = None) -> pa.Table:
    """`table` in the columns and types of `schema`; what it lacks comes from its `partitions`, or is null."""
    columns = []
    for item in schema:
        if item.name in table.column_names:
            columns.append(_cast(table[item.name], item))
        elif item.name in (partitions or {}):
            columns.append(pa.repeat((partitions or {})[item.name], len(table)))
        else:
            columns.append(pa.nulls(len(table), item.type))
    return pa.table(columns, schema=schema)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ManifestError that names `place`."""
    try:
        yield
    except ManifestError:
        raise
    except Exception as err:  # noqa: BLE001 - every file system has its own classes for what goes wrong
        msg = storage.redacted(f"cannot read manifest {place}: {err}")
        raise ManifestError(msg) from None


def _cast(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(item.type)
    except pa.ArrowInvalid as err:
        msg = f"column {item.name!r} is {column.type} here, and {item.type} with the other files: {err}"
        raise ManifestError(msg) from None


def _discover(filesystem: pyarrow.fs.FileSystem, root: str, uri: str) -> tuple[tuple[str, ...], FileFormat]:
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        msg = f"manifest {uri} does not exist"
        raise ManifestError(msg)
    if info.type == pyarrow.fs.FileType.File:
        return (root,), EXTENSIONS.get(PurePosixPath(root).suffix.lower(), "parquet")
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    files = sorted(item.path for item in found if item.is_file and not _hidden(item.path, root))
    formats = {EXTENSIONS.get(PurePosixPath(path).suffix.lower()) for path in files} - {None}
    if len(formats) != 1:
        what = "no file that ends in" if not formats else "a mixture of files that end in"
        msg = f"manifest {uri} has {what} {', '.join(EXTENSIONS)}; give it files of one format"
        raise ManifestError(msg)
    (file_format,) = formats
    chosen = tuple(path for path in files if EXTENSIONS.get(PurePosixPath(path).suffix.lower()))
    return chosen, file_format or "parquet"


def _below(path: str, root: str) -> PurePosixPath:
    return PurePosixPath(path.removeprefix(root).lstrip("/"))


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in _below(path, root).parts)


def _partitions(path: str, root: str) -> dict[str, str]:
    """The hive partitions in the folders of a file: `dt=2026-11-22/part.parquet` gives {"dt": "2026-11-22"}."""
    pairs = [part.split("=", 1) for part in _below(path, root).parts[:-1] if "=" in part]
    return {name: unquote(value) for name, value in pairs}


def _footer(filesystem: pyarrow.fs.FileSystem, path: str) -> tuple[pa.Schema, int]:
    with _reading(path), filesystem.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        return file.schema_arrow.remove_metadata(), file.metadata.num_rows


def _plain(data_type: pa.DataType) -> pa.DataType:
    """The type of the values themselves, whatever their encoding; Arrow can do little with the others."""
    if pa.types.is_dictionary(data_type):
        return _plain(data_type.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(data_type, data_type)


def _unify(schemas: list[pa.Schema], files: tuple[str, ...]) -> pa.Schema:
    unified = schemas[0]
    for schema, path in zip(schemas[1:], files[1:], strict=True):
        try:
            unified = pa.unify_schemas([unified, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
            msg = f"manifest file {path} contradicts the files before it: {err}"
            raise ManifestError(msg) from None
    return pa.schema([pa.field(item.name, _plain(item.type)) for item in unified])


def _check_columns(schema: pa.Schema, uri: str) -> None:
    missing = [name for name in ("request_id", "prompt") if name not in schema.names]
    if "image" not in schema.names and "image_bytes" not in schema.names:
        missing.append("image")
    if missing:
        columns = ", ".join(schema.names)
        msg = f"manifest {uri} has no column {' and no column '.join(map(repr, missing))}; it has: {columns}"
        raise ManifestError(msg)
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        msg = f"manifest {uri} has more than one column {', '.join(map(repr, repeated))}"
        raise ManifestError(msg)
    taken = sorted(RESERVED.intersection(schema.names))
    if taken:
        msg = f"manifest {uri}: column {', '.join(map(repr, taken))} has the name of a result column; rename it"
        raise ManifestError(msg)


def _read_bytes(filesystem: pyarrow.fs.FileSystem, path: str) -> bytes:
    with _reading(path), filesystem.open_input_file(path) as source:
        return bytes(source.read()).removeprefix(codecs.BOM_UTF8)


def _read_csv(filesystem: pyarrow.fs.FileSystem, path: str) -> pa.Table:
    """Every column as strings: guessing types would turn the id "007" into 7. An empty field is null."""
    data = pa.BufferReader(_read_bytes(filesystem, path))
    parse_options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        names = pyarrow.csv.open_csv(data, parse_options=parse_options).schema.names
        data.seek(0)
        return pyarrow.csv.read_csv(
            data,
            parse_options=parse_options,
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as err:
        msg = f"manifest file {path} is not CSV with a header line: {err}"
        raise ManifestError(msg) from None


def _read_jsonl(filesystem: pyarrow.fs.FileSystem, path: str) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for number, line in enumerate(_read_bytes(filesystem, path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            msg = f"manifest file {path}, line {number}: not JSON: {err}"
            raise ManifestError(msg) from None
        if not isinstance(row, dict):
            msg = f"manifest file {path}, line {number}: a JSON object is required, not {type(row).__name__}"
            raise ManifestError(msg)
        for name in row:
            columns.setdefault(name, [None] * num_rows)
        for name, values in columns.items():
            values.append(row.get(name))
        num_rows += 1
    with _reading(path):  # JSON can spell half a surrogate pair, which is no text
        return pa.table({name: _infer(values) for name, values in columns.items()})


def _infer(values: list[Any]) -> pa.Array:
    """One Arrow column; values of several types become their JSON texts, and `check` judges those."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        texts = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
        return pa.array(texts, pa.string())
