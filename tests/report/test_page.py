"""Data of the page: JSON that means nothing in HTML, and numbers that survive JavaScript."""

from __future__ import annotations

import json

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import (
    values_of,
)

from pia_batch.report import page


@settings(deadline=None)  # a shared machine
@given(st.recursive(st.none() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_data_for_the_script_is_json_that_means_nothing_in_html(value: object) -> None:
    text = page.for_script(value)
    assert not set("<>&\u2028\u2029").intersection(text)
    assert json.loads(text) == value


@settings(deadline=None)  # a shared machine
@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 7]), min_size=1))
def test_a_column_of_integers_survives_javascript(items: list[int | None]) -> None:
    column = page.column("seed", pa.chunked_array([pa.array(items, pa.int64())]))
    told = values_of({"rows": len(items), "columns": {"seed": json.loads(json.dumps(column))}}, "seed")
    assert [None if item is None else int(item) for item in told] == items
    assert all(abs(item) <= 2**53 for item in told if isinstance(item, int))


def test_settings_keep_every_digit_and_measures_six() -> None:
    column = pa.chunked_array([pa.array([1 / 3, float("inf")])])
    assert page.column("strength", column) == {"values": [1 / 3, None]}
    assert page.column("motion", column) == {"values": [0.333333, None]}
