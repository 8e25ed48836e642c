"""Manifests: finding their files and reading them in batches. `validation` judges the rows.

A file that is corrupt, or built to unpack to what no machine holds, is a ManifestError that names it. Text and bytes
are bounded by the constants below, as long as a Parquet footer tells the truth; one that lies can cost 2 GiB, a page's
maximum, for each column. A list of equal numbers takes no space in a file, and its own size in memory.
"""

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

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from pia_batch import storage
from pia_batch.errors import ManifestError, message_of
from pia_batch.records import RESERVED
from pia_batch.uris import redacted, redacted_uri

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


SLICE_BYTES = 256 * 2**20
"""Text and bytes in one batch, unpacked: rows that hold more come in several batches, one row each at the least."""

MAX_ROW_BYTES = 32 * 2**10
MAX_ROW_BYTES_WITH_BYTES = 64 * 2**20
"""Text and bytes of one row, as a mean over the rows that are read at a time. A row that passes validation has at most
22 KiB, and its image besides; more is a dictionary of long values that many rows share."""

MAX_EXPANSION = 1000
MAX_EXPANDED_BYTES = 2**30
"""A row group that is larger than this when unpacked may not be more than so many times the size of its file."""

MAX_TEXT_BYTES = 512 * 2**20
"""Of all files of a JSONL or CSV manifest: those are read whole."""

MAX_ROWS = 200_000_000
"""Of a manifest: the driver holds about 50 bytes a row."""

MAX_COLUMNS = 1000

_MAX_FOOTER_BYTES = 64 * 2**20


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
            ManifestError: nothing there, unreadable, empty, too large, mixed formats, files that contradict each
                other, a required column missing, or a column that bears the name of a result's.
            ConfigError: `uri` is none.
        """
        uri = storage.absolute(uri).rstrip("/")
        shown = redacted_uri(uri)
        with _reading(shown):
            filesystem, root = storage.arrow_filesystem(uri)
            files, file_format = _discover(filesystem, root, shown)
        tables: dict[str, pa.Table] = {}
        if file_format == "parquet":
            with ThreadPoolExecutor(16) as pool:
                footers = list(pool.map(lambda path: _footer(filesystem, path), files))
            schemas, num_rows = [schema for schema, _ in footers], sum(rows for _, rows in footers)
        else:
            _check_text_bytes(filesystem, files, shown)
            read = _read_jsonl if file_format == "jsonl" else _read_csv
            tables = {path: read(filesystem, path) for path in files}
            schemas, num_rows = [table.schema for table in tables.values()], sum(map(len, tables.values()))
        if not 0 < num_rows <= MAX_ROWS:
            limit = f"; split it into manifests of at most {MAX_ROWS}" if num_rows else ""
            msg = f"manifest {shown} has {num_rows or 'no'} rows{limit}"
            raise ManifestError(msg)
        schema = _unify(schemas, files)
        for name in _partitions(files[0], root):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        _check_columns(schema, shown)
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
                    table = _conform(read, schema, _partitions(path, self._root), path)
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
        row_bytes = MAX_ROW_BYTES_WITH_BYTES if "image_bytes" in names else MAX_ROW_BYTES
        with _reading(path), self.filesystem.open_input_file(path) as source:
            footer = pq.ParquetFile(source)
            present = [name for name in names if name in footer.schema_arrow.names]
            # As dictionaries, so that a value that a million rows share is unpacked once until its size is known.
            texts = [name for name in present if _is_text(footer.schema_arrow.field(name).type)]
            file = pq.ParquetFile(
                source, metadata=footer.metadata, read_dictionary=texts, page_checksum_verification=True
            )
            first_row = 0
            for batch in file.iter_batches(batch_size=rows, columns=present):
                sizes = _text_bytes(batch)
                if sizes.sum() > rows * row_bytes:
                    last, mib, most = first_row + len(batch) - 1, sizes.sum() // 2**20, rows * row_bytes // 2**20
                    msg = (
                        f"manifest file {path}: {mib} MiB of text and bytes in the rows {first_row} to {last}; "
                        f"at most {most} MiB are read"
                    )
                    raise ManifestError(msg)
                yield from _unpacked(batch, sizes)
                first_row += len(batch)


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


def _conform(table: pa.Table, schema: pa.Schema, partitions: Mapping[str, str], path: str) -> pa.Table:
    try:
        return conform(table, schema, partitions)
    except ManifestError as err:
        msg = f"manifest file {path}: {err}"
        raise ManifestError(msg) from None


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ManifestError that names `place`."""
    try:
        yield
    except ManifestError:
        raise
    except Exception as err:  # noqa: BLE001 - every file system has its own classes for what goes wrong
        msg = f"cannot read manifest {place}: {redacted(message_of(err))}"
        raise ManifestError(msg) from None


