"""Columns of JSON objects without declared types."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.datasets.json_columns import json_table


def test_values_keep_their_type_where_all_have_one() -> None:
    rows: list[dict[str, Any]] = [
        {"n": 1, "x": 1, "t": "a", "b": True, "mixed": 1, "tags": ["a"], "sizes": [1, 2.5], "object": {"b": 1, "a": 2}},
        {"n": None, "x": 0.5, "b": None, "mixed": "one", "big": 2**70, "none": None, "tags": []},
    ]
    table = json_table(rows, 2)
    assert table.schema == pa.schema(
        [
            ("n", pa.int64()),
            ("x", pa.float64()),
            ("t", pa.string()),
            ("b", pa.bool_()),
            ("mixed", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("sizes", pa.list_(pa.float64())),
            ("object", pa.string()),
            ("big", pa.float64()),
        ]
    )
    assert table["mixed"].to_pylist() == ["1", "one"]
    assert table["object"].to_pylist() == ['{"a": 2, "b": 1}', None]


def test_a_column_is_text_where_it_is_asked_for() -> None:
    assert json_table([{"zip": 8001}, {"zip": "08001"}], 2, {"zip"})["zip"].to_pylist() == ["8001", "08001"]


def test_values_inside_of_objects_become_columns_where_a_path_is_asked_for() -> None:
    rows: list[dict[str, Any]] = [
        {"meta": {"caption": "a cat", "size": {"width": 512}}, "a.b": {"c": 1}},
        {"meta": {"size": None, "a": {"b": 1}}, "a": {"b.c": 2}},
        {"meta": "no object", "meta.caption": "its own"},
    ]
    paths = {"meta.caption", "meta.size.width", "a.b.c", "meta.captoin", "meta"}
    table = json_table(rows, 3, paths=paths)

    assert table.column_names == ["a.b.c", "meta.caption", "meta.size.width", "meta", "a.b", "a"]
    assert table["meta.caption"].to_pylist() == ["a cat", None, "its own"]
    assert table["meta.size.width"].to_pylist() == [512, None, None]
    assert table["a.b.c"].to_pylist() == [1, 2, None]
    assert table["meta"].to_pylist()[1:] == ['{"a": {"b": 1}, "size": null}', "no object"]


def test_objects_without_any_value_are_rows_all_the_same() -> None:
    assert json_table([{}, {"a": None}], 2).num_rows == 2


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), _values), max_size=5))
def test_any_objects_become_a_valid_table(rows: list[dict[str, Any]]) -> None:
    table = json_table(rows, len(rows))
    table.validate(full=True)
    assert table.num_rows == len(rows)
