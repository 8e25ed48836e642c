"""Pieces of a manifest, each for one worker: some row groups of a Parquet file, or a whole JSONL or CSV file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from pia_batch.errors import ManifestError
from pia_batch.manifest.files import BATCH_ROWS, Contents, ManifestFile, reading
from pia_batch.manifest.unify import conform
from pia_batch.storage import filesystems

PIECE_BYTES = 64 * 2**20
"""Unpacked size of one piece, next to BATCH_ROWS rows; a single larger row group is one piece."""


@dataclass(frozen=True)
class Piece:
    """Part of a manifest for one worker: some row groups of a Parquet file, or a whole JSONL or CSV file.

    Attributes:
        uri: URI of the manifest, with its scheme.
        file: File in the version that was there when the manifest was opened.
        groups: Numbers of row groups, rising; None for JSONL and CSV.
        partitions: Values of the columns that the file's folders name.
        num_rows: Number of rows.
        num_bytes: Approximate size of these rows in memory, in bytes.
    """

    uri: str
    file: ManifestFile
    groups: tuple[int, ...] | None
    partitions: Mapping[str, str | None]
    num_rows: int
    num_bytes: int

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the rows in order, in the columns of `schema`.

        Raises:
            ManifestError: the file is corrupt, or cannot be read.
            InterruptedRunError: the file was replaced after the manifest was opened. Rows of the new file may have been
                yielded before.
        """
        with reading(self.file.path):
            filesystem, _ = filesystems.arrow_filesystem(self.uri)
        self.file.check_unchanged(filesystem)
        rows = self.file.read(filesystem, schema.names, self.groups)
        yield from conformed(rows, self.file, schema, self.partitions)
        self.file.check_unchanged(filesystem)


def neighbours(contents: Contents) -> Iterator[list[int]]:
    """Yield the numbers of the row groups that have rows, in one list for each piece."""
    waiting: list[int] = []
    rows = num_bytes = 0
    for group, (group_rows, group_bytes) in enumerate(contents.groups.tolist()):
        if not group_rows:
            continue
        if waiting and (rows + group_rows > BATCH_ROWS or num_bytes + group_bytes > PIECE_BYTES):
            yield waiting
            waiting, rows, num_bytes = [], 0, 0
        waiting.append(group)
        rows, num_bytes = rows + group_rows, num_bytes + group_bytes
    if waiting:
        yield waiting


def conformed(
    rows: Iterator[pa.Table], file: ManifestFile, schema: pa.Schema, partitions: Mapping[str, str | None]
) -> Iterator[pa.Table]:
    """Yield the rows of a file in the columns of `schema`."""
    for read in rows:
        with reading(file.path):
            table = conform_rows(read, schema, partitions, file)
        yield table


def conform_rows(
    table: pa.Table, schema: pa.Schema, partitions: Mapping[str, str | None], file: ManifestFile
) -> pa.Table:
    """Return rows of a file in the columns of `schema`.

    Raises:
        ManifestError: a value does not fit; the message names the file.
    """
    try:
        return conform(table, schema, partitions, file.column_map.label)
    except ManifestError as err:
        msg = f"manifest file {file.path}: {err}"
        raise ManifestError(msg) from None
