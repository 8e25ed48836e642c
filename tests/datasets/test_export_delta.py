"""Delta tables are readable whatever types the carried columns have."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from finished_outputs import export_here, make_output

from pia_batch.errors import ConfigError
from pia_batch.storage.object_store import Store

MOMENT = dt.datetime(2026, 11, 28, 9, 15, 56, 123456)  # noqa: DTZ001 - also in columns without a zone
IN_UTC = MOMENT.replace(tzinfo=dt.UTC)

HELD: list[tuple[pa.Array, Any]] = [
    (pa.array([2**8 - 1, None], pa.uint8()), 2**8 - 1),
    (pa.array([2**16 - 1, None], pa.uint16()), 2**16 - 1),
    (pa.array([2**32 - 1, None], pa.uint32()), 2**32 - 1),
    (pa.array([2**64 - 1, None], pa.uint64()), Decimal(2**64 - 1)),
    (pa.array([-(2**63), None], pa.int64()), -(2**63)),
    (pa.array([1.5, None], pa.float32()).cast(pa.float16()), 1.5),
    (pa.array([MOMENT, None], pa.timestamp("ns")), MOMENT),
    (pa.array([MOMENT, None], pa.timestamp("us")), MOMENT),
    (pa.array([MOMENT.replace(microsecond=0), None], pa.timestamp("s")), MOMENT.replace(microsecond=0)),
    (pa.array([IN_UTC, None], pa.timestamp("ns", "Europe/Berlin")), IN_UTC),
    (pa.array([IN_UTC, None], pa.timestamp("us", "UTC")), IN_UTC),
]


@pytest.mark.parametrize(("column", "value"), HELD, ids=lambda each: str(getattr(each, "type", "")))
def test_values_come_back_at_every_depth(column: pa.Array, value: Any, tmp_path: Path) -> None:
    listed = pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), column)
    pairs = pa.FixedSizeListArray.from_arrays(pa.concat_arrays([column, column]), 2)
    inner = pa.StructArray.from_arrays([listed], ["x"])
    carried = pa.table({"own": column, "listed": listed, "pairs": pairs, "inner": inner})
    make_output(Store(str(tmp_path / "out")), ["gif"] * 2, carried=carried)

    export_here(str(tmp_path / "out"), tmp_path, "delta")

    rows = DeltaTable(str(tmp_path / "to")).to_pyarrow_table().sort_by("request_id").to_pylist()
    assert [row["own"] for row in rows] == [value, None]
    assert [row["listed"] for row in rows] == [[value, None], []]
    assert [row["pairs"] for row in rows] == [[value, None]] * 2
    assert rows[0]["inner"] == {"x": [value, None]}


@pytest.mark.parametrize("data_type", [pa.time64("us"), pa.duration("s"), pa.list_(pa.decimal256(60, 3))], ids=str)
def test_a_type_that_delta_lacks_is_refused_before_anything_is_written(data_type: pa.DataType, tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["gif"], carried=pa.table({"odd": pa.nulls(1, data_type)}))

    with pytest.raises(ConfigError, match=r"--format delta cannot hold the column odd .*; leave it out by --columns"):
        export_here(str(tmp_path / "out"), tmp_path, "delta")

    assert not (tmp_path / "to").exists()
