"""Tables of request ids: what is written is selected, letter by letter, whatever the format of the table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pia_batch.errors import ConfigError
from pia_batch.manifest import id_tables

TIMES = ["2020-01-01", "2020-01-01T00:00:00", "12:30"]
IDS = ["007", "7", "1e5", "1.0", "true", "NA", "null", *TIMES, " x ", 'a"b', "a,b"]
"""Ids that a reader of CSV or JSON may take for numbers, times, truth values or null."""


@pytest.mark.parametrize("name", ["ids.csv", "ids.csv.gz", "ids.jsonl", "ids.json", "ids.parquet", "folder"])
def test_ids_come_back_as_they_were_written(name: str, tmp_path: Path) -> None:
    table, path = pa.table({"request_id": IDS, "score": [0.5] * len(IDS)}), tmp_path / name
    if ".csv" in name:
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(table, sink)
        data = sink.getvalue().to_pybytes()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    elif ".json" in name:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif name == "folder":
        path.mkdir()
        pq.write_table(table, path / "part-0.parquet")
    else:
        pq.write_table(table, path)

    assert id_tables.read(str(path)).to_pylist() == IDS


@pytest.mark.parametrize("value", IDS[:-1])
def test_an_id_without_quotes_is_a_text_too(value: str, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text(f"request_id\n{value}\n")

    assert id_tables.read(str(tmp_path / "ids.csv")).to_pylist() == [value]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([7, None, 7]),
        pa.array(["7", None, "7"], pa.large_string()),
        pa.array(["7", None, "7"]).dictionary_encode(),
        pa.array([b"7", None, b"7"]),
    ],
    ids=lambda column: str(column.type),
)
def test_ids_of_other_types_are_texts_and_each_of_them_counts_once(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"request_id": column}), tmp_path / "ids.parquet")

    assert id_tables.read(str(tmp_path / "ids.parquet")).to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "request_id;score\na;1\n", "has semicolons between its columns"),
        ("a.csv", "request_id,request_id\na,b\n", "has more than one column request_id; rename"),
        ("a.csv", "id\na\n", "has no column request_id; it has id"),
        ("a.csv", "request_id\n", "has no ids in its column request_id"),
        ("a.csv", 'request_id\n"a" b\n', "line 2: text goes on after the closing quote"),
        ("a.jsonl", '[{"request_id": "a"}]', "line 1: each line must be one JSON object"),
        ("a.jsonl", '{"request_id": 1.5}', "cannot read .*; give a Parquet, CSV or JSONL table"),
        ("a.parquet", "request_id\na\n", "cannot read .*; give a Parquet, CSV or JSONL table"),
        ("none.csv", "", "does not exist; correct its path or URI"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_its_option(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    if text:
        (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=message) as caught:
        id_tables.read(str(tmp_path / name))

    assert str(caught.value).startswith("--only: ")
    assert name in str(caught.value)
    assert "manifest" not in str(caught.value)
    assert "\n" not in str(caught.value)
