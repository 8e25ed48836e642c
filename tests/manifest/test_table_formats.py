"""Tables and containers that look like a manifest: refused by name, or counted as left out."""

from __future__ import annotations

import functools
import io
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from inputs import requests_table
from servers import serving

from pia_batch.errors import ManifestError
from pia_batch.manifest.reader import Manifest

TABLES = [
    ("_delta_log/00000000000000000000.json", "a.parquet", "a Delta table"),
    ("_delta_log/00000000000000000010.checkpoint.parquet", "day=1/a.parquet", "a Delta table"),
    ("metadata/v1.metadata.json", "data/a.parquet", "an Apache Iceberg table"),
    ("metadata/00000-0b1c.gz.metadata.json", "data/day=1/a.parquet", "an Apache Iceberg table"),
    (".hoodie/hoodie.properties", "a.parquet", "an Apache Hudi table"),
    (".hoodie/hoodie.properties", "day=1/a.parquet", "an Apache Hudi table"),
    ("snapshot/snapshot-12", "bucket-0/a.parquet", "an Apache Paimon table"),
    ("snapshot/snapshot-12", "day=1/bucket-0/a.parquet", "an Apache Paimon table"),
    ("_delta_log/00000000000000000000.json", "Xy/a.parquet", "a Delta table"),
    ("_delta_log/00000000000000000000.json", "_change_data/a.parquet", "a Delta table"),
    ("metadata/v1.metadata.json", "data/0110/1010/00000011/day=1/a.parquet", "an Apache Iceberg table"),
    ("metadata/snap-12-1-0b1c.avro", "data/a.parquet", "an Apache Iceberg table"),
    ("metadata/0b1c-m0.avro", "data/a.parquet", "an Apache Iceberg table"),
    (".hoodie/hoodie.properties", "2026/11/22/a.parquet", "an Apache Hudi table"),
    ("base_0000003/bucket_00000.parquet", "delta_0000001_0000001_0000/a.parquet", "a transactional Hive table"),
    ("delta_0000004_0000004/a.parquet", "base_0000003_v0000007/a.parquet", "a transactional Hive table"),
    ("ducklake-018fd9a3-7c5b-7d3f-9b1e-0123456789ab-delete.parquet", "a.parquet", "a DuckLake table"),
    ("ducklake-018fd9a3-7c5b-7d3f-9b1e-0123456789ab.parquet", "day=1/a.parquet", "a DuckLake table"),
    ("_versions/1.manifest", "data/a.lance", "a Lance dataset"),
]


def table_in(folder: Path, log: str, data: str) -> None:
    for name in (log, data):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / log).write_text("{}")
    pq.write_table(requests_table(1), folder / data)


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest.open(str(path))
    return str(caught.value)


@pytest.mark.parametrize(("log", "data", "name"), TABLES)
def test_a_table_with_a_log_of_its_own_is_refused_by_name(log: str, data: str, name: str, tmp_path: Path) -> None:
    table_in(tmp_path / "x" / "t", log, data)

    for place in (tmp_path / "x" / "t", tmp_path / "x", tmp_path):
        message = refusal(place)
        assert f"is {name} (folder {tmp_path}/x/t" in message
        own = any(word in name for word in ("Delta", "Iceberg", "Lance"))
        exported = "rows.parquet" if "DuckLake" in name else "EXPORT"
        assert f"pia-batch prepare {f'{tmp_path}/x/t' if own else exported} --to DEST" in message


@pytest.mark.parametrize(("log", "data", "name"), TABLES[:15])
def test_a_file_or_a_partition_of_a_table_is_refused_too(log: str, data: str, name: str, tmp_path: Path) -> None:
    table_in(tmp_path / "t", log, data)

    assert f"is {name} (folder {tmp_path}/t" in refusal(tmp_path / "t" / data)
    if "/" in data:
        assert f"is {name} (folder {tmp_path}/t" in refusal((tmp_path / "t" / data).parent)


@pytest.mark.parametrize(
    ("metadata", "column", "name"),
    [
        ({"iceberg.schema": "{}"}, "shop", "an Apache Iceberg table"),
        ({"delete-type": "position"}, "shop", "an Apache Iceberg table"),
        ({}, "_hoodie_record_key", "an Apache Hudi table"),
        ({}, "_hoodie_commit_time", "an Apache Hudi table"),
        ({}, "_VALUE_KIND", "an Apache Paimon table"),
    ],
)
def test_a_data_file_of_a_table_is_known_by_its_content_wherever_it_is(
    metadata: dict[str, str], column: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    table = requests_table(1, **{column: ["x"]}, _SEQUENCE_NUMBER=[1])
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)

    assert f"a.parquet is a data file of {name}: it may also have rows that were deleted" in refusal(path)


