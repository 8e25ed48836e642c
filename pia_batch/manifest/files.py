"""Files of a manifest: Parquet, JSONL or CSV, untrusted, read in tables that fit in memory.

A file that is corrupt, or that unpacks to more than a machine holds, raises a ManifestError that names it. Text and
bytes are bounded by the constants below if the Parquet footer is truthful; a false one can cost 2 GiB, a page's
maximum, for each column. A list of equal numbers takes no space in a file, but its full size in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from pia_batch.errors import (
    CERTIFICATE_REMEDY,
    ConfigError,
    InterruptedRunError,
    ManifestError,
    problem_of,
)
from pia_batch.manifest import wide_integers
from pia_batch.manifest.arrow_types import first_invalid
from pia_batch.manifest.column_layout import MAX_COLUMNS, TEXTS, Layout
from pia_batch.manifest.column_map import NO_MAP, ColumnMap
from pia_batch.manifest.csv_files import read_csv
from pia_batch.manifest.foreign_formats import refuse_other_format
from pia_batch.manifest.formats import FileFormat
from pia_batch.manifest.inline_images import NOT_INLINE, has_inline_images
from pia_batch.manifest.json_lines import read_json_lines
from pia_batch.manifest.request_ids import location_ids
from pia_batch.manifest.table_formats import refuse_data_of_table
from pia_batch.manifest.text_files import TextBudget, read_text
from pia_batch.storage import filesystems
from pia_batch.storage.file_kinds import HEAD_BYTES
from pia_batch.storage.uris import redacted

BATCH_ROWS = 65_536
BATCH_ROWS_WITH_BYTES = 256
"""Number of rows read at a time if the manifest contains the images: a few hundred fit in memory, 65,536 do not."""


SLICE_BYTES = 256 * 2**20
"""Unpacked text and bytes in one batch; rows with more come in several batches, of at least one row each."""

MAX_ROW_BYTES = 32 * 2**10
MAX_ROW_BYTES_WITH_BYTES = 64 * 2**20
"""Largest text and bytes of one row, as a mean over the rows that are read at a time. A valid row has at most 22 KiB,
plus its image; more means a dictionary of long values that many rows share."""

MAX_EXPANSION = 1000
MAX_EXPANDED_BYTES = 2**30
"""Limits of a row group: above MAX_EXPANDED_BYTES it unpacks to at most MAX_EXPANSION times the file's size."""

_MAX_FOOTER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Contents:
    """Contents of a file as far as opening it shows.

    Attributes:
        schema: Schema of all columns, under our names, with the types that are stored.
        groups: Rows and unpacked bytes of each Parquet row group, int64, shape (n, 2); other files are one group.
        table: Rows of JSONL and CSV, which opening reads as a whole; None for Parquet.
        num_blank: Number of CSV lines with nothing but commas, which are no rows.
    """

    schema: pa.Schema
    groups: npt.NDArray[np.int64]
    table: pa.Table | None
    num_blank: int = 0

    @property
    def num_rows(self) -> int:
        """Number of rows of all groups."""
        return int(self.groups[:, 0].sum())


Known = Callable[[str, str], Contents | None]
"""Lookup of a file's contents by its path and version; None: unknown."""


