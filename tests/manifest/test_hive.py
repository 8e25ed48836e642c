"""Partitions in the names of folders: of every file, decoded, and never in contradiction with a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import requests_table

from pia_batch.errors import ManifestError
from pia_batch.manifest.hive import is_hidden, partitions_in
from pia_batch.manifest.reader import Manifest

NULL = "__HIVE_DEFAULT_PARTITION__"


@pytest.mark.parametrize(
    ("folder", "read"),
    [
        ("x=1", {"x": "1"}),
        ("x=", {"x": ""}),
        ("x=a=b", {"x": "a=b"}),
        (f"x={NULL}", {"x": None}),
        (f"x={NULL.lower()}", {"x": NULL.lower()}),
        ("x=NULL", {"x": "NULL"}),  # DuckDB writes so the text, and null as Hive does
        ("x=a%2Fb%20c%25%C3%A9", {"x": "a/b c%é"}),
        ("x=a+b", {"x": "a+b"}),
        ("x=100%", {"x": "100%"}),
        ("x=%zz", {"x": "%zz"}),
        ("x=%ff", {"x": "%ff"}),  # no UTF-8, so that it is not one with %fe
        ("a%20b=1", {"a b": "1"}),
        ("a%3Db=1", {"a=b": "1"}),
        ("_x=1", {"_x": "1"}),
        ("plain", {}),
    ],
)
def test_a_folder_names_a_column_and_its_value(folder: str, read: dict[str, str | None]) -> None:
    assert partitions_in([folder]) == read


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("_tmp/a.parquet", True), (".x/a.parquet", True), ("x/_SUCCESS", True), ("x/.a.crc", True),
        ("_x=1/a.parquet", False), (".x=1/a.parquet", True), ("x/a.parquet", False), ("_x=1/_y/a.parquet", True),
    ],
)  # fmt: skip
def test_a_partition_by_a_column_with_an_underscore_is_not_hidden(path: str, hidden: bool) -> None:
    assert is_hidden(path.split("/")) is hidden


def rows(folder: Path, files: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)
    return [row for batch in Manifest.open(str(folder)).batches() for row in batch.table.to_pylist()]


def test_partitions_of_every_file_count_and_not_those_of_the_first_alone(tmp_path: Path) -> None:
    one = requests_table(1)

    found = rows(
        tmp_path,
        {"a.parquet": one, "negative_prompt=blurry/b.parquet": one, "zone=5/c.parquet": one.append_column("z", [[1]])},
    )

    assert [(row["negative_prompt"], row["zone"], row["z"]) for row in found] == [
        (None, None, None),
        ("blurry", None, None),
        (None, "5", 1),
    ]
    assert list(found[0])[-3:] == ["z", "negative_prompt", "zone"]  # partitions come last


def test_a_partition_that_contradicts_a_column_of_another_file_is_refused_before_anything_is_generated(
    tmp_path: Path,
) -> None:
    one = requests_table(1)

    with pytest.raises(ManifestError, match=r"disagree on column 'zone': int64 in .*a\.parquet, string in .*zone=b/"):
        rows(tmp_path, {"a.parquet": one.append_column("zone", [[5]]), "zone=b/b.parquet": one})


def test_a_column_of_the_file_itself_wins_over_its_folder(tmp_path: Path) -> None:
    assert rows(tmp_path, {"zone=b/a.parquet": requests_table(1, zone=[5])})[0]["zone"] == 5
