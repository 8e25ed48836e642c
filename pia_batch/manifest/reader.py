"""Manifests: their files, one schema for all of them, and their rows in batches, or in pieces for many workers.

`discovery` finds the files, `files` reads untrusted ones safely, and `validation` validates the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs

from pia_batch.errors import ConfigError, ManifestError, message_of, printable
from pia_batch.manifest import hive
from pia_batch.manifest.arrow_types import has_lists, is_nested, plain_type, refuse_unsupported
from pia_batch.manifest.column_map import NO_MAP, ColumnMap
from pia_batch.manifest.discovery import below, check_stored_bytes, discover, location, partitions_of
from pia_batch.manifest.files import (
    Contents,
    Known,
    ManifestFile,
    reading,
)
from pia_batch.manifest.formats import FileFormat
from pia_batch.manifest.pieces import Piece, conform_rows, conformed, neighbours
from pia_batch.manifest.text_files import TextBudget
from pia_batch.manifest.unify import check_columns, published, unify
from pia_batch.schema.columns import REQUEST
from pia_batch.storage import filesystems, store_uris
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.uris import redacted_uri

MAX_ROWS = 200_000_000
"""Largest number of rows of a manifest; the driver needs about 50 bytes for each."""

CHECKED_BYTES = 2**30
"""Bytes of lists and maps that are read when a manifest is opened, because those of some writers cannot be read.

Beyond it, and for other nested columns, the first SAMPLE_ROWS rows of SAMPLE_FILES files are read."""

SAMPLE_FILES, SAMPLE_ROWS = 16, 1000

OPEN_THREADS = 16
"""Number of manifest files that are opened at a time."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a manifest, with their position in it."""

    table: pa.Table
    file: str
    first_row: int
    """Row number inside `file`, from 0."""
    ordinal: int
    """Row number inside the manifest, from 0."""