@dataclass(frozen=True)
class ManifestFile:
    """One file in the version that was there when the manifest was opened.

    Attributes:
        path: Path inside the file system.
        format: Format of the file.
        version: Result of `filesystems.version_of`; another one means that the file was replaced.
        column_map: Map of the file's column names to ours; everything that is read has our names.
        location: Path below the manifest's folder, of which ids are made where the map says so.
    """

    path: str
    format: FileFormat
    version: str
    column_map: ColumnMap = NO_MAP
    location: str = ""

    @classmethod
    def open(
        cls,
        filesystem: pyarrow.fs.FileSystem,
        path: str,
        file_format: FileFormat,
        known: Known,
        column_map: ColumnMap = NO_MAP,
        location: str = "",
        budget: TextBudget | None = None,
    ) -> tuple[ManifestFile, Contents]:
        """Open a file, and read its contents unless they are `known`: the footer of Parquet, all of JSONL and CSV.

        Raises:
            ManifestError: the file is unreadable, corrupt or too large, or its columns do not fit the map.
        """
        with reading(path):
            file = cls(path, file_format, filesystems.version_of(filesystem, path), column_map, location)
        return file, known(path, file.version) or file._contents(filesystem, budget)

    def _contents(self, filesystem: pyarrow.fs.FileSystem, budget: TextBudget | None) -> Contents:
        if self.format != "parquet":
            table, num_blank = self._read_text(filesystem, budget)
            return Contents(
                self._with_ids(table.schema), np.array([[len(table), table.nbytes]], np.int64), table, num_blank
            )
        with reading(self.path), filesystem.open_input_file(self.path) as source:
            file = _opened(source, self.path)
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
            schema = self._with_ids(self._layout(file).schema)
            return Contents(schema, np.array(sizes, np.int64).reshape(-1, 2), None)

    def _with_ids(self, schema: pa.Schema) -> pa.Schema:
        return schema.append(pa.field("request_id", pa.string())) if self._has_location_ids else schema

    @property
    def _has_location_ids(self) -> bool:
        return self.column_map.ids == "location"

    def _located(self, rows: pa.Table, names: Sequence[str], first_row: int) -> pa.Table:
        """Return neighbouring rows with the ids of their location, if these are among `names`."""
        if not self._has_location_ids or "request_id" not in names:
            return rows
        return rows.append_column("request_id", location_ids(self.location, first_row, len(rows)))

    def _layout(self, file: pq.ParquetFile) -> Layout:
        return self.column_map.layout(file.schema_arrow, f"manifest file {self.path}")

    def read(
        self,
        filesystem: pyarrow.fs.FileSystem,
        names: Sequence[str],
        groups: Sequence[int] | None = None,
        table: pa.Table | None = None,
    ) -> Iterator[pa.Table]:
        """Yield the rows in order, with those of the columns `names` that the file has.

        Args:
            filesystem: File system of the manifest.
            names: Our names of columns.
            groups: Row groups to read, in rising order; None: all. Parquet only.
            table: Rows that `open` has read; None: read them again. JSONL and CSV only.

        Raises:
            ManifestError: the file is corrupt, too large, or was removed.
        """
        if self.format == "parquet":
            yield from self._read_parquet(filesystem, names, groups)
            return
        table = self._read_text(filesystem)[0] if table is None else table
        table = table.select([name for name in names if name in table.column_names])
        for start in range(0, len(table), BATCH_ROWS):
            yield self._located(table.slice(start, BATCH_ROWS), names, start)

    def first_rows(self, filesystem: pyarrow.fs.FileSystem, names: Sequence[str], num_rows: int) -> pa.Table:
        """Return at most `num_rows` rows of a Parquet file, in the columns `names`."""
        with filesystem.open_input_file(self.path) as source:
            file = pq.ParquetFile(source, coerce_int96_timestamp_unit=_INT96_UNIT)
            layout = self._layout(file).select(names)
            groups = range(file.metadata.num_row_groups)
            filled = [group for group in groups if file.metadata.row_group(group).num_rows]
            chosen = filled[:1] if layout.is_nested else filled
            for batch in file.iter_batches(batch_size=num_rows, row_groups=chosen, columns=layout.reads):
                return layout.table(pa.Table.from_batches([batch]))
            return layout.table(file.schema_arrow.empty_table())

    def check_unchanged(self, filesystem: pyarrow.fs.FileSystem) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            InterruptedRunError: the file was replaced or removed.
            ManifestError: the store does not report its version.
        """
        with reading(self.path):
            try:
                version = filesystems.version_of(filesystem, self.path)
            except FileNotFoundError:
                version = "gone"
        if version != self.version:
            msg = (
                f"manifest file {self.path} was replaced or removed while this run read it; what was finished is "
                "committed. Start again to go on with the manifest as it is now"
            )
            raise InterruptedRunError(msg)

    def _read_text(self, filesystem: pyarrow.fs.FileSystem, budget: TextBudget | None = None) -> tuple[pa.Table, int]:
        """Return the rows, and the number of blank ones that were skipped."""
        with reading(self.path), filesystem.open_input_file(self.path) as source:
            data = read_text(source, self.path, budget or TextBudget(f"manifest file {self.path}"))
        if self.format == "csv":
            return read_csv(data, self.path, self.column_map)
        with reading(self.path):  # JSON can spell half a surrogate pair, which is no text
            table = read_json_lines(data, self.path, self.column_map)
        return NO_MAP.layout(table.schema, f"manifest file {self.path}").table(table), 0  # image structs come apart

    def _read_parquet(
        self, filesystem: pyarrow.fs.FileSystem, names: Sequence[str], groups: Sequence[int] | None
    ) -> Iterator[pa.Table]:
        path = self.path
        rows = BATCH_ROWS_WITH_BYTES if "image_bytes" in names else BATCH_ROWS
        row_bytes = MAX_ROW_BYTES_WITH_BYTES if "image_bytes" in names else MAX_ROW_BYTES
        with reading(path), filesystem.open_input_file(path) as source:
            footer = _opened(source, path)
            chosen = list(range(footer.metadata.num_row_groups) if groups is None else groups)
            first_row = sum(footer.metadata.row_group(group).num_rows for group in range(min(chosen, default=0)))
            layout = self._layout(footer).select(names)
            for stored in _stored_batches(source, footer, layout, chosen, rows):
                batch = layout.table(pa.Table.from_batches([stored]))
                sizes = _text_bytes(batch)
                if sizes.sum() > rows * row_bytes:
                    last, mib, most = first_row + len(batch) - 1, sizes.sum() // 2**20, rows * row_bytes // 2**20
                    msg = (
                        f"manifest file {path}: {mib} MiB of text and bytes in the rows {first_row} to {last}; "
                        f"at most {most} MiB are read"
                    )
                    if "image" in batch.column_names and has_inline_images(batch["image"]):
                        label = self.column_map.label("image")
                        msg += f". Column {label} has images as text; required: {NOT_INLINE['image']}"
                    raise ManifestError(msg)
                for table in _unpacked(batch, sizes):
                    self._check_values(table, first_row)
                    yield self._located(table, names, first_row)
                    first_row += len(table)

    def _check_values(self, rows: pa.Table, first_row: int) -> None:
        """Refuse values that are none of their column's type, such as texts that are not UTF-8.

        Raises:
            ManifestError: There is one; the message names its row and its column.
        """
        try:
            rows.validate(full=True)
        except pa.ArrowInvalid:
            name, row, problem = first_invalid(rows)
            remedy = "write the texts as UTF-8" if "UTF8" in problem else "write it again"
            msg = (
                f"manifest file {self.path}, row {first_row + row}: column {self.column_map.label(name)}: {problem}; "
                f"{remedy}, or drop the column"
            )
            raise ManifestError(msg) from None


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn every exception into a ManifestError that names `place`."""
    try:
        yield
    except (ManifestError, ConfigError):
        raise
    except Exception as err:  # noqa: BLE001 - every file system has its own classes for what goes wrong
        problem = redacted(problem_of(err))
        remedy = filesystems.remedy_for(err) or known_remedy(problem) or filesystems.reading_remedy(place, err)
        msg = f"cannot read manifest {place}: {problem}{f'; {remedy}' if remedy else ''}"
        raise ManifestError(msg) from None


