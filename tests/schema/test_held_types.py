"""Types of carried columns in a dataset: every value of a column that is held comes through its cast."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.schema.dataset_columns import held_type

LEAVES = [pa.null(), pa.int64(), pa.string(), pa.timestamp("us"), pa.decimal128(20, 3)]


def filled(data_type: pa.DataType) -> pa.Array:
    """Return two values, of which the lists have two values each, with null at the end of all."""
    if pa.types.is_struct(data_type):
        return pa.StructArray.from_arrays([filled(item.type) for item in data_type], fields=list(data_type))
    if pa.types.is_fixed_size_list(data_type):
        inner = filled(data_type.value_type)
        return pa.FixedSizeListArray.from_arrays(pa.concat_arrays([inner, inner]), type=data_type)
    if pa.types.is_list(data_type):
        inner = filled(data_type.value_type)
        return pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), inner, type=data_type)
    return pa.nulls(2, data_type)


def renamed(data_type: pa.DataType) -> pa.DataType:
    """Return a type with the names that lists have in Parquet."""
    if pa.types.is_struct(data_type):
        return pa.struct([item.with_type(renamed(item.type)) for item in data_type])
    element = None if not data_type.num_fields else pa.field("element", renamed(data_type.field(0).type))
    if pa.types.is_fixed_size_list(data_type):
        return pa.list_(element, data_type.list_size)
    return pa.list_(element) if pa.types.is_list(data_type) else data_type


CHOSEN = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(pa.list_), inner.map(lambda one: pa.list_(one, 2)), inner.map(lambda one: pa.struct([("x", one)]))
    ),
    max_leaves=4,
)


@given(CHOSEN)
def test_a_type_that_is_held_has_valid_values_after_the_cast(data_type: pa.DataType) -> None:
    stored = renamed(data_type)
    held = held_type(stored)

    if held is not None:
        filled(stored).cast(held).validate(full=True)


@pytest.mark.parametrize("data_type", [pa.list_(pa.null(), 2), pa.list_(pa.list_(pa.list_(pa.null()), 2))], ids=str)
def test_fixed_size_lists_of_nulls_are_left_out(data_type: pa.DataType) -> None:
    assert held_type(renamed(data_type)) is None
    assert held_type(renamed(pa.list_(pa.null()))) is not None
