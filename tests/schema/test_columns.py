import pyarrow as pa
import pytest

from pia_batch.schema.columns import (
    REQUEST,
    RESERVED,
    RESULT,
    SETTINGS,
    carried_columns,
    conformed,
    redacted,
    results_table,
)


def test_results_have_the_order_and_the_types_of_the_schema_whatever_was_given() -> None:
    carried = pa.table({"zone": ["a", "b"], "age": [1, 2]})
    given_columns = {
        "status": pa.scalar("failed"),
        "request_id": pa.array(["x", "y"], pa.large_string()),
        "attempts": pa.array([1, 2], pa.int8()),
        "width": pa.scalar(64),
    }

    made = results_table(given_columns, carried, 2)

    assert made.schema.equals(pa.schema([*RESULT, *carried.schema]))
    assert made["request_id"].to_pylist() == ["x", "y"]
    assert made["status"].to_pylist() == ["failed"] * 2
    assert (made["width"].to_pylist(), made["attempts"].to_pylist()) == ([64, 64], [1, 2])
    assert made["sha256"].null_count == made["motion_curve"].null_count == made["finished_at"].null_count == 2
    assert made["zone"].to_pylist() == ["a", "b"]


def test_results_of_no_rows_have_all_columns() -> None:
    assert results_table({}, pa.table({"zone": pa.array([], pa.int8())}), 0).num_columns == len(RESULT) + 1


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("images/a b@2x.png", "images/a b@2x.png"),
        ("s3://bucket/key?versionId=3", "s3://bucket/key?versionId=3"),
        ("s3://key:secret@bucket/x.png", "s3://bucket/x.png"),
        ("s3://key:se/cr/et@bucket/x.png", "s3://bucket/x.png"),
        ("https://user:p@ss@host/x.png", "https://host/x.png"),
        ("HTTPS://token@host/x.png", "HTTPS://host/x.png"),
        ("https://host/x.png?X-Amz-Signature=abc&y=1#z", "https://host/x.png"),
        ("https://host:8080/me@home.png", "https://host:8080/me@home.png"),
        ("sftp://me:word@host/x@y.png", "sftp://host/x@y.png"),
        ("abfs://container@account.dfs.core.windows.net/x.png", "abfs://container@account.dfs.core.windows.net/x.png"),
        (None, None),
    ],
)
def test_results_show_no_credentials_and_no_signatures(uri: str | None, shown: str | None) -> None:
    column = pa.array([uri], pa.string())

    assert redacted(column).to_pylist() == [shown]
    assert results_table({"image": column}, pa.table({}), 1)["image"].to_pylist() == [shown]


def test_what_a_manifest_carries_is_neither_a_request_column_nor_named_as_a_result() -> None:
    table = pa.table({"zone": [1], "request_id": ["a"], "seed": [2], "extra": ["b"]})

    assert carried_columns(table).column_names == ["zone", "extra"]
    assert not RESERVED & set(REQUEST.names)
    assert {"key", "status", "error", "pixels", "run_id"} <= RESERVED
    assert set(SETTINGS.names) <= set(RESULT.names) & set(REQUEST.names)


def test_a_table_is_conformed_to_a_schema_in_order_types_and_missing_columns() -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.float64())])

    table = conformed(pa.table({"c": [1], "a": pa.array([2], pa.int32()), "other": ["x"]}), schema)

    assert table.schema == schema
    assert table.to_pylist() == [{"a": 2, "b": None, "c": 1.0}]