def _cast(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(item.type)
    except pa.ArrowInvalid as err:
        msg = f"column {item.name!r} is {column.type} here, and {item.type} with the other files: {message_of(err)}"
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
        num_bytes = source.size()
        _check_footer_bytes(source, num_bytes, path)
        file = pq.ParquetFile(source)
        _check_expansion(file.metadata, num_bytes, path)
        return file.schema_arrow.remove_metadata(), file.metadata.num_rows


def _check_footer_bytes(source: pa.NativeFile, num_bytes: int, path: str) -> None:
    """A footer is read whole, and unpacks to about ten times its size."""
    if num_bytes <= _MAX_FOOTER_BYTES:
        return
    footer_bytes = int.from_bytes(source.read_at(8, num_bytes - 8)[:4], "little")
    if footer_bytes > _MAX_FOOTER_BYTES:
        msg = f"manifest file {path} has a footer of {footer_bytes} bytes; write larger row groups, or several files"
        raise ManifestError(msg)


def _check_expansion(metadata: pq.FileMetaData, num_bytes: int, path: str) -> None:
    """Refuse what says itself that it unpacks to too much.

    Row groups as a whole are asked and not their columns: for some corrupt footers `RowGroupMetaData.column` of
    pyarrow 26 ends the process by a C++ exception (measured).
    """
    if metadata.num_columns > MAX_COLUMNS:
        msg = f"manifest file {path} has {metadata.num_columns} columns; at most {MAX_COLUMNS} are read"
        raise ManifestError(msg)
    for group in range(metadata.num_row_groups):
        unpacked = metadata.row_group(group).total_byte_size
        if unpacked > max(MAX_EXPANDED_BYTES, num_bytes * MAX_EXPANSION):
            msg = (
                f"manifest file {path}: row group {group} unpacks to {unpacked} bytes, from a file of {num_bytes}; "
                "write it in smaller row groups"
            )
            raise ManifestError(msg)


def _is_text(data_type: pa.DataType) -> bool:
    """Whether Parquet stores it as byte arrays, which it can hand over as dictionaries."""
    return _plain(data_type) in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _text_bytes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The bytes that the dictionary columns of each row will have, once unpacked; shape (rows,)."""
    sizes = np.zeros(len(batch), np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.fill_null(pc.binary_length(column.dictionary), 0).take(column.indices)
            sizes += np.asarray(pc.fill_null(lengths, 0))
    return sizes


def _unpacked(batch: pa.RecordBatch, sizes: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """The rows of `batch` without dictionaries, in tables of about SLICE_BYTES."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(batch):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + SLICE_BYTES, side="right")))
        table = pa.Table.from_batches([batch.slice(start, stop - start)])
        for number, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(number, table.field(number).name, column.cast(column.type.value_type))
        yield table
        start = stop


def _plain(data_type: pa.DataType) -> pa.DataType:
    """The type of the values themselves, whatever their encoding; Arrow can do little with the others."""
    if pa.types.is_dictionary(data_type):
        return _plain(data_type.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(data_type, data_type)


def _unify(schemas: list[pa.Schema], files: tuple[str, ...]) -> pa.Schema:
    """One schema for all files: a column may be missing, of a wider type, of another encoding, or null throughout."""
    unified = pa.schema([])
    for number, (schema, path) in enumerate(zip(schemas, files, strict=True)):
        repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if repeated:
            msg = f"manifest file {path} has more than one column {', '.join(map(repr, repeated))}"
            raise ManifestError(msg)
        plain = pa.schema([pa.field(item.name, _plain(item.type)) for item in schema])
        schemas[number] = plain
        try:
            unified = pa.unify_schemas([unified, plain], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise ManifestError(_contradiction(schemas[: number + 1], files)) from None
    return unified


def _contradiction(schemas: list[pa.Schema], files: tuple[str, ...]) -> str:
    """Which column of the last schema does not go with which file before it."""
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


def _check_columns(schema: pa.Schema, uri: str) -> None:
    if len(schema) > MAX_COLUMNS:
        msg = f"manifest {uri} has {len(schema)} columns; at most {MAX_COLUMNS} are read"
        raise ManifestError(msg)
    missing = [name for name in ("request_id", "prompt") if name not in schema.names]
    if "image" not in schema.names and "image_bytes" not in schema.names:
        missing.append("image")
    if missing:
        columns = ", ".join(schema.names[:30]) + (", ..." if len(schema) > 30 else "")  # noqa: PLR2004 - some lines
        msg = f"manifest {uri} has no column {' and no column '.join(map(repr, missing))}; it has: {columns}"
        raise ManifestError(msg)
    taken = sorted(RESERVED.intersection(schema.names))
    if taken:
        msg = f"manifest {uri}: column {', '.join(map(repr, taken))} has the name of a result column; rename it"
        raise ManifestError(msg)


def _check_text_bytes(filesystem: pyarrow.fs.FileSystem, files: tuple[str, ...], uri: str) -> None:
    with _reading(uri):
        num_bytes = sum(info.size or 0 for info in filesystem.get_file_info(list(files)))
    if num_bytes > MAX_TEXT_BYTES:
        msg = f"manifest {uri} has {num_bytes} bytes of JSONL or CSV; above {MAX_TEXT_BYTES}, write it as Parquet"
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
        msg = f"manifest file {path} is not CSV with a header line: {message_of(err)}"
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
            msg = f"manifest file {path}, line {number}: not JSON: {message_of(err)}"
            raise ManifestError(msg) from None
        if not isinstance(row, dict):
            msg = f"manifest file {path}, line {number}: a JSON object is required, not {type(row).__name__}"
            raise ManifestError(msg)
        for name in row:
            columns.setdefault(name, [None] * num_rows)
        if len(columns) > MAX_COLUMNS:
            msg = f"manifest file {path}, line {number}: more than {MAX_COLUMNS} different names; are they values?"
            raise ManifestError(msg)
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
