"""Times beyond Python's dates in the table of an exported folder."""

from __future__ import annotations

from pathlib import Path

import datasets
import lance
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from finished_outputs import export_here, make_output

from pia_batch import export
from pia_batch.schema import far_times
from pia_batch.storage.object_store import Store

DAY = 86_400
FIRST, LAST = -62_135_596_800, 253_402_300_799  # the years 1 and 9999
LONGEST = 999_999_999 * DAY
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def column_of(data_type: pa.DataType, seconds: int) -> pa.Array:
    """Return a column with one value, and null."""
    if data_type == pa.date32():
        return pa.array([seconds // DAY, None], pa.int32()).cast(data_type)
    number = seconds // DAY * DAY * 1000 if data_type == pa.date64() else seconds * PER_SECOND[data_type.unit]
    return pa.array([number, None], pa.int64()).cast(data_type)


def nested(column: pa.Array) -> list[pa.Array]:
    listed = pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), column)
    in_struct = pa.StructArray.from_arrays([pa.array([1, 2]), listed], ["n", "x"])
    return [column, listed, in_struct, pa.FixedSizeListArray.from_arrays(column, 1)]


TIMES = [
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us") for zone in (None, "UTC", "Europe/Berlin", "-11:00")),
    pa.date32(),
    pa.date64(),
]


@pytest.mark.parametrize("data_type", TIMES, ids=str)
@pytest.mark.parametrize(
    ("seconds", "is_far"),
    [(FIRST + 2 * DAY, False), (0, False), (LAST - 2 * DAY, False), (FIRST - 2 * DAY, True), (LAST + 2 * DAY, True)],
)
def test_times_beyond_pythons_years_are_found_at_every_depth(
    data_type: pa.DataType, seconds: int, is_far: bool
) -> None:
    for column in nested(column_of(data_type, seconds)):
        assert far_times.columns_with(pa.table({"x": column, "y": [1, 2]})) == ["x"] * is_far
        if is_far:
            with pytest.raises((ArithmeticError, ValueError)):
                column.to_pylist()
        else:
            column.to_pylist()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize(("seconds", "is_far"), [(LONGEST, False), (-LONGEST, False), (LONGEST + 1, True)])
def test_durations_longer_than_pythons_are_found(unit: str, seconds: int, is_far: bool) -> None:
    if abs(seconds) * PER_SECOND[unit] >= 2**63:
        seconds, is_far = 2**63 // PER_SECOND[unit] - 1, False
    column = column_of(pa.duration(unit), seconds)

    assert far_times.columns_with(pa.table({"x": column})) == ["x"] * is_far


def test_the_values_become_texts_and_json_and_other_columns_stay() -> None:
    far = column_of(pa.timestamp("s"), LAST + 1)
    rows = pa.table({"a": far, "b": nested(far)[1], "c": column_of(pa.date32(), 0), "d": far.fill_null(0).take([1, 1])})

    texts = far_times.with_texts(rows, far_times.columns_with(rows))

    assert texts.schema == far_times.schema_with_texts(rows.schema, ["a", "b"])
    assert texts["a"].to_pylist() == ["10000-01-01 00:00:00", None]
    assert texts["b"].to_pylist() == ['["10000-01-01 00:00:00", null]', "[]"]
    assert texts.select(["c", "d"]).equals(rows.select(["c", "d"]))


FAR = pa.array([FIRST - DAY, LAST + DAY, 0], pa.timestamp("s"))
SHOWN = ["0000-12-31 00:00:00.000", "10000-01-01 23:59:59.000", "1970-01-01T00:00:00"]


def check_dataset(folder: Path, cache: Path) -> None:
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))
    assert rows["far"][:] == SHOWN
    assert [value.year for value in rows["near"]] == [1970] * 3


def test_datasets_reads_a_published_output_whatever_years_its_columns_have(tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["gif"] * 3, carried=pa.table({"far": FAR, "near": FAR.take([2, 2, 2])}))

    check_dataset(tmp_path / "out", tmp_path / "cache")


@pytest.mark.parametrize("file_format", ["lance", "delta"])
def test_tables_have_texts_for_times_that_their_readers_lack(file_format: str, tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["gif"] * 3, carried=pa.table({"far": FAR, "near": FAR.take([2, 2, 2])}))

    export_here(str(tmp_path / "out"), tmp_path, file_format)

    opened = lance.dataset if file_format == "lance" else lambda path: DeltaTable(path).to_pyarrow_dataset()
    rows = opened(str(tmp_path / "to")).to_table(columns=["far", "near"])
    assert rows["far"].to_pylist() == SHOWN
    assert [value.year for value in rows["near"].to_pylist()] == [1970] * 3


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("file_format", ["folder", "parquet", "huggingface"])
def test_datasets_reads_an_export_whatever_years_its_columns_have(file_format: str, tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["gif"] * 3, carried=pa.table({"far": FAR, "near": FAR.take([2, 2, 2])}))

    export(str(tmp_path / "out"), str(tmp_path / "to"), file_format, shard_size="1")

    check_dataset(tmp_path / "to", tmp_path / "cache")
