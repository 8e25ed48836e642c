"""Columns of results as a dataset of animations has them: succeeded rows, with names and types that `datasets` reads.

The Hugging Face library `datasets` cannot hold every Arrow type, and gives some names of columns a meaning of its own
(huggingface/datasets 5.2, `folder_based_builder` and `Features.from_arrow_schema`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.columns import RESULT, SUCCEEDED
from pia_batch.schema.type_cache import cached_by_type

Media = Literal["video", "image", "file"]
"""Role of a file for `datasets`: a video, a (moving) image, or a file that it cannot decode."""

MEDIA: dict[str, Media] = {"mp4": "video", "gif": "image", "webp": "image", "png_zip": "file", "webm": "video"}
"""Media of each animation format; `datasets` chooses by the extension."""

CONDITION_IMAGE = "condition_image"
"""Name of the results' column `image` in a dataset, where `image` is the column of an animation."""

FILE_NAME = "file_name"

_LEFT_OUT = ("status", "error_kind", "error", "animation_uri", "poster_uri")
"""Columns of results that say nothing of a succeeded row, or where its files were before."""

_FIRST = ("request_id", "prompt", "negative_prompt", CONDITION_IMAGE)

_RESERVED = ("file_name", "file_names", "video", "videos", "image", "images", "label", "__key__", "__url__")
_FILE_SUFFIXES = ("_file_name", "_file_names")


def media_of(file_format: str) -> Media:
    """Return the media of a format of animations; those of later releases are files until they are known here."""
    return MEDIA.get(file_format, "file")


@dataclass(frozen=True)
class DatasetColumns:
    """Columns of a dataset, made from those of results.

    Attributes:
        source: Schema of the results: RESULT, then the carried columns.
        renamed: New name of each column whose own name means something else to `datasets`.
        left_out: Carried columns that `datasets` cannot hold, with their types in words.
        schema: Columns of the dataset, without those of the files themselves.
    """

    source: pa.Schema
    renamed: dict[str, str] = field(init=False)
    left_out: dict[str, str] = field(init=False)
    schema: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        """Find names and types."""
        renamed, left_out, fields = {"image": CONDITION_IMAGE}, {}, []
        taken = {*self.source.names, *_RESERVED, CONDITION_IMAGE}
        for item in self.source:
            if item.name in _LEFT_OUT and RESULT.get_field_index(item.name) >= 0:
                continue
            held = held_type(item.type)
            if held is None:
                left_out[item.name] = str(item.type)
                continue
            if item.name not in RESULT.names and (_means_a_file(item.name) or item.name == CONDITION_IMAGE):
                renamed[item.name] = free_name(item.name, taken)
            fields.append(pa.field(renamed.get(item.name, item.name), held))
        fields.sort(key=lambda one: _FIRST.index(one.name) if one.name in _FIRST else len(_FIRST))
        for name, value in (("renamed", renamed), ("left_out", left_out), ("schema", pa.schema(fields))):
            object.__setattr__(self, name, value)

    def source_of(self, name: str) -> str:
        """Return the name in the results of a column of `schema`."""
        return next((old for old, new in self.renamed.items() if new == name), name)

    def rows(self, results: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
        """Return the succeeded rows of a table of results, with the columns `names` of `schema`; None: all."""
        done = results.filter(pc.equal(results["status"], SUCCEEDED))
        schema = self.schema if names is None else pa.schema([self.schema.field(name) for name in names])
        return pa.table([done[self.source_of(item.name)].cast(item.type) for item in schema], schema=schema)


def file_names(results: pa.Table) -> pa.ChunkedArray:
    """Return the path of each animation below its output; `results` has the column `animation_uri`."""
    return pc.replace_substring_regex(results["animation_uri"], r"^.*/([^/]+/[^/]+)$", r"animations/\1")


@cached_by_type
def held_type(data_type: pa.DataType) -> pa.DataType | None:
    """Return the nearest type that `datasets` holds, or None if there is none to which Arrow can convert.

    Maps become lists of key and value; extension types and dictionaries become the type of their values.
    """
    target = _target(data_type)
    if target is None or _is_miscast(data_type):
        return None
    try:
        pa.chunked_array([], data_type).cast(target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return target


def _is_miscast(data_type: pa.DataType) -> bool:
    """Return True for fixed-size lists of nothing but nulls at any depth, whose casts by pyarrow 26 are invalid."""
    is_own = pa.types.is_fixed_size_list(data_type) and _has_null(data_type.value_type)
    return is_own or any(_is_miscast(data_type.field(at).type) for at in range(data_type.num_fields))


def _has_null(data_type: pa.DataType) -> bool:
    parts = (data_type.field(at).type for at in range(data_type.num_fields))
    return bool(pa.types.is_null(data_type)) or any(map(_has_null, parts))


def _target(data_type: pa.DataType) -> pa.DataType | None:  # noqa: PLR0911 - one line for each kind of type
    types = pa.types
    if isinstance(data_type, pa.BaseExtensionType):
        return _target(data_type.storage_type)
    if types.is_dictionary(data_type):
        return _target(data_type.value_type)
    if types.is_decimal32(data_type) or types.is_decimal64(data_type):
        return pa.decimal128(data_type.precision, data_type.scale)
    if types.is_interval(data_type) or types.is_union(data_type) or types.is_run_end_encoded(data_type):
        return None
    if types.is_map(data_type):
        key, item = _target(data_type.key_type), _target(data_type.item_type)
        return key and item and pa.list_(pa.struct([("key", key), ("value", item)]))
    if types.is_struct(data_type):
        children = [(item.name, _target(item.type)) for item in data_type]
        bad = not children or any(child is None or _means_a_file(name) for name, child in children)
        return None if bad else pa.struct(children)
    for test, make in _LISTS:
        if test(data_type):
            value = _target(data_type.value_type)
            return value and make(value)
    if types.is_fixed_size_list(data_type):
        value = _target(data_type.value_type)
        return value and pa.list_(value, data_type.list_size)
    return _in_known_zone(data_type)


def _in_known_zone(data_type: pa.DataType) -> pa.DataType:
    """Return the type, in UTC if it is of times in a zone that Python lacks: `datasets` reads no row with these."""
    if not pa.types.is_timestamp(data_type) or data_type.tz is None:
        return data_type
    try:
        pa.scalar(0, data_type).as_py()
    except (LookupError, ValueError):
        return pa.timestamp(data_type.unit, "UTC")
    return data_type


_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_),
    (pa.types.is_large_list_view, pa.large_list),
)


def _means_a_file(name: str) -> bool:
    return name in _RESERVED or name.endswith(_FILE_SUFFIXES)


def free_name(name: str, taken: set[str]) -> str:
    """Return `name`, with underscores after it until it is not `taken`, and add it to these."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
