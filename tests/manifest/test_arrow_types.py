"""Carried columns of every type: what is written comes back from fragments and results, or is refused by name."""

from __future__ import annotations

import datetime as dt
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from columns_of_types import EXTENSIONS, REFUSED, RUNS, bad_types, extension_column, types, values
from fakes import ENGINE_ID
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import ManifestError
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.manifest.arrow_types import plain_column, plain_type, refuse_unsupported
from pia_batch.manifest.reader import Manifest
from pia_batch.pipeline.committer import results_of
from pia_batch.pipeline.stages import DropFinished, Validate
from pia_batch.planning.plan import make_plan
from pia_batch.schema.keys import KeySet, keys_from_hex
from pia_batch.storage.object_store import Store

ENGINES = {"default": ENGINE_ID}


def carried(folder: Path) -> pa.Table:
    """Return the published results of a manifest whose requests all failed, after every stage that moves rows."""
    config = RunConfig.load(None, {"manifest": str(folder / "in"), "output": str(folder / "out")})
    plan = make_plan(config)
    journal = Journal(Store(config.output))
    wanted = []
    for piece in plan.manifest.pieces():
        for rows in piece.tables(plan.manifest.schema):
            valid = DropFinished(KeySet.of(keys_from_hex(pa.array([], pa.string()))))(Validate(config, ENGINES)(rows))
            halves = pa.concat_tables([valid.slice(1), valid.slice(0, 1)]).combine_chunks()
            halves = halves.take(pc.sort_indices(halves, sort_keys=[("request_id", "ascending")]))
            results = [{"key": row, "status": "failed", "error_kind": "x"} for row in halves["key"].to_pylist()]
            journal.append(results_of(halves, results))
            wanted += halves["key"].to_pylist()
    publish(journal, journal.outcomes(), KeySet.of(keys_from_hex(pa.array(wanted))), plan.carried, "r", {})
    return pq.ParquetFile(folder / "out" / "results" / "r" / "part-00000.parquet").read()


def same(read: pa.ChunkedArray, written: pa.ChunkedArray) -> bool:
    """Return True for equal values, whatever their encoding and the width of their unit."""
    ours, theirs = plain_column(read), plain_column(written)
    theirs = theirs if theirs.type == ours.type else theirs.cast(ours.type)
    # Arrow has no equality in which NaN equals itself at every depth; texts of Python's floats are exact.
    return bool(theirs.equals(ours)) or repr(theirs.to_pylist()) == repr(ours.to_pylist())


