"""Image columns of sources: which column is the image, and its values under the names that a manifest has."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.datasets.templates import find
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.column_layout import Path

_IMAGES = ("image_bytes", "image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo")
_URIS = ("image", "image_url", "image_uri", "image_path", "file_name", "url", "uri")


def image_source(schema: pa.Schema, columns: Mapping[str, str]) -> Path:
    """Return the path of the column that is the image.

    Args:
        schema: Columns of the source.
        columns: Sources of columns by their name in the manifest.

    Raises:
        ConfigError: The column that is named as the image does not exist.
        ManifestError: No column looks like one.
    """
    for name in ("image_bytes", "image"):
        if name in columns:
            return find(schema, columns[name], f"--column {name}={columns[name]}")
    structs = [item.name for item in schema if _is_image_struct(item.type)]
    binary = [item.name for item in schema if _is_bytes(item.type)]
    named = [name for name in _IMAGES if name in [*structs, *binary]]
    found = [*named, *structs, *(binary if len(binary) == 1 else [])]
    found += [name for name in _URIS if name in schema.names and _is_string(schema.field(name).type)]
    if not found:
        raise ManifestError(
            "no column is the image; name it by --column image=COLUMN (a URI) or --column image_bytes=COLUMN "
            f"(columns: {', '.join(schema.names[:20])})"
        )
    return (found[0],)


def has_uris(schema: pa.Schema, path: Path) -> bool:
    """Return True if the image may be a URI: it is a text, or a struct that has a path where it has no bytes."""
    data_type = schema.field(path[0]).type
    for name in path[1:]:
        data_type = data_type.field(name).type
    return not _is_bytes(data_type)


def _is_string(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_string(data_type) or pa.types.is_large_string(data_type))


def _is_bytes(data_type: pa.DataType) -> bool:
    if isinstance(data_type, pa.BaseExtensionType):
        data_type = data_type.storage_type
    return bool(pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type))


def _is_image_struct(data_type: pa.DataType) -> bool:
    """Return True for struct<bytes, path>, as Hugging Face datasets store images."""
    if isinstance(data_type, pa.BaseExtensionType):
        data_type = data_type.storage_type
    return bool(pa.types.is_struct(data_type)) and {"bytes"} <= {item.name for item in data_type} <= {"bytes", "path"}


def image_columns(column: pa.Array) -> dict[str, pa.Array]:
    """Return the column `image_bytes`, or `image`, or both for structs that have either in each row."""
    if pa.types.is_struct(column.type):
        data = _filled_bytes(pc.struct_field(column, "bytes"))
        if column.type.get_field_index("path") < 0:
            return {"image_bytes": data}
        uris = pc.if_else(
            pc.is_valid(data), pa.scalar(None, pa.string()), pc.struct_field(column, "path").cast(pa.string())
        )
        return {"image_bytes": data} | ({"image": uris} if pc.any(pc.is_valid(uris)).as_py() else {})
    if _is_bytes(column.type):
        return {"image_bytes": _filled_bytes(column)}
    if not (_is_string(column.type) or pa.types.is_null(column.type)):
        raise ConfigError(
            f"the column of images is {column.type}; choose one of bytes or URIs by --column image=COLUMN"
        )
    uris = column.cast(pa.string())
    return {"image": pc.if_else(pc.equal(uris, ""), pa.scalar(None, pa.string()), uris)}


def _filled_bytes(column: pa.Array) -> pa.Array:
    """Return image bytes with null in place of no bytes at all."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.large_binary())
    empty = pc.equal(pc.binary_length(column), 0)
    if pc.any(empty).as_py():
        column = pc.if_else(empty, pa.scalar(None, column.type), column)
    return column.cast(pa.large_binary())
