"""Delta table with the animations as a binary column: Parquet files, and one commit that names them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.datasets.export_formats import ExportFormat, Finish, ShardTarget
from pia_batch.datasets.export_plan import ExportPlan
from pia_batch.datasets.export_rows import Batch
from pia_batch.errors import ConfigError, message_of
from pia_batch.schema.dataset_columns import FILE_NAME, Media

_LOG = "_delta_log/"


def write(batches: Iterator[Batch], target: ShardTarget) -> int:
    """Write one Parquet file, a row group for each batch."""
    path, schema = target.folder / "shard.parquet", with_media(target.schema, target.media)
    names = target.schema.names
    with pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=names, write_statistics=names, store_schema=False
    ) as writer:
        for batch in batches:
            files = pa.array([clip.name for clip in batch.clips], pa.string())
            data = pa.array([clip.data for clip in batch.clips], pa.binary())
            columns = zip(batch.rows.columns, schema, strict=False)
            rows = [column.cast(item.type, safe=False) for column, item in columns]  # only digits below 1 us are lost
            table = pa.table([*rows, files, data], schema=schema)
            writer.write_table(table, row_group_size=len(table))
    return target.put(path)


def with_media(columns: pa.Schema, media: Media) -> pa.Schema:
    """Return the schema in the types that Delta has, with the file's name and the column of the animations."""
    held = [item.with_type(_held(item.type)) for item in columns]
    return pa.schema([*held, pa.field(FILE_NAME, pa.string()), pa.field(media, pa.binary())])


def _held(data_type: pa.DataType) -> pa.DataType:
    """Return the type in which Delta has the values of another one.

    Delta has no unsigned and no 16-bit floating-point numbers; its times are in microseconds, in UTC or in no zone. The
    library writes tables with columns of such types, and readers refuse them.
    """
    types = pa.types
    if data_type in _WIDER:
        return _WIDER[data_type]
    if types.is_timestamp(data_type):
        return pa.timestamp("us", data_type.tz and "UTC")
    if types.is_struct(data_type):
        return pa.struct([item.with_type(_held(item.type)) for item in data_type])
    if types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type):
        return pa.list_(data_type.value_field.with_type(_held(data_type.value_type)))
    return data_type


_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
}


def check(plan: ExportPlan) -> None:
    """Refuse columns that Delta cannot hold.

    Raises:
        ConfigError: There is one; the message names it.
    """
    from deltalake import Schema  # noqa: PLC0415 - an extra

    for item in plan.schema:
        try:
            Schema.from_arrow(pa.schema([item.with_type(_held(item.type))]))
        except Exception as err:  # noqa: BLE001 - deltalake raises several classes
            msg = (
                f"--format delta cannot hold the column {item.name} ({item.type}): {message_of(err)}; leave it out by "
                "--columns"
            )
            raise ConfigError(msg) from None


def commit(finish: Finish) -> None:
    """Write version 0 of the table's log, which names all files, unless there is one.

    deltalake makes it in a local folder: nothing but this package's store writes to the destination.
    """
    from deltalake import Schema  # noqa: PLC0415 - an extra
    from deltalake.transaction import AddAction, create_table_with_add_actions  # noqa: PLC0415

    if any(True for _ in finish.store.list(_LOG)):
        return
    files = [
        AddAction(shard.name, shard.num_bytes, {}, 0, True, json.dumps({"numRecords": shard.rows}))
        for shard in finish.written
    ]
    place = finish.folder / "table"
    place.mkdir()
    schema = Schema.from_arrow(with_media(finish.plan.schema, finish.media))
    create_table_with_add_actions(str(place), schema, files, mode="error")
    for path in sorted((place / _LOG).glob("*.json")):
        finish.store.replace_file(f"{_LOG}{path.name}", path)


DELTA: ExportFormat = ExportFormat(
    "delta",
    "Delta table with a binary column `video` (or `image`)",
    write,
    lambda number, _: f"part-{number:05d}.parquet",
    times_as_texts=True,
    check=check,
    finish=commit,
    module="deltalake",
    extra="delta",
)