@pytest.mark.long
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_columns_of_every_type_come_back_from_the_results(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(types, min_size=1, max_size=4))
    columns = {
        f"c{number}": pa.array(data.draw(st.lists(values(one), min_size=3, max_size=3)), one)
        for number, one in enumerate(chosen)
    }
    table = requests_table(3, **columns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        try:
            pq.write_table(table, folder / "in" / "a.parquet")
        except pa.ArrowException:
            reject()  # pyarrow cannot write some views and dictionaries inside of others
        results = carried(folder)

    for column in columns:
        assert same(results[column], table[column]), table[column].type


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_runs_of_every_type_come_back_whole_and_inside_of_others(data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(RUNS))
    runs = pc.run_end_encode(pa.array(data.draw(st.lists(values(one), min_size=3, max_size=3)), one))
    decoded = pc.run_end_decode(runs)
    sizes = pa.array([0, 1, 1, 3], pa.int32())
    table = requests_table(
        3,
        own=runs,
        listed=pa.ListArray.from_arrays(sizes, runs),
        inner=pa.StructArray.from_arrays([runs], ["x"]),
        part=pa.concat_arrays([runs, runs]).slice(2, 3),
    )

    rows = Validate(RunConfig.load(None, {"manifest": "m", "output": "o"}), ENGINES, keep_rejected=True)(table)

    assert rows["error_kind"].null_count == 3
    expected = {
        "own": decoded,
        "listed": pa.ListArray.from_arrays(sizes, decoded),
        "inner": pa.StructArray.from_arrays([decoded], ["x"]),
        "part": pa.concat_arrays([decoded, decoded]).slice(2, 3),
    }
    for name, column in expected.items():
        assert same(rows[name], pa.chunked_array([column])), (name, one)
        assert plain_type(rows[name].type) == rows[name].type


@pytest.mark.parametrize("extension", EXTENSIONS, ids=str)
def test_extension_types_come_back_as_they_are(extension: pa.DataType, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    column = extension_column(extension, 3)
    listed = pa.array([[value] for value in column.storage.to_pylist()], pa.list_(extension.storage_type))
    table = requests_table(3, own=column, listed=listed.cast(pa.list_(extension)))
    pq.write_table(table, tmp_path / "in" / "a.parquet")

    results = carried(tmp_path)

    assert results["own"].type == extension
    assert results["own"].equals(table["own"])
    assert same(results["listed"], table["listed"])


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(bad_types)
def test_a_type_that_parquet_cannot_store_is_refused_by_name(bad: pa.DataType) -> None:
    with pytest.raises(ManifestError) as caught:
        refuse_unsupported([pa.field("good", pa.int64()), pa.field("bad one", bad)], "this manifest")

    assert str(caught.value).startswith("this manifest: column 'bad one' has the type ")
    assert "write it as text, such as JSON" in str(caught.value)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(types)
def test_no_type_that_parquet_stores_is_refused(good: pa.DataType) -> None:
    refuse_unsupported([pa.field("c", good)], "this manifest")
    assert plain_type(plain_type(good)) == plain_type(good)


@pytest.mark.parametrize("values", [pa.array(["a", None, "b"]).cast(pa.string_view()), pa.array([1, None, 1])])
def test_encodings_are_removed(values: pa.Array) -> None:
    plain = values.cast(plain_type(values.type))
    ree = pc.run_end_encode(plain) if pa.types.is_integer(plain.type) else plain
    for encoded in (values, ree, pa.chunked_array([plain]).dictionary_encode().chunk(0)):
        assert plain_column(pa.chunked_array([encoded])).to_pylist() == values.to_pylist()


FRAME = {"request_id": ["a", "b"], "image": ["a.png"] * 2, "prompt": ["p"] * 2}


def test_columns_of_polars_come_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frame = pl.DataFrame(
        FRAME
        | {
            "category": pl.Series(["x", None], dtype=pl.Categorical),
            "enum": pl.Series(["x", None], dtype=pl.Enum(["x", "y"])),
            "texts": [["a", None], None],
            "categories": pl.Series([["x"], None], dtype=pl.List(pl.Categorical)),
            "object": [{"a": "x", "b": [1]}, None],
            "duration": [dt.timedelta(days=1), None],
            "time": [dt.time(1), None],
            "decimal": [Decimal("1.2"), None],
            "array": pl.Series([[1, 2], None], dtype=pl.Array(pl.Int64, 2)),
            "nothing": pl.Series([None, None], dtype=pl.Null),
            "bytes": [b"x", None],
            "far": pl.Series([dt.datetime(9999, 1, 1), dt.datetime(1, 1, 1)]),  # noqa: DTZ001 - without a zone
        }
    )
    frame.write_parquet(tmp_path / "in" / "a.parquet")

    results = carried(tmp_path)

    for name in frame.columns[3:]:
        assert results[name].to_pylist() == frame[name].to_list()


def test_columns_of_pandas_come_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frame = pd.DataFrame(
        FRAME
        | {
            "category": pd.Categorical(["x", None]),
            "when": pd.to_datetime(["2020-01-01", None]).tz_localize("Europe/Berlin"),
            "span": pd.to_timedelta(["1 day", None]),
            "whole": pd.array([1, None], dtype="Int64"),
            "month": pd.period_range("2020-01", periods=2, freq="M"),
            "range": pd.interval_range(0, 2),
            "mixed": [{"a": 1}, None],
            "missing": [float("nan")] * 2,
        }
    )
    frame.to_parquet(tmp_path / "in" / "a.parquet")
    written = pq.read_table(tmp_path / "in" / "a.parquet")

    results = carried(tmp_path)

    for name in list(frame.columns)[3:]:
        assert same(results[name], written[name]), name


_DUCKDB = {
    "uuid": "'68f96687-04f1-482e-bbda-48457e80fb42'::UUID",
    "interval": "interval 1 day",
    "time_tz": "'10:00:00+02'::TIMETZ",
    "timestamp_s": "'9999-01-01'::TIMESTAMP_S",
    "timestamp_ns": "'2000-01-01'::TIMESTAMP_NS",
    "enum": "'a'::ENUM('a','b')",
    "union": "union_value(num := 2)",
    "map": "map{'a': 1}",
    "bits": "'101'::BIT",
    "json": "'{}'::JSON",
    "infinity": "'-infinity'::date",
    "blob": "'a'::BLOB",
    "decimal": "1.5::DECIMAL(38,3)",
    "struct": "{'a': [{'b': 1}]}",
    "huge": "1::HUGEINT",
}


def test_columns_of_duckdb_come_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    chosen = ", ".join(f"{value} as c_{name}" for name, value in _DUCKDB.items())
    nulls = ", ".join("null" for _ in _DUCKDB)
    path = tmp_path / "in" / "a.parquet"
    duckdb.sql(
        f"copy (select 'a' as request_id, 'a.png' as image, 'p' as prompt, {chosen} "
        f"union all select 'b', 'a.png', 'p', {nulls}) to '{path}' (format parquet)"
    )
    written = pq.read_table(path)

    results = carried(tmp_path)

    for name in _DUCKDB:
        assert same(results[f"c_{name}"], written[f"c_{name}"]), name


@pytest.mark.parametrize("row", [1, 3000])
def test_a_column_that_was_written_but_cannot_be_read_is_refused_by_the_plan(row: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    duckdb.sql(
        "copy (select 'r' || i as request_id, 'a.png' as image, 'p' as prompt, "  # noqa: S608 - values of this test
        f"case when i = {row} then null else [i, 2]::INT[2] end as pair from range(3001) t(i)) "
        f"to '{path}' (format parquet)"
    )
    with pytest.raises(pa.ArrowException):  # what pyarrow cannot read, a later one may
        pq.ParquetFile(path).read()["pair"].validate(full=True)

    with pytest.raises(ManifestError, match="column 'pair'"):
        Manifest.open(str(tmp_path / "in"))


def test_lists_of_a_file_that_an_earlier_scan_has_read_are_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    duckdb.sql(
        "copy (select 'a' as request_id, 'a.png' as image, 'p' as prompt, [1, 2]::INT[2] as pair "
        f"union all select 'b', 'a.png', 'p', null) to '{path}' (format parquet)"
    )
    good = tmp_path / "good.parquet"
    pq.write_table(requests_table(2, pair=[[1, 2], None]), good)
    ((_, contents),) = Manifest.open(str(good)).opened

    assert Manifest.open(str(path), lambda _path, _version: contents).num_rows == 2
    with pytest.raises(ManifestError, match="column 'pair'"):
        Manifest.open(str(path))


def test_integers_of_128_bits_are_refused_with_the_names_of_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"big": pl.Series([1, None], dtype=pl.Int128), "list": pl.Series([[1], None], dtype=pl.List(pl.UInt128))}
    pl.DataFrame(FRAME | columns).write_parquet(path)

    with pytest.raises(ManifestError) as caught:
        Manifest.open(str(path))

    assert str(caught.value) == (
        f"manifest file {path}: columns 'big', 'list' may have integers of 128 bits (Polars: Int128, UInt128), which "
        "are not read; cast them to 64 bits, or to text, or drop them"
    )


def test_old_timestamps_of_every_year_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    when = pa.array([dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 1, 2, 3, 4)], pa.timestamp("us"))  # noqa: DTZ001
    pq.write_table(requests_table(2, old=when), tmp_path / "in" / "a.parquet", use_deprecated_int96_timestamps=True)

    assert carried(tmp_path)["old"].to_pylist() == when.to_pylist()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5])),
        (pa.array([10**13], pa.timestamp("ms")), pa.array([5], pa.timestamp("ns"))),
        (pa.array([2**63], pa.uint64()), pa.array([-1], pa.int64())),
    ],
    ids=lambda value: str(value.type),
)
def test_a_value_that_does_not_fit_the_type_of_another_file_is_refused_by_the_plan(
    first: pa.Array, second: pa.Array, tmp_path: Path
) -> None:
    for number, own in enumerate((first, second)):
        pq.write_table(requests_table(1, own=own), tmp_path / f"{number}.parquet")

    with pytest.raises(ManifestError, match=r"column 'own' is .* here, and .* with the other files"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize(
    ("objects", "read"),
    [
        ([{}], ["{}"]),
        ([{}, None], ["{}", None]),
        ([{"a": {}}], ['{"a": {}}']),
        ([[{}]], ["[{}]"]),
        ([{"a": [{"b": {}}]}, {"a": None}], ['{"a": [{"b": {}}]}', '{"a": null}']),
        ([{"a": 1}, {}], [{"a": 1}, {"a": None}]),
        ([[], [1]], [[], [1]]),
        ([[]], [[]]),
        ([None], [None]),
    ],
)
def test_objects_of_json_lines_come_back(objects: list[Any], read: list[Any], tmp_path: Path) -> None:
    import json  # noqa: PLC0415 - here only

    (tmp_path / "in").mkdir()
    lines = [
        json.dumps({"request_id": f"r{number}", "image": "a.png", "prompt": "p", "meta": value})
        for number, value in enumerate(objects)
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))

    assert carried(tmp_path)["meta"].to_pylist() == read