def known_remedy(problem: str) -> str | None:
    """Return what to do about a problem that a library's message names; None where nothing is known."""
    return next((remedy for words, remedy in _REMEDIES.items() if words in problem), None)


_REMEDIES = {
    "CERTIFICATE_VERIFY_FAILED": CERTIFICATE_REMEDY,
    "Cannot connect to host": "correct the host and the port, or start the server",
    "the server answers 401": "over http nothing but the URL is sent: sign the URL, or put the manifest elsewhere",
    "the server answers 403": "over http nothing but the URL is sent: sign the URL, or put the manifest elsewhere",
    "the server answers 5": "it is the server that fails: try again, and look at its log",
    "Bad Request": "check the credentials and the policy; temporary credentials may have expired",
    "credentials": "give this machine the store's, by AWS_PROFILE, AWS_ACCESS_KEY_ID and its secret, or a role",
    "Truncated compressed stream": "the file ends early; write or copy it again",
    "inflate failed": "the file is damaged; write or copy it again",
    "deserialize thrift": "the file is damaged; write or copy it again",
    "Corrupt ": "the file is damaged; write or copy it again",
    "size reported by footer": "the file is damaged; write or copy it again",
    "file size is 0 bytes": "remove it, or write it again",
    "decrypt": "write it without encryption",
    "compression is supported by the Parquet format": "write it with another compression, such as zstd or snappy",
    "not currently supported by the C++": "write it with another compression, such as zstd or snappy",
    "file footer": "JSONL and CSV are known by their names: .jsonl, .ndjson, .csv",
    "magic bytes": "write it again; JSONL and CSV are known by their names: .jsonl, .ndjson, .csv",
}
"""Remedies by words in a library's message."""


