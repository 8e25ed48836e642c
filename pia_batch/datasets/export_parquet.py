"""Parquet with the animations inside: `video` (or `image`) as a struct of bytes and path, as `datasets` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.datasets.export_formats import ExportFormat, ShardTarget, write_card
from pia_batch.datasets.export_rows import Batch
from pia_batch.schema.dataset_columns import Media

_BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES: dict[Media, dict[str, str]] = {"video": {"_type": "Video"}, "image": {"_type": "Image"}}
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "halffloat": "float16",
    "date32[day]": "date32",
    "date64[ms]": "date64",
}


def write(batches: Iterator[Batch], target: ShardTarget) -> int:
    """Write one Parquet file, a row group for each batch. The bytes of the animations are not compressed again."""
    path = target.folder / "shard.parquet"
    schema = with_media(target.schema, target.media)
    others = target.schema.names
    with pq.ParquetWriter(
        path,
        schema,
        compression={f"{target.media}.bytes": "NONE", **dict.fromkeys(_leaves(target.schema), "ZSTD")},
        use_dictionary=others,
        write_statistics=others,
    ) as writer:
        for batch in batches:
            values = [{"bytes": clip.data, "path": clip.name} for clip in batch.clips]
            table = pa.table([pa.array(values, _BYTES), *batch.rows.columns], schema=schema)
            writer.write_table(table, row_group_size=len(table))
    return target.put(path)


def with_media(columns: pa.Schema, media: Media) -> pa.Schema:
    """Return the schema with the column of the animations first, and its features for `datasets`."""
    features = {media: _FEATURES[media], **{item.name: feature(item.type) for item in columns}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field(media, _BYTES), *columns], metadata=metadata)


def feature(data_type: pa.DataType) -> Any:  # a JSON value
    """Return the description of a column by which `datasets` restores its type, for the types of `held_type`."""
    types = pa.types
    if types.is_struct(data_type):
        return {item.name: feature(item.type) for item in data_type}
    if types.is_fixed_size_list(data_type):
        return {"feature": feature(data_type.value_type), "length": data_type.list_size, "_type": "List"}
    if types.is_list(data_type):
        return {"feature": feature(data_type.value_type), "_type": "List"}
    if types.is_large_list(data_type):
        return {"feature": feature(data_type.value_type), "_type": "LargeList"}
    name = str(data_type)
    return {"dtype": _DTYPES.get(name, name), "_type": "Value"}


def _leaves(schema: pa.Schema) -> list[str]:
    return [path for item in schema for path in _paths(item.name, item.type)]


def _paths(path: str, data_type: pa.DataType) -> list[str]:
    """Return the paths of the leaf columns of a type in a Parquet file."""
    if pa.types.is_struct(data_type):
        return [leaf for item in data_type for leaf in _paths(f"{path}.{item.name}", item.type)]
    if pa.types.is_nested(data_type):
        return _paths(f"{path}.list.element", data_type.value_type)
    return [path]


def _train_name(number: int, total: int) -> str:
    return f"data/train-{number:05d}-of-{total:05d}.parquet"


PARQUET: ExportFormat = ExportFormat(
    "parquet",
    "Parquet files `part-00000.parquet` with a column `video` (or `image`): a struct of `bytes` and `path`",
    write,
    lambda number, _: f"part-{number:05d}.parquet",
    times_as_texts=True,
)

HUGGINGFACE: ExportFormat = ExportFormat(
    "huggingface",
    "folder for `hf upload-large-folder`: Parquet files in `data/`, and a dataset card `README.md`",
    write,
    _train_name,
    times_as_texts=True,
    finish=lambda finish: write_card(finish, ["data/*.parquet"]),
)
