"""Lance dataset whose column of animations is a blob: rows are scanned without them, and each is read by itself."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pia_batch.datasets.export_formats import ExportFormat, Finish, ShardTarget, Written
from pia_batch.datasets.export_plan import ExportPlan
from pia_batch.datasets.export_rows import Batch
from pia_batch.errors import ConfigError, message_of
from pia_batch.schema.dataset_columns import FILE_NAME, Media

VERSION = "2.1"
"""Version of Lance's file format: the newest one whose blobs a field's metadata alone declares."""

_BLOB = {"lance-encoding:blob": "true"}


def write(batches: Iterator[Batch], target: ShardTarget) -> int:
    """Write one data file."""
    from lance.file import LanceFileWriter  # noqa: PLC0415 - an extra

    path, schema = target.folder / "shard.lance", with_media(target.schema, target.media)
    with LanceFileWriter(str(path), schema, version=VERSION) as writer:
        for batch in batches:
            for part in as_table(batch, schema).to_batches():
                writer.write_batch(part)
    return target.put(path)


def with_media(columns: pa.Schema, media: Media) -> pa.Schema:
    """Return the schema with the file's name and the column of the animations, a blob."""
    name = pa.field(FILE_NAME, pa.string())
    return pa.schema([*columns, name, pa.field(media, pa.large_binary(), metadata=_BLOB)])


def as_table(batch: Batch, schema: pa.Schema) -> pa.Table:
    """Return the rows of a batch with the columns of `schema`, whose last two are the file's name and its bytes."""
    names = pa.array([clip.name for clip in batch.clips], pa.string())
    data = pa.array([clip.data for clip in batch.clips], schema.field(len(schema) - 1).type)
    return pa.table([*batch.rows.columns, names, data], schema=schema).combine_chunks()


def check(plan: ExportPlan) -> None:
    """Refuse columns that Lance cannot hold.

    Raises:
        ConfigError: There is one; the message names it.
    """
    warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)  # Ray forks only to start programs
    from lance.file import LanceFileWriter  # noqa: PLC0415 - an extra

    for item in plan.schema:
        with tempfile.TemporaryDirectory(prefix="pia-batch-export-") as folder:
            try:
                schema = pa.schema([item])
                with LanceFileWriter(f"{folder}/probe.lance", schema, version=VERSION) as writer:
                    writer.write_batch(pa.RecordBatch.from_arrays([pa.nulls(1, item.type)], schema=schema))
            except (OSError, ValueError, RuntimeError, NotImplementedError) as err:
                msg = (
                    f"--format lance cannot hold the column {item.name} ({item.type}): {message_of(err)}; leave it out "
                    "by --columns"
                )
                raise ConfigError(msg) from None


def commit(finish: Finish) -> None:
    """Write the manifest of version 1, which names all data files, unless there is one.

    Lance makes it in a local folder: nothing but this package's store writes to the destination.
    """
    import lance  # noqa: PLC0415 - an extra

    if any(True for _ in finish.store.list("_versions/")):
        return
    schema = with_media(finish.plan.schema, finish.media)
    fragments = _fragments(schema, finish.written, finish.folder)
    place = finish.folder / "dataset"
    lance.LanceDataset.commit(str(place), lance.LanceOperation.Overwrite(schema, fragments))
    for folder in ("_transactions", "_versions"):  # a reader looks for versions
        for path in sorted((place / folder).glob("*")):
            finish.store.replace_file(f"{folder}/{path.name}", path)


def _fragments(schema: pa.Schema, written: Sequence[Written], folder: Path) -> list[Any]:
    """Return the description of each data file; ids of fields and columns are those that Lance itself gives."""
    from lance.fragment import DataFile, FragmentMetadata, write_fragments  # noqa: PLC0415 - an extra

    row = pa.table([pa.nulls(1, item.type) for item in schema], schema=schema)
    (sample,) = write_fragments(row, str(folder / "sample"), data_storage_version=VERSION)
    (file,) = sample.files
    ids = (file.fields, file.column_indices, file.file_major_version, file.file_minor_version)
    return [
        FragmentMetadata(
            id=shard.number,
            files=[DataFile(shard.name.removeprefix("data/"), *ids, shard.num_bytes)],
            physical_rows=shard.rows,
        )
        for shard in written
    ]


LANCE: ExportFormat = ExportFormat(
    "lance",
    "Lance dataset with a blob column `video` (or `image`)",
    write,
    lambda number, _: f"data/part-{number:05d}.lance",
    times_as_texts=True,
    check=check,
    finish=commit,
    module="lance",
    extra="lance",
)