@pytest.mark.parametrize(
    ("metadata", "columns", "name"),
    [
        ({}, {"_change_type": ["delete"], "_commit_version": [1], "_commit_timestamp": [1]}, "a Delta table"),
        ({"org.apache.hudi.bloomfilter": "x"}, {}, "an Apache Hudi table"),
        ({"hoodie_min_record_key": "a"}, {}, "an Apache Hudi table"),
    ],
)
def test_so_is_one_without_the_columns_of_its_format(
    metadata: dict[str, str], columns: dict[str, list[object]], name: str, tmp_path: Path
) -> None:
    table = requests_table(1, **columns)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)

    assert f"is a data file of {name}" in refusal(tmp_path / "a.parquet")


class _Everything(SimpleHTTPRequestHandler):
    """Serves a folder, and answers to what it does not have with a page, as some servers do."""

    def send_head(self) -> Any:
        if Path(self.translate_path(self.path)).is_file():
            return super().send_head()
        data = b"<html>hoodie and other clothes</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("log", "content", "name"),
    [
        ("_delta_log/00000000000000000000.json", '{"protocol": {}}', "a Delta table"),
        ("_delta_log/_last_checkpoint", '{"version": 10}', "a Delta table"),
        (".hoodie/hoodie.properties", "#Updated\nhoodie.table.name=t", "an Apache Hudi table"),
        ("metadata/v1.metadata.json", '{"format-version": 2}', "an Apache Iceberg table"),
        ("notes/README", "", None),
    ],
)
def test_a_file_of_a_table_on_a_web_server_is_refused(log: str, content: str, name: str | None, tmp_path: Path) -> None:
    table_in(tmp_path / "t", log, "data/day=1/a.parquet")
    (tmp_path / "t" / log).write_text(content)
    with serving(functools.partial(_Everything, directory=str(tmp_path))) as address:
        uri = f"{address}/t/data/day=1/a.parquet"
        if name is None:
            assert Manifest.open(uri).num_rows == 1
            return
        with pytest.raises(ManifestError) as caught:
            Manifest.open(uri)

    assert f"is {name} (folder {address}/t)" in str(caught.value)


@pytest.mark.parametrize("name", ["metadata/notes.json", "delta_log/0.json", "hoodie/x", "versions/1.manifest"])
def test_a_folder_with_a_similar_name_is_none(name: str, tmp_path: Path) -> None:
    table_in(tmp_path, name, "a.parquet")

    assert Manifest.open(str(tmp_path)).num_rows == 1


def test_files_that_are_not_read_are_counted_except_images_and_notes(tmp_path: Path) -> None:
    pq.write_table(requests_table(1), tmp_path / "a.parquet")
    for name in ("part-00001", "x.tar", "d.json", "0.png", "README.md", "_SUCCESS", ".a.parquet.crc"):
        (tmp_path / name).write_bytes(b"x")

    found = Manifest.open(str(tmp_path))

    assert [Path(path).name for path in found.left_out] == ["d.json", "part-00001", "x.tar"]


def test_a_folder_of_nothing_but_other_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "b.tar.gz").write_bytes(b"x")

    assert ", but b.tar.gz; correct the folder" in refusal(tmp_path)
    assert "text may be compressed (.jsonl.gz, .csv.zst)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"PK\x03\x04000000", "a zip archive"), (b"Obj\x01\xff", "an Avro file"), (b"VTXF\xff\xfe", "a Vortex file")],
)
def test_a_folder_of_another_format_is_named_by_the_content_of_its_files(
    head: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("of a person")
    (tmp_path / "part-0.bin").write_bytes(head)

    assert f"part-0.bin is {what}" in refusal(tmp_path)


@pytest.mark.parametrize("splits", [(), ("train", "test")])
def test_a_dataset_that_hugging_face_saved_is_named_and_not_its_notes(splits: tuple[str, ...], tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict(requests_table(2).to_pydict())
    saved = datasets.DatasetDict(dict.fromkeys(splits, dataset)) if splits else dataset
    saved.save_to_disk(tmp_path / "saved")

    assert ".arrow is a stream of Arrow IPC, as Hugging Face datasets keep it; write it as Parquet" in refusal(
        tmp_path / "saved"
    )


def _orc(path: Path, table: pa.Table) -> None:
    pyarrow.orc.write_table(table, path)


@pytest.mark.parametrize("name", ["m", "m.parquet", "m.jsonl", "m.csv"])
@pytest.mark.parametrize(
    ("head", "what"),
    [
        ("arrow", "an Arrow IPC"),
        ("orc", "an ORC file"),
        (b"PK\x03\x04000000", "a zip archive or an Excel workbook; unpack it, or save it as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0000", "an old Excel workbook"),
        (b"Obj\x01000", "an Avro file; write it as Parquet"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"01234567DUCK\x40\0\0\0", "a DuckDB database"),
        (b"PARE\x15\0\x15\0PARE", "Parquet with an encrypted footer"),
    ],
)
def test_a_file_of_another_format_is_named_by_its_content(
    name: str, head: str | bytes, what: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if head == "arrow":
        pyarrow.feather.write_feather(requests_table(1), path)
    elif head == "orc":
        _orc(path, requests_table(1))
    else:
        assert isinstance(head, bytes)
        path.write_bytes(head)

    assert f"{name} is {what}" in refusal(path)
