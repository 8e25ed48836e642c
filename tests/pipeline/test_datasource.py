"""A manifest in the pieces that workers read: nothing is lost between them, and no file is trusted. Without Ray."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import requests_table
from ray import cloudpickle

from pia_batch.errors import InterruptedRunError, ManifestError
from pia_batch.manifest import files as manifest_files
from pia_batch.manifest import pieces as manifest_pieces
from pia_batch.manifest.reader import Manifest
from pia_batch.pipeline.datasource import ManifestDatasource
from pia_batch.storage import filesystems


def write_groups(path: Path, *sizes: int, table: pa.Table | None = None, **options: Any) -> None:
    """A Parquet file with row groups of these sizes."""
    table = requests_table(sum(sizes)) if table is None else table
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size


def tasks(found: Manifest) -> list[Any]:
    """Read tasks as Ray asks for them."""
    return ManifestDatasource(found).get_read_tasks(parallelism=1)


def read(found: Manifest) -> pa.Table:
    return pa.concat_tables([table for task in tasks(found) for table in task()])


def whole(found: Manifest) -> pa.Table:
    return pa.concat_tables([batch.table for batch in found.batches()])


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5).filter(lambda files: sum(map(sum, files)))
)
@settings(deadline=None, max_examples=30)
def test_pieces_add_up_to_the_manifest_and_none_is_larger_than_it_may_be(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    for number, sizes in enumerate(files):
        table = requests_table(sum(sizes), request_id=[f"{number}-{k}" for k in range(sum(sizes))])
        write_groups(folder / f"{number}.parquet", *sizes, table=table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_pieces, "BATCH_ROWS", 12)
        found = Manifest.open(str(folder))
        pieces = list(found.pieces())

    assert all(0 < piece.num_rows <= 12 for piece in pieces)
    for piece in pieces:
        assert sum(len(table) for table in piece.tables(found.schema)) == piece.num_rows
    assert read(found).equals(whole(found))


def test_one_large_file_is_read_by_many_tasks_and_many_small_ones_by_one(tmp_path: Path) -> None:
    write_groups(tmp_path / "large" / "a.parquet", *[30_000] * 8)
    for k in range(20):
        write_groups(tmp_path / "small" / f"{k:02d}.parquet", 5)
    large, small = Manifest.open(str(tmp_path / "large")), Manifest.open(str(tmp_path / "small"))

    assert [task.metadata.num_rows for task in tasks(large)] == [60_000] * 4
    assert [task.metadata.num_rows for task in tasks(small)] == [100]
    assert list(tasks(small)[0].metadata.input_files) == list(small.files)


def test_pieces_are_bounded_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_pieces, "PIECE_BYTES", 64 * 2**10)
    images = [os.urandom(3 * 2**10) for _ in range(60)]
    table = requests_table(60, image_bytes=images)
    write_groups(tmp_path / "in" / "a.parquet", *[4] * 15, table=table, compression="none")
    found = Manifest.open(str(tmp_path / "in"))

    pieces = list(found.pieces())

    assert 3 <= len(pieces) <= 6
    assert all(piece.num_bytes <= manifest_pieces.PIECE_BYTES for piece in pieces)
    assert read(found)["image_bytes"].to_pylist() == images


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_files_are_a_piece_each_and_the_manifest_can_let_go_of_their_rows(tmp_path: Path, name: str) -> None:
    for number in range(3):
        rows = [(f"{number}-{k}", f"{k}.png", "p" * 1000) for k in range(1000)]
        columns = ("request_id", "image", "prompt")
        lines = [",".join(row) for row in (columns, *rows)]
        if name.endswith("jsonl"):
            lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        text = "\n".join(lines)
        (tmp_path / f"{number}{name}").write_text(text)

    found = Manifest.open(str(tmp_path))

    assert [piece.num_rows for piece in found.pieces()] == [1000] * 3
    assert len(pickle.dumps(list(found.pieces()))) < 10_000
    planned = whole(found)
    found.release()
    assert found._tables == {}
    assert read(found).equals(planned)
    assert whole(found).equals(planned)
    assert read(found)["request_id"].to_pylist() == [f"{number}-{k}" for number in range(3) for k in range(1000)]


def test_partitions_and_columns_that_a_file_lacks_are_in_every_piece(tmp_path: Path) -> None:
    write_groups(tmp_path / "in" / "dt=2026-11-22" / "a.parquet", 2, 0, 3)
    write_groups(tmp_path / "in" / "dt=2026-11-23" / "a.parquet", 1, table=requests_table(1, shop=["north"]))

    rows = read(Manifest.open(str(tmp_path / "in")))

    assert rows["dt"].to_pylist() == ["2026-11-22"] * 5 + ["2026-11-23"]
    assert rows["shop"].to_pylist() == [None] * 5 + ["north"]


def test_damage_in_a_carried_column_alone_is_a_manifest_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.parquet"
    shops = [f"the shop number {k} of this street" for k in range(1000)]
    table = requests_table(1000, shop=shops)
    write_groups(path, 500, 500, table=table, write_page_checksum=True, compression="none")
    found = Manifest.open(str(path))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"the shop number 900") + 4] ^= 0xFF
    stamp = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # bits rot without leaving a date

    assert sum(len(batch.table) for batch in found.batches(["request_id", "image", "prompt"])) == 1000
    with pytest.raises(ManifestError, match=r"cannot read manifest .*a\.parquet"):
        read(found)


def test_a_carried_column_that_unpacks_to_too_much_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    count = 100_000
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * 500_000]))
    table = requests_table(count, note=shared)
    write_groups(tmp_path / "in" / "a.parquet", count, table=table, store_schema=False, compression="zstd")
    found = Manifest.open(str(tmp_path / "in"))

    with pytest.raises(ManifestError, match=r"MiB of text and bytes in the rows 0 to 65535; at most"):
        read(found)


def replace_by_more_rows(path: Path) -> None:
    pq.write_table(requests_table(9), path)


def replace_by_as_many_bytes(path: Path) -> None:
    data, before = path.read_bytes(), path.stat()
    path.write_bytes(data.replace(b"number 1", b"number 7"))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))


@pytest.mark.parametrize("change", [replace_by_more_rows, replace_by_as_many_bytes, Path.unlink])
def test_a_file_that_was_replaced_since_the_manifest_was_opened_ends_the_run(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "in" / "a.parquet"
    write_groups(path, 5, compression="none", use_dictionary=False)
    found = Manifest.open(str(path))
    change(path)

    with pytest.raises(InterruptedRunError, match=r"a\.parquet was replaced or removed .* Start again"):
        read(found)


def test_a_file_that_is_replaced_while_it_is_read_ends_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_files, "BATCH_ROWS", 10)
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    line = '{"request_id": "%d", "image": "a.png", "prompt": "p"}\n'
    path.write_text("".join(line % k for k in range(11)))
    found = Manifest.open(str(path))
    (piece,) = found.pieces()
    tables = piece.tables(found.schema)
    next(tables)
    path.write_text(line % 0)

    with pytest.raises(InterruptedRunError, match="replaced or removed"):
        list(tables)


def test_a_copy_at_another_time_is_another_file_and_a_second_look_at_the_same_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.parquet"
    write_groups(path, 3)
    found = Manifest.open(str(path))
    assert read(found).equals(read(found))

    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)

    with pytest.raises(InterruptedRunError):
        read(found)


TASKS = """
import sys
from ray import cloudpickle
for task in cloudpickle.loads(sys.stdin.buffer.read()):
    for table in task():
        print(len(table))
"""


def test_a_task_needs_nothing_of_the_process_that_made_it(tmp_path: Path) -> None:
    write_groups(tmp_path / "in" / "a.parquet", 4, 3)
    found = Manifest.open(str(tmp_path))

    done = subprocess.run(
        [sys.executable, "-c", TASKS], input=cloudpickle.dumps(tasks(found)), capture_output=True, check=True
    )

    assert sum(map(int, done.stdout.split())) == 7


def write_to_s3(uri: str, prompt: str) -> None:
    filesystem, path = filesystems.arrow_filesystem(uri)
    table = requests_table(4, prompt=[prompt] * 4)
    with filesystem.open_output_stream(path) as sink:
        pq.write_table(table, sink, row_group_size=2, compression="none")


@pytest.mark.s3
def test_an_object_that_was_replaced_by_one_of_the_same_size_is_noticed_by_its_tag(s3: str) -> None:
    uri = f"{s3}/in/a.parquet"
    write_to_s3(uri, "fine")
    found = Manifest.open(f"{s3}/in")
    assert read(found).equals(whole(found))
    assert found.num_rows == 4

    write_to_s3(uri, "find")

    with pytest.raises(InterruptedRunError, match=r"a\.parquet was replaced"):
        read(found)
