"""Parquet, JSONL and CSV files as sources, at any store and on the Hugging Face hub."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from pia_batch.datasets.json_columns import json_table
from pia_batch.datasets.sources import (
    PART_BYTES,
    PART_ROWS,
    Piece,
    Place,
    ReadOptions,
    Rows,
    check_version,
    reading,
)
from pia_batch.errors import ManifestError, message_of
from pia_batch.manifest import hive
from pia_batch.manifest.csv_dialect import check_quotes
from pia_batch.manifest.foreign_formats import refuse_other_format
from pia_batch.manifest.table_formats import refuse_data_of_table
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.file_kinds import HEAD_BYTES
from pia_batch.storage.filesystems import FoundFile
from pia_batch.storage.uris import redacted_uri

PARQUET = (".parquet", ".pq")
JSONL = tuple(f"{name}{end}" for name in (".jsonl", ".ndjson") for end in ("", ".gz", ".zst"))
CSV = tuple(f".csv{end}" for end in ("", ".gz", ".zst"))

_OPEN_THREADS = 16


def is_parquet(place: Place) -> bool:
    """Return True for Parquet files by name, or a single file by its first bytes."""
    return bool(place.visible(*PARQUET)) or (place.is_file and place.head(place.files[0], 4) == b"PAR1")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files in pieces of neighbouring row groups."""

    filesystem: pyarrow.fs.FileSystem
    pieces: Sequence[Piece]
    pinned: Mapping[str, str]
    schema: pa.Schema
    status: str | None = None
    """Column of img2dataset that is `success` for rows that have an image; None: every row counts."""
    int96_unit: str | None = None
    """Unit in which the old timestamps of Spark and Impala are read; None: nanoseconds, in which all of them fit."""

    @classmethod
    def open(cls, place: Place, options: ReadOptions, *, status: str | None = None) -> ParquetSource:
        """Open all files, and read their footers."""
        del options
        files = place.visible(*PARQUET) or list(place.files[:1] if place.is_file else ())

        def footer(file: FoundFile, unit: str | None = None) -> tuple[pq.FileMetaData, pa.Schema]:
            with reading(file.path), place.filesystem.open_input_file(file.path) as stream:
                head = bytes(stream.read_at(min(HEAD_BYTES, stream.size()), 0))
                refuse_other_format(head, f"source {redacted_uri(file.path)}", "parquet")
                opened = pq.ParquetFile(stream, coerce_int96_timestamp_unit=unit)
                return opened.metadata, opened.schema_arrow

        def has_far_times(file: FoundFile) -> bool:
            with reading(file.path), place.filesystem.open_input_file(file.path) as stream:
                return _has_far_int96(stream)

        footers = list(map_in_threads(footer, files, _OPEN_THREADS))
        old = [file for file, (metadata, _) in zip(files, footers, strict=True) if _int96_columns(metadata)]
        unit = "us" if any(map_in_threads(has_far_times, old, _OPEN_THREADS)) else None
        if unit is not None:
            footers = [footer(file, unit) for file in files]
        pieces, schemas = [], []
        for file, (metadata, stored) in zip(files, footers, strict=True):
            partitions = _partitions(place.name_of(file.path))
            schema = stored.remove_metadata()
            refuse_data_of_table(metadata.metadata or {}, schema.names, f"source {redacted_uri(file.path)}")
            schemas.append(schema)
            for groups, first_row in _neighbours(metadata):
                name = f"{place.name_of(file.path)}, row {first_row}"
                detail = (file, place.name_of(file.path), groups, first_row, partitions)
                pieces.append(Piece(name, file.version, detail))
        names = {name for file in files for name in _partitions(place.name_of(file.path))}
        with reading(place.uri):
            unified = pa.unify_schemas(schemas, promote_options="permissive")
        for name in sorted(names - set(unified.names)):
            unified = unified.append(pa.field(name, pa.string()))
        return cls(place.filesystem, tuple(pieces), _pinned(place), unified, status, unit)

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of some row groups."""
        file: FoundFile = piece.detail[0]
        name, groups, row, partitions = piece.detail[1:]
        check_version(self.filesystem, file)
        skipped = 0
        with reading(file.path), self.filesystem.open_input_file(file.path) as stream:
            opened = pq.ParquetFile(
                stream, page_checksum_verification=True, coerce_int96_timestamp_unit=self.int96_unit
            )
            for table in _parts(opened, groups):
                for column, value in partitions.items():
                    if column not in table.column_names:
                        table = table.append_column(column, pa.repeat(pa.scalar(value, pa.string()), len(table)))  # noqa: PLW2901
                places = pa.array([f"{name}:{number}" for number in range(row, row + len(table))], pa.string())
                row += len(table)
                if self.status is not None:
                    done = pc.fill_null(pc.equal(table[self.status], "success"), False)
                    skipped = len(table) - (pc.sum(done).as_py() or 0)
                    table, places = table.filter(done), places.filter(done.combine_chunks())  # noqa: PLW2901
                yield Rows(table, places, skipped, _folder_of_images(name))
        check_version(self.filesystem, file)


def _int96_columns(metadata: pq.FileMetaData) -> list[str]:
    """Return the paths of columns with INT96 timestamps, whose days and nanoseconds hold more years than Arrow's."""
    columns = (metadata.schema.column(number) for number in range(metadata.num_columns))
    return [column.path for column in columns if column.physical_type == "INT96"]


