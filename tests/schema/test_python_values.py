"""Values that Python has, as it has them, and text for those that it lacks, at any depth."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from pia_batch.schema import python_values

UNKNOWN_ZONE = pa.timestamp("s", "Mars/Olympus")
FAR = 10**7 * 86_400  # seconds, in the year 29349

LACKED = [
    (pa.array([0], UNKNOWN_ZONE), "1970-01-01 00:00:00Z"),
    (pa.array([FAR], pa.timestamp("s")), "29349-01-26 00:00:00"),
    (pa.array([FAR], pa.timestamp("s", "UTC")), "29349-01-26 00:00:00Z"),
    (pa.array([10**7], pa.int32()).cast(pa.date32()), "29349-01-26"),
    (pa.array([10**7 * 86_400_000], pa.int64()).cast(pa.date64()), "29349-01-26"),
    (pa.array([10**15], pa.duration("s")), "1000000000000000 s"),
    (pa.array([10**12], pa.timestamp("s")), "1000000000000 s since 1970-01-01"),
    (pa.array([10**9], pa.int32()).cast(pa.date32()), "1000000000 days since 1970-01-01"),
]


@pytest.mark.parametrize(("array", "text"), LACKED, ids=lambda value: str(getattr(value, "type", "")))
def test_a_value_that_python_lacks_is_a_text_at_any_depth(array: pa.Array, text: str) -> None:
    with pytest.raises(python_values._LACKS):
        array.to_pylist()
    number = pa.array([7])
    nested = [
        (pa.StructArray.from_arrays([array, number], ["at", "n"]), {"at": text, "n": 7}),
        (pa.ListArray.from_arrays([0, 1], array), [text]),
        (pa.LargeListArray.from_arrays([0, 1], array), [text]),
        (pa.FixedSizeListArray.from_arrays(array, 1), [text]),
        (pa.MapArray.from_arrays([0, 1], number, array), [(7, text)]),
        (array.dictionary_encode(), text),
        (pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([array], ["at"])), [{"at": text}]),
    ]

    assert python_values.of_column(array) == [text]
    for column, value in nested:
        assert python_values.of_column(column) == [value]
        with_null = pa.chunked_array([column, pa.nulls(1, column.type)])
        assert python_values.of_rows(pa.table({"n": [1, 2], "x": with_null})) == [
            {"n": 1, "x": value},
            {"n": 2, "x": None},
        ]


def test_other_values_and_those_beside_them_stay_as_python_has_them() -> None:
    times = pa.array([0, FAR], pa.timestamp("s"))

    assert python_values.of_column(times) == [dt.datetime(1970, 1, 1), "29349-01-26 00:00:00"]  # noqa: DTZ001 - as Arrow
    assert python_values.of_column(pa.chunked_array([[1, None], [3]])) == [1, None, 3]
    assert python_values.of_rows(pa.table({"a": []})) == []
