"""Folders of Spark's writers: only the files of completed writes are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inputs import requests_table
from pyarrow import parquet as pq

from pia_batch.errors import ManifestError
from pia_batch.manifest.reader import Manifest


def batch(*names: str, action: str = "add") -> str:
    """A file of the log of a stream."""
    return "\n".join(["v1", *(json.dumps({"path": f"file:///was/there/{name}", "action": action}) for name in names)])


def write(*added: str, removed: tuple[str, ...] = ()) -> str:
    """A file that Databricks writes when a write is complete."""
    return json.dumps({"added": added, "removed": removed})


FOLDERS = {
    "a stream": ({"_spark_metadata/0": batch("a.parquet"), "_spark_metadata/1": batch("b.parquet")}, ["a", "b"]),
    "a stream without one batch": ({"_spark_metadata/0": batch("a.parquet")}, ["a"]),
    "a stream with a compact log": (
        {
            "_spark_metadata/8": batch("k=1/d.parquet"),
            "_spark_metadata/9.compact": batch("a.parquet"),
            "_spark_metadata/10": batch("c.parquet"),
        },
        ["a", "c"],
    ),
    "a stream with a deletion": (
        {
            "_spark_metadata/0": batch("a.parquet", "b.parquet"),
            "_spark_metadata/1": batch("a.parquet", action="delete"),
        },
        ["b"],
    ),
    "a stream with partitions": ({"_spark_metadata/0": batch("k=1/d.parquet")}, ["d"]),
    "a stream with a partition that is encoded": ({"_spark_metadata/0": batch("k%3D1/d.parquet")}, ["d"]),
    "a stream below": (
        {"k=1/_spark_metadata/0": batch("k=1/other.parquet")},
        ["a", "b", "c", "x-tid-1-0", "y-tid-2-0"],
    ),
    "complete writes": (
        {"_started_1": "", "_committed_1": write("x-tid-1-0.parquet"), "_committed_2": write("y-tid-2-0.parquet")},
        ["a", "b", "c", "x-tid-1-0", "y-tid-2-0", "d"],
    ),
    "a broken write": (
        {"_started_1": "", "_started_2": "", "_committed_2": write("y-tid-2-0.parquet")},
        ["a", "b", "c", "y-tid-2-0", "d"],
    ),
    "a write that replaced another": (
        {"_committed_1": write("x-tid-1-0.parquet"), "_committed_2": write(removed=("x-tid-1-0.parquet",))},
        ["a", "b", "c", "y-tid-2-0", "d"],
    ),
}


def make_folder(folder: Path, logs: dict[str, str]) -> None:
    for number, name in enumerate(["a", "b", "c", "k=1/d", "x-tid-1-0", "y-tid-2-0"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(requests_table(1, request_id=[str(number)]), folder / f"{name}.parquet")
    for name, text in logs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_broken_writes_are_left_out(name: str, tmp_path: Path) -> None:
    logs, read = FOLDERS[name]
    make_folder(tmp_path, logs)

    found = Manifest.open(str(tmp_path))

    assert sorted(Path(path).stem for path in found.files) == sorted(read)
    assert len(found.left_out) == 6 - len(read)


@pytest.mark.parametrize(
    "logs",
    [
        {"_spark_metadata/0": ""},
        {"_spark_metadata/0": "v2\n{}"},
        {"_spark_metadata/0": "v1\n{"},
        {"_spark_metadata/0": "v1\n{}"},
        {"_committed_1": ""},
        {"_committed_1": "[]"},
    ],
)
def test_a_damaged_log_is_refused_by_name(logs: dict[str, str], tmp_path: Path) -> None:
    make_folder(tmp_path, logs)

    with pytest.raises(ManifestError, match=f"{next(iter(logs))} is no log of Spark's writes"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize(("root", "read"), [("k=1", ["d", "f"]), ("k=1/j=3", ["f"]), ("plain/k=1", ["g"])])
def test_a_partition_of_a_stream_keeps_to_the_log_above_it(root: str, read: list[str], tmp_path: Path) -> None:
    make_folder(tmp_path, {"_spark_metadata/0": batch("k=1/d.parquet", "k=1/j=3/f.parquet")})
    for name in ("k=1/lost", "k=1/j=3/f", "k=1/j=3/lost", "plain/k=1/g"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(requests_table(1), tmp_path / f"{name}.parquet")

    found = Manifest.open(str(tmp_path / root))

    assert sorted(Path(path).stem for path in found.files) == read