_INT96_UNIT = "us"
"""Unit of Spark's and Impala's old timestamps. In nanoseconds, years before 1678 and after 2262 would wrap silently."""

# --- Parquet --------------------------------------------------------------------------------------------------------


def _opened(source: pa.NativeFile, path: str) -> pq.ParquetFile:
    """Return the file with its footer read, after checking that the footer can be read."""
    num_bytes = source.size()
    refuse_other_format(bytes(source.read_at(min(HEAD_BYTES, num_bytes), 0)), f"manifest file {path}", "parquet")
    _check_footer_bytes(source, num_bytes, path)
    try:
        file = pq.ParquetFile(source, coerce_int96_timestamp_unit=_INT96_UNIT)
    except pa.ArrowNotImplementedError as err:
        if wide_integers.REFUSAL in str(err):
            wide_integers.refuse(source, path)
        raise
    refuse_data_of_table(file.metadata.metadata or {}, file.schema_arrow.names, f"manifest file {path}")
    _check_expansion(file.metadata, num_bytes, path)
    return file


def _stored_batches(
    source: pa.NativeFile, footer: pq.ParquetFile, layout: Layout, groups: Sequence[int], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of row groups as they are stored, texts as dictionaries.

    So that a value that a million rows share is unpacked once until its size is known. Arrow cannot do so for the delta
    encodings of texts (DuckDB and parquet-java in version 2); their pages are unpacked, BATCH_ROWS_WITH_BYTES rows at a
    time.
    """

    def batches(num_rows: int, texts: list[str]) -> Iterator[pa.RecordBatch]:
        file = pq.ParquetFile(
            source,
            metadata=footer.metadata,
            read_dictionary=texts,
            page_checksum_verification=True,
            coerce_int96_timestamp_unit=_INT96_UNIT,
        )
        for each in [[group] for group in groups] if layout.is_nested else [list(groups)]:
            yield from file.iter_batches(batch_size=num_rows, row_groups=each, columns=layout.reads)

    num_done = 0
    try:
        for batch in batches(batch_rows, layout.texts):
            yield batch
            num_done += len(batch)
    except (pa.ArrowNotImplementedError, OSError) as err:  # it depends on the version of pyarrow
        if _NO_DICTIONARY not in str(err):
            raise
        for batch in batches(min(batch_rows, BATCH_ROWS_WITH_BYTES), []):
            skipped = min(num_done, len(batch))
            num_done -= skipped
            if skipped < len(batch):
                yield batch.slice(skipped)


_NO_DICTIONARY = "DictAccumulator"
"""Part of Arrow's message about an encoding that it does not read as a dictionary."""


def _check_footer_bytes(source: pa.NativeFile, num_bytes: int, path: str) -> None:
    """Refuse a footer that is too large: it is read whole, and unpacks to about ten times its size."""
    if num_bytes <= _MAX_FOOTER_BYTES:
        return
    footer_bytes = int.from_bytes(source.read_at(8, num_bytes - 8)[:4], "little")
    if footer_bytes > _MAX_FOOTER_BYTES:
        msg = f"manifest file {path} has a footer of {footer_bytes} bytes; write larger row groups, or several files"
        raise ManifestError(msg)


def _check_expansion(metadata: pq.FileMetaData, num_bytes: int, path: str) -> None:
    """Refuse files whose footer declares that they unpack to too much.

    Sizes of row groups are read, and not of their columns: for some corrupt footers `RowGroupMetaData.column` of
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


def _text_bytes(rows: pa.Table) -> npt.NDArray[np.int64]:
    """Return the unpacked bytes of the texts and bytes of each row, outside of nested columns; shape (rows,)."""
    sizes = np.zeros(len(rows), np.int64)
    for column in rows.columns:
        if column.type in TEXTS:
            sizes += np.asarray(pc.fill_null(pc.binary_length(column), 0))
        if pa.types.is_dictionary(column.type):
            array = column.combine_chunks()
            lengths = pc.fill_null(pc.binary_length(array.dictionary), 0).take(array.indices)
            sizes += np.asarray(pc.fill_null(lengths, 0))
    return sizes


def _unpacked(rows: pa.Table, sizes: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """Yield `rows` without dictionaries, in tables of about SLICE_BYTES."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + SLICE_BYTES, side="right")))
        table = rows.slice(start, stop - start)
        for number, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(number, table.field(number).name, column.cast(column.type.value_type))
        yield table
        start = stop