@dataclass(frozen=True)
class Manifest:
    """Files of a manifest, in order, with one schema for all of them."""

    uri: str
    format: FileFormat
    files: tuple[str, ...]
    """Paths inside the file system."""
    schema: pa.Schema
    num_rows: int
    published: pa.Schema
    """`schema` with the extension types that the files have, as results are published."""
    left_out: tuple[str, ...]
    """Paths of files of a folder that are not read, and are neither images nor notes."""
    filesystem: pyarrow.fs.FileSystem = field(repr=False)
    _root: str
    _opened: tuple[tuple[ManifestFile, Contents], ...] = field(repr=False)
    _tables: dict[str, pa.Table] = field(repr=False)
    """Rows of JSONL and CSV files by path: they are slow to read. Parquet is streamed."""

    @classmethod
    def open(cls, uri: str, known: Known = lambda _path, _version: None, column_map: ColumnMap = NO_MAP) -> Manifest:
        """Find the files and their schema. Reads Parquet footers, and JSONL and CSV files whole.

        Args:
            uri: URI of a file, or of a folder of them.
            known: Lookup of the contents of a version of a file; where it returns None, the file is opened.
            column_map: Map of the files' column names to ours.

        Raises:
            ManifestError: the manifest is absent, unreadable, empty, too large or of mixed formats; files contradict
                each other; a required column or a mapped source is absent, or a column has the name of a result column.
            ConfigError: `uri` is not a URI.
        """
        uri = store_uris.absolute(uri).rstrip("/")
        shown = redacted_uri(uri)
        with reading(shown):
            filesystem, root = filesystems.arrow_filesystem(uri)
            files, file_format, left_out = discover(filesystem, root, shown)
        budget = TextBudget(f"manifest {shown}")
        if file_format != "parquet":
            check_stored_bytes(filesystem, files, shown)
        scanned = set[str]()

        def known_contents(path: str, version: str) -> Contents | None:
            contents = known(path, version)
            if contents is not None:
                scanned.add(path)
            return contents

        opened = tuple(
            map_in_threads(
                lambda path: ManifestFile.open(
                    filesystem, path, file_format, known_contents, column_map, location(path, root), budget
                ),
                files,
                OPEN_THREADS,
            )
        )
        num_rows = sum(contents.num_rows for _, contents in opened)
        if not num_rows and file_format == "csv":  # the only row may have been taken for the header line
            check_columns(opened[0][1].schema.names, f"manifest {shown}", column_map.ids)
        if not 0 < num_rows <= MAX_ROWS:
            remedy = f"split it into manifests of at most {MAX_ROWS}" if num_rows else "give it one for each request"
            msg = f"manifest {shown} has {num_rows or 'no'} rows; {remedy}"
            raise ManifestError(msg)
        stored = [contents.schema for _, contents in opened]
        named = [column_map.partitions(partitions_of(path, root)) for path in files]
        schema = unify([_with_texts(*each) for each in zip(stored, named, strict=True)], files, column_map.label)
        in_files = {name for one in stored for name in one.names}
        schema = pa.schema(sorted(schema, key=lambda item: item.name not in in_files))  # partitions last
        if not column_map.has_all(schema.names):
            contents = ManifestFile.open(filesystem, files[0], file_format, lambda _path, _version: None)[1]
            raise column_map.not_found(schema.names, contents.schema, f"manifest {shown}")
        check_columns(schema.names, f"manifest {shown}", column_map.ids)
        if file_format == "csv":
            _check_header_lines(stored, named, files)
        for contents, path in zip(stored, files, strict=True):
            refuse_unsupported(_carried(contents), f"manifest file {path}")
        refuse_unsupported(_carried(schema), f"manifest {shown}")
        tables = {file.path: contents.table for file, contents in opened if contents.table is not None}
        opened = tuple((file, replace(contents, table=None)) for file, contents in opened)
        found = cls(
            uri,
            file_format,
            files,
            schema,
            num_rows,
            published(schema, stored),
            left_out,
            filesystem,
            root,
            opened,
            tables,
        )
        found._read_doubtful_columns(scanned)
        return found

    @property
    def num_blank(self) -> int:
        """Number of CSV lines with nothing but commas, which are no rows."""
        return sum(contents.num_blank for _, contents in self._opened)

    def _read_doubtful_columns(self, scanned: Container[str]) -> None:
        """Read what may fail of the carried columns, before anything is generated.

        These are all values whose type another file changes, and those of lists and maps.

        Args:
            scanned: Paths of the files whose lists and maps an earlier scan has read.

        Raises:
            ManifestError: a value does not fit the common type, or a column cannot be read.
        """
        sampled, left = 0, CHECKED_BYTES
        for file, contents in self._opened:
            carried = {item.name: plain_type(item.type) for item in _carried(contents.schema)}
            changed = [name for name, data_type in carried.items() if self._may_not_fit(data_type, name)]
            for _ in self._read(file, self._only(changed), None) if changed else ():
                pass
            nested = [name for name, data_type in carried.items() if is_nested(data_type) and name not in changed]
            for name in nested if file.format == "parquet" and file.path not in scanned else ():
                complete = left > 0 and has_lists(carried[name])
                if complete or sampled < SAMPLE_FILES:
                    left -= self._check_readable(file, contents, name, complete=complete)
            sampled += bool(nested)

    def _check_readable(self, file: ManifestFile, contents: Contents, name: str, *, complete: bool) -> int:
        """Read a column, or its first rows, in the pieces that workers read; return its size in bytes."""
        num_bytes = 0
        try:
            for table in self._column(file, contents, name, complete=complete):
                conform_rows(table, self._only([name]), {}, file).validate(full=True)
                num_bytes += table.nbytes
        except (ManifestError, pa.ArrowException, OSError) as err:
            msg = (
                f"manifest file {file.path}: column {name!r} cannot be read, which would end a run; drop the column, "
                f"or write it with another program: {message_of(err)}"
            )
            raise ManifestError(msg) from None
        return num_bytes

    def _column(self, file: ManifestFile, contents: Contents, name: str, *, complete: bool) -> Iterator[pa.Table]:
        if not complete:
            yield file.first_rows(self.filesystem, [name], SAMPLE_ROWS)
            return
        for groups in neighbours(contents):
            yield from file.read(self.filesystem, [name], groups)

    def _may_not_fit(self, data_type: pa.DataType, name: str) -> bool:
        wanted = self.schema.field(name).type
        return not (data_type == wanted or pa.types.is_null(data_type) or wanted in _WIDER.get(data_type, ()))

    def _only(self, names: Sequence[str]) -> pa.Schema:
        return pa.schema([item for item in self.schema if item.name in names])

    @property
    def opened(self) -> tuple[tuple[ManifestFile, Contents], ...]:
        """Files in order, in the versions that were opened, with their contents."""
        return self._opened

    @property
    def versions(self) -> dict[str, str]:
        """Version of each file by its path below the manifest's folder."""
        return {file.location: file.version for file, _ in self._opened}

    def shape_of(self, file: ManifestFile, columns: Sequence[str]) -> str:
        """Return a hash, 32 hexadecimal digits, of the types and partitions by which columns of a file are read."""
        read = [[item.name, str(item.type)] for item in self.schema if item.name in columns]
        shape = json.dumps([file.format, read, self._partitions(file)], sort_keys=True)
        return hashlib.blake2b(shape.encode(), digest_size=16).hexdigest()

    @property
    def folder(self) -> str:
        """URI that relative image paths start from."""
        return self.uri.rsplit("/", 1)[0] if self.files == (self._root,) else self.uri

    def batches(
        self, columns: Sequence[str] | None = None, ordinals: npt.NDArray[np.int64] | None = None
    ) -> Iterator[Batch]:
        """Yield the rows in order, in those of `columns` that exist.

        Args:
            columns: Names of columns; None: all.
            ordinals: Sorted row numbers inside the manifest: row groups without any of them are skipped.

        Raises:
            ManifestError: a file is corrupt, or was removed.
        """
        schema = pa.schema([item for item in self.schema if columns is None or item.name in columns])
        start = 0
        for file, contents in self._opened:
            for first_row, groups in _runs(contents, start, ordinals):
                row = first_row
                for table in self._read(file, schema, groups):
                    yield Batch(table, file.path, row, start + row)
                    row += len(table)
            start += contents.num_rows

    def read(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a piece, in `columns` only, like `Piece.tables`, but from memory where they were read."""
        schema = pa.schema([item for item in self.schema if item.name in columns])
        if piece.file.path in self._tables:
            yield from self._read(piece.file, schema, None)
        else:
            yield from piece.tables(schema)

    def _read(self, file: ManifestFile, schema: pa.Schema, groups: list[int] | None) -> Iterator[pa.Table]:
        chosen = groups if file.format == "parquet" else None
        rows = file.read(self.filesystem, schema.names, chosen, table=self._tables.get(file.path))
        return conformed(rows, file, schema, self._partitions(file))

    def _partitions(self, file: ManifestFile) -> dict[str, str | None]:
        return file.column_map.partitions(partitions_of(file.path, self._root))

    def release(self) -> None:
        """Free the rows in memory: workers read the pieces from now on. `batches` yields the same rows."""
        self._tables.clear()

    def pieces(self) -> Iterator[Piece]:
        """Yield the whole manifest in pieces: a JSONL or CSV file, or neighbouring row groups of Parquet.

        A piece has at most BATCH_ROWS rows and PIECE_BYTES bytes, or one row group.
        """
        for file, contents in self._opened:
            partitions = self._partitions(file)
            for groups in neighbours(contents):
                num_rows, num_bytes = contents.groups[groups].sum(axis=0).tolist()
                chosen = tuple(groups) if file.format == "parquet" else None
                yield Piece(self.uri, file, chosen, partitions, num_rows, num_bytes)


def _runs(
    contents: Contents, start: int, ordinals: npt.NDArray[np.int64] | None
) -> Iterator[tuple[int, list[int] | None]]:
    """Yield the row groups of a file that are read together, with their first row: all, or those with `ordinals`."""
    if ordinals is None:
        yield 0, None
        return
    ends = np.cumsum(contents.groups[:, 0])
    bounds = np.searchsorted(ordinals, start + np.array([0, *ends]))
    wanted = np.flatnonzero(bounds[1:] > bounds[:-1])
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
        if len(run):
            yield int(ends[run[0]] - contents.groups[run[0], 0]), run.tolist()


def refuse_output_inside(manifest: Manifest, output: str) -> None:
    """Refuse an output inside the folder of the manifest.

    Raises:
        ConfigError: the output is inside it, and the next run would read its results as requests.
    """
    place = store_uris.absolute(output).rstrip("/")
    inside = below(place, manifest.uri) if f"{place}/".startswith(f"{manifest.uri}/") else None
    if inside is None or hive.is_hidden(inside.parts):
        return
    msg = (
        f"output {redacted_uri(place)} lies inside the folder of the manifest, {redacted_uri(manifest.uri)}, and its "
        "results would be read as requests; choose another folder, beside it"
    )
    raise ConfigError(msg)


_WIDER = {
    pa.string(): (pa.large_string(),),
    pa.binary(): (pa.large_binary(),),
    pa.int8(): (pa.int16(), pa.int32(), pa.int64(), pa.float64()),
    pa.int16(): (pa.int32(), pa.int64(), pa.float64()),
    pa.int32(): (pa.int64(), pa.float64()),
    pa.uint8(): (pa.uint16(), pa.int16(), pa.uint32(), pa.int32(), pa.uint64(), pa.int64(), pa.float64()),
    pa.uint16(): (pa.uint32(), pa.int32(), pa.uint64(), pa.int64(), pa.float64()),
    pa.uint32(): (pa.uint64(), pa.int64(), pa.float64()),
    pa.float16(): (pa.float32(), pa.float64()),
    pa.float32(): (pa.float64(),),
}
"""Types that hold every value of another type."""


def _carried(schema: pa.Schema) -> list[pa.Field]:
    return [item for item in schema if item.name not in REQUEST.names]


def _check_header_lines(stored: Sequence[pa.Schema], named: Sequence[Iterable[str]], files: Sequence[str]) -> None:
    """Refuse a CSV file with neither images nor prompts: its first row has been taken for a header line."""
    wanted = {"image", "image_bytes", "prompt", "prompts"}
    for schema, partitions, path in zip(stored, named, files, strict=True):
        if wanted.isdisjoint([*schema.names, *partitions]):
            msg = (
                f"manifest file {path}, line 1: no header line (got {printable(', '.join(schema.names))[:200]}), and "
                "other files have the columns of requests; give it the same header line"
            )
            raise ManifestError(msg)


def _with_texts(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """Return a file's schema with a text column for each partition of it that the file has no column for."""
    return pa.schema([*schema, *(pa.field(name, pa.string()) for name in names if name not in schema.names)])