def _has_far_int96(stream: pa.NativeFile) -> bool:
    """Return True if a file has INT96 timestamps before 1678 or after 2262, which would wrap in nanoseconds."""
    exact, wide = pq.ParquetFile(stream), pq.ParquetFile(stream, coerce_int96_timestamp_unit="us")
    columns = _int96_columns(exact.metadata)
    for some, same in zip(exact.iter_batches(columns=columns), wide.iter_batches(columns=columns), strict=True):
        try:
            same.cast(some.schema)
        except pa.ArrowInvalid:
            return True
    return False


def _parts(file: pq.ParquetFile, groups: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the rows of some row groups, together unless they are larger than one part."""
    metadata = file.metadata
    rows = sum(metadata.row_group(group).num_rows for group in groups)
    num_bytes = sum(metadata.row_group(group).total_byte_size for group in groups)
    if rows <= PART_ROWS and num_bytes <= PART_BYTES:
        yield file.read_row_groups(list(groups), use_threads=False)
        return
    most = max(1, min(PART_ROWS, rows * PART_BYTES // num_bytes))
    for batch in file.iter_batches(batch_size=most, row_groups=list(groups), use_threads=False):
        yield pa.Table.from_batches([batch])


def _neighbours(metadata: pq.FileMetaData) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield the numbers of row groups that are one piece, with the number of their first row."""
    waiting: list[int] = []
    rows = num_bytes = first = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if waiting and (rows + group.num_rows > PART_ROWS or num_bytes + group.total_byte_size > PART_BYTES):
            yield tuple(waiting), first
            waiting, first, rows, num_bytes = [], first + rows, 0, 0
        if group.num_rows:
            waiting.append(number)
            rows, num_bytes = rows + group.num_rows, num_bytes + group.total_byte_size
    if waiting:
        yield tuple(waiting), first


def _partitions(name: str) -> dict[str, str | None]:
    """Return the hive partitions in the folders of a file."""
    return hive.partitions_in(name.split("/")[:-1])


def _pinned(place: Place) -> dict[str, str]:
    return {"commit": place.commit} if place.commit else {}


@dataclass(frozen=True)
class TextSource:
    """JSONL or CSV files, one piece each; `.gz` and `.zst` are decompressed."""

    filesystem: pyarrow.fs.FileSystem
    pieces: Sequence[Piece]
    pinned: Mapping[str, str]
    is_csv: bool
    options: ReadOptions
    schema: pa.Schema | None = None

    @classmethod
    def open_jsonl(cls, place: Place, options: ReadOptions) -> TextSource:
        """Open JSONL files."""
        return cls._open(place, options, is_csv=False)

    @classmethod
    def open_csv(cls, place: Place, options: ReadOptions) -> TextSource:
        """Open CSV files with a header line."""
        return cls._open(place, options, is_csv=True)

    @classmethod
    def _open(cls, place: Place, options: ReadOptions, *, is_csv: bool) -> TextSource:
        files = place.visible(*(CSV if is_csv else JSONL)) or list(place.files[:1] if place.is_file else ())
        names = [place.name_of(file.path) for file in files]
        pieces = [Piece(name, file.version, (file, name)) for file, name in zip(files, names, strict=True)]
        return cls(place.filesystem, tuple(pieces), _pinned(place), is_csv, options)

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a file."""
        file, name = piece.detail
        check_version(self.filesystem, file)
        with reading(file.path), self._stream(file) as stream:
            refuse_other_format(bytes(stream.read(HEAD_BYTES)), f"source {redacted_uri(file.path)}", "text")
        row = 0
        for table in self._csv(file) if self.is_csv else self._jsonl(file):
            places = pa.array([f"{name}:{number}" for number in range(row, row + len(table))], pa.string())
            row += len(table)
            yield Rows(table, places, folder=_folder_of_images(name))
        check_version(self.filesystem, file)

    def _stream(self, file: FoundFile) -> pa.NativeFile:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path[file.path.rfind(".") :].lower())
        return self.filesystem.open_input_stream(file.path, compression=compression)

    def _csv(self, file: FoundFile) -> Iterator[pa.Table]:
        convert = pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in self.options.text}, strings_can_be_null=True, null_values=[""]
        )
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        self._check_quotes(file)
        try:
            with reading(file.path), self._stream(file) as stream:
                read = pyarrow.csv.ReadOptions(block_size=PART_BYTES, use_threads=False)
                with pyarrow.csv.open_csv(stream, read, parse, convert) as reader:
                    for batch in reader:
                        table = pa.Table.from_batches([batch])
                        _refuse_bytes(table.schema, file.path)
                        yield from (table.slice(start, PART_ROWS) for start in range(0, len(table), PART_ROWS))
        except ManifestError as err:
            if "onversion error" not in str(err):
                raise
            raise ManifestError(f"{err}; --text COLUMN keeps a column as text") from None

    def _check_quotes(self, file: FoundFile) -> None:
        """Refuse quotes inside of a field that are marked by a backslash: Arrow would read another text."""
        with reading(file.path), self._stream(file) as stream:
            if not any(b'\\"' in line for line in _lines(stream)):
                return
        with reading(file.path), self._stream(file) as stream:
            lines = (f"{line.decode(errors='surrogateescape')}\n" for line in _lines(stream))
            check_quotes(lines, f"source {redacted_uri(file.path)}")

    def _jsonl(self, file: FoundFile) -> Iterator[pa.Table]:
        waiting: list[dict[str, Any]] = []
        num_bytes = 0
        with reading(file.path), self._stream(file) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if not line.strip():
                    continue
                waiting.append(_json_object(line, file.path, number))
                num_bytes += len(line)
                if num_bytes > PART_BYTES or len(waiting) == PART_ROWS:
                    yield json_table(waiting, len(waiting), self.options.text, self.options.paths)
                    waiting, num_bytes = [], 0
        if waiting:
            yield json_table(waiting, len(waiting), self.options.text, self.options.paths)


def _refuse_bytes(schema: pa.Schema, path: str) -> None:
    """Refuse columns of a CSV file that Arrow reads as bytes: they might be taken for those of images."""
    wrong = [item.name for item in schema if pa.types.is_binary(item.type)]
    if wrong:
        raise ManifestError(
            f"source {redacted_uri(path)}: column {wrong[0]!r} has text that is not UTF-8; save the file as UTF-8"
        )


def _folder_of_images(name: str) -> str:
    """Return the folder that relative names start from: in the metadata of a Hugging Face image folder, the file's."""
    folder, base = posixpath.split(name)
    return folder if base.lower().startswith("metadata.") else ""


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """Yield the lines of a stream, which has no such method where it is decompressed."""
    rest = b""
    while block := stream.read(2**20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _json_object(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (ValueError, RecursionError) as err:
        raise ManifestError(f"source {path}, line {number}: not JSON: {message_of(err)}; {_ONE_A_LINE}") from None
    if not isinstance(row, dict):
        raise ManifestError(f"source {path}, line {number}: each line must be one JSON object; {_ONE_A_LINE}")
    return row


_ONE_A_LINE = "write one object on each line (pandas: to_json(..., orient='records', lines=True); jq -c)"
