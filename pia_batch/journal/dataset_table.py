"""Table of a published dataset: `metadata.parquet`, the succeeded rows of results with the path of each animation.

`datasets` loads one media per dataset, so the table has the rows of one: of the most frequent, which is known only
after the last row. Memory does not grow with the number of rows.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.schema import far_times
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.schema.dataset_columns import FILE_NAME, DatasetColumns, Media, file_names, media_of

ROW_GROUP_ROWS = 10_000
"""Rows of a row group; `datasets` turns one row group at a time into Python objects."""

_ORDER: tuple[Media, ...] = ("video", "image", "file")
"""Media by precedence, where several have the same number of rows."""


@dataclass(frozen=True)
class DatasetTable:
    """Complete table on the local disk.

    Attributes:
        path: Parquet file.
        media: Media of its rows.
        columns: Its columns.
        extensions: Extensions of the files of its rows.
        formats: Number of animations of each format, those of other media included, most frequent first.
        models: Number of animations of each model of the config, most frequent first.
        num_rows: Number of its rows.
    """

    path: Path
    media: Media
    columns: DatasetColumns
    extensions: tuple[str, ...]
    formats: dict[str, int]
    models: dict[str, int]
    num_rows: int


class DatasetTableWriter:
    """Writer of a table, part by part.

    Args:
        folder: Empty folder on the local disk, which this fills.
        schema: Schema of the results.
        identity: Run id and digest of the results, stored in the file.
    """

    def __init__(self, folder: Path, schema: pa.Schema, identity: dict[str, str]) -> None:
        self._folder, self._columns = folder, DatasetColumns(schema)
        fields = [pa.field(FILE_NAME, pa.string()), *self._columns.schema]
        self._schema = pa.schema(fields, metadata={"pia_batch": json.dumps(identity, sort_keys=True)})
        self._formats, self._models = Counter[str](), Counter[str]()
        self._writers: dict[Media, pq.ParquetWriter] = {}
        self._far: dict[Media, set[str]] = {}
        self._extensions: dict[Media, set[str]] = {}

    def add(self, part: pa.Table) -> None:
        """Add the succeeded rows of a table of results."""
        done = part.filter(pc.equal(part["status"], SUCCEEDED))
        counts = _counted(done["format"])
        self._formats.update(counts)
        self._models.update(_counted(done["model"]))
        for media in dict.fromkeys(map(media_of, counts)):
            formats = [name for name in counts if media_of(name) == media]
            rows = done.filter(pc.is_in(done["format"], value_set=pa.array(formats, pa.string())))
            names, table = file_names(rows), self._columns.rows(rows)
            extensions = pc.unique(pc.replace_substring_regex(names, r"^.*\.", "")).to_pylist()
            self._extensions.setdefault(media, set()).update(extensions)
            self._far.setdefault(media, set()).update(far_times.columns_with(table))
            table = pa.table([names, *table.columns], schema=self._schema)
            self._writer(media).write_table(table, row_group_size=ROW_GROUP_ROWS)

    def _writer(self, media: Media) -> pq.ParquetWriter:
        if media not in self._writers:
            self._writers[media] = _writer(self._folder / f"{media}.parquet", self._schema)
        return self._writers[media]

    def finish(self) -> DatasetTable:
        """Complete the file and return it."""
        rows: Counter[Media] = Counter()
        for name, number in self._formats.items():
            rows[media_of(name)] += number
        media = max(_ORDER, key=lambda each: rows[each])
        self._writer(media)  # a file without rows is a table too
        for writer in self._writers.values():
            writer.close()
        formats, models = dict(self._formats.most_common()), dict(self._models.most_common())
        extensions = tuple(sorted(self._extensions.get(media, ())))
        path = self._folder / f"{media}.parquet"
        if self._far.get(media):
            path = _with_texts(path, self._far[media])
        return DatasetTable(path, media, self._columns, extensions, formats, models, num_rows=rows[media])


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _with_texts(path: Path, names: set[str]) -> Path:
    """Write a table again with columns as texts: that they have such times is known after the last row only."""
    table, other = pq.ParquetFile(path), path.with_suffix(".texts.parquet")
    with _writer(other, far_times.schema_with_texts(table.schema_arrow, names)) as writer:
        for group in range(table.num_row_groups):
            rows = far_times.with_texts(table.read_row_group(group), names)
            writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
    return other


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"] or "": item["counts"] for item in pc.value_counts(column).to_pylist()}