def test_every_refused_type_is_one_that_parquet_refuses() -> None:
    for bad in REFUSED:
        with pytest.raises((pa.ArrowException, OSError)):
            pq.write_table(pa.table({"c": pa.nulls(1, bad)}), pa.BufferOutputStream())


TWICE = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])


@pytest.mark.parametrize(
    "column",
    [
        TWICE,
        pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), TWICE),
        pa.StructArray.from_arrays([TWICE], ["inner"]),
        pa.MapArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["k"]), TWICE),
    ],
    ids=["struct", "list", "inner struct", "map"],
)
def test_a_struct_with_two_fields_of_one_name_is_refused_by_name(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(requests_table(1, meta=column), tmp_path / "m.parquet")

    with pytest.raises(ManifestError, match=r"column 'meta' has a struct with two fields 'a'.*; rename one of them"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize("name", ["own", "prompt", "image"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.binary(1), pa.binary_view()], ids=str)
@pytest.mark.parametrize("texts_first", [True, False])
def test_texts_in_one_file_and_bytes_in_another_are_refused_by_both_names(
    name: str, binary: pa.DataType, texts_first: bool, tmp_path: Path
) -> None:
    columns = [pa.array(["x"]), pa.array([b"x"], binary)]
    listed = [pa.array([["x"]]), pa.array([[b"x"]], pa.list_(pa.binary()))]
    for pair in (columns, listed):
        for number, column in enumerate(pair if texts_first else pair[::-1]):
            pq.write_table(requests_table(1, **{name: column}), tmp_path / f"{number}.parquet")

        with pytest.raises(ManifestError) as caught:
            Manifest.open(str(tmp_path))

        assert str(caught.value).startswith(f"manifest files disagree on column '{name}': ")
        assert str(caught.value).endswith(f"{tmp_path}/1.parquet; write it with one type")
        assert f" in {tmp_path}/0.parquet, " in str(caught.value)
