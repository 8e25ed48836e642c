"""Columns of every Arrow type, as hypothesis strategies of types and values."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

UNITS = ("s", "ms", "us", "ns")

LEAVES: tuple[pa.DataType, ...] = (
    pa.null(), pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(),
    pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.string_view(),
    pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.date32(), pa.date64(), pa.time32("s"),
    pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.decimal32(5, 2), pa.decimal64(10, 2), pa.decimal128(20, 3),
    pa.decimal256(60, 3), *(pa.timestamp(unit) for unit in UNITS),
    *(pa.timestamp(unit, zone) for unit in UNITS for zone in ("Europe/Berlin", "Mars/Olympus")),
    *(pa.duration(unit) for unit in UNITS),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.int64()),
)  # fmt: skip
"""Types without children that Parquet can store, perhaps in another encoding."""

RUNS = tuple(one for one in LEAVES if not (pa.types.is_dictionary(one) or one in (pa.string_view(), pa.binary_view())))
"""Types that Arrow encodes as runs."""


class Unhashed(pa.ExtensionType):
    """An extension type as many libraries define theirs: with equality, and so without a hash."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "pia_batch.unhashed")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> pa.DataType:
        return cls()

    __hash__ = None


pa.register_extension_type(Unhashed())

EXTENSIONS = (pa.uuid(), pa.json_(), pa.bool8(), pa.opaque(pa.binary(), "a", "b"), Unhashed())

REFUSED = (
    pa.struct([]),
    pa.month_day_nano_interval(),
    pa.decimal128(5, -2),
    pa.sparse_union([pa.field("a", pa.int64()), pa.field("b", pa.string())]),
    pa.dense_union([pa.field("a", pa.int64()), pa.field("b", pa.string())]),
)
"""Types that Parquet cannot store."""


def nested(inner: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.DataType]:
    """Return types that hold those of `inner`."""
    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(pa.large_list_view),
        inner.map(lambda one: pa.list_(one, 2)),
        inner.map(lambda one: pa.struct([("x", one), ("y", pa.int64())])),
        inner.map(lambda one: pa.map_(pa.string(), one)),
    )


_TYPES = [st.sampled_from(LEAVES)]
for _ in range(3):
    _TYPES.append(nested(_TYPES[-1]))

types = st.one_of(*_TYPES)
"""Types that are carried, nested up to depth 3."""

bad_types = st.one_of(
    st.sampled_from(REFUSED), nested(st.sampled_from(REFUSED)), nested(nested(st.sampled_from(REFUSED)))
)


def values(data_type: pa.DataType) -> st.SearchStrategy[Any]:
    """Return values of a type in the form that `pa.array` takes, null among them."""
    return st.none() | _values(data_type)


def _values(data_type: pa.DataType) -> st.SearchStrategy[Any]:  # noqa: C901, PLR0911, PLR0912 - a line for each type
    is_ = pa.types
    if is_.is_dictionary(data_type):
        return values(data_type.value_type)
    if is_.is_null(data_type):
        return st.none()
    if is_.is_boolean(data_type):
        return st.booleans()
    if is_.is_integer(data_type):
        bits, signed = data_type.bit_width, is_.is_signed_integer(data_type)
        return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)
    if is_.is_floating(data_type):
        return st.floats(width=data_type.bit_width)
    if is_.is_decimal(data_type):
        return st.integers(-999, 999).map(lambda number: Decimal(number) / 100 if data_type.scale else Decimal(number))
    if is_.is_date32(data_type) or is_.is_time32(data_type):
        last = {"s": 86399, "ms": 86_399_999}.get(getattr(data_type, "unit", ""), 2**31 - 1)
        return st.integers(0 if is_.is_time32(data_type) else -(2**31), last)
    if is_.is_date64(data_type):
        return st.integers(-(2**31), 2**31 - 1).map(lambda days: days * 86_400_000)
    if is_.is_time64(data_type):
        return st.integers(0, 86_399_999_999 * (1000 if data_type.unit == "ns" else 1))
    if is_.is_timestamp(data_type) and data_type.unit == "s":  # Parquet has milliseconds at most
        return st.integers(-(2**63) // 1000, 2**63 // 1000 - 1)
    if is_.is_timestamp(data_type) or is_.is_duration(data_type):
        return st.integers(-(2**63) + 1, 2**63 - 1)
    if is_.is_fixed_size_binary(data_type):
        return st.binary(min_size=data_type.byte_width, max_size=data_type.byte_width)
    if is_.is_map(data_type):
        return st.dictionaries(st.text(max_size=3), values(data_type.item_type), max_size=2).map(
            lambda d: list(d.items())
        )
    if is_.is_struct(data_type):
        return st.fixed_dictionaries({item.name: values(item.type) for item in data_type})
    if is_.is_fixed_size_list(data_type):
        return st.lists(values(data_type.value_type), min_size=data_type.list_size, max_size=data_type.list_size)
    if is_.is_nested(data_type):
        return st.lists(values(data_type.value_type), max_size=2)
    text = data_type in (pa.string(), pa.large_string(), pa.string_view())
    return st.text(max_size=5) if text else st.binary(max_size=5)


def extension_column(data_type: pa.DataType, count: int) -> pa.Array:
    """Return a column of an extension type."""
    stored = {
        "arrow.uuid": [uuid.UUID(int=number).bytes for number in range(count)],
        "arrow.json": [f'{{"n": {number}}}' for number in range(count)],
        "arrow.bool8": [number % 2 for number in range(count)],
        "pia_batch.unhashed": list(range(count)),
    }.get(data_type.extension_name, [bytes([number]) for number in range(count)])
    return pa.ExtensionArray.from_storage(data_type, pa.array([None, *stored[1:]], data_type.storage_type))
