"""Compressed text, Parquet without an extension, and folders of several of them, read within the limits of text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest import discovery, text_files
from pia_batch.manifest.formats import names_file
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.table_formats import refuse_table


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}


def text(table: pa.Table, extension: str) -> bytes:
    if extension == "csv":
        sink = io.BytesIO()
        pyarrow.csv.write_csv(table, sink)
        return sink.getvalue()
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


def ids(path: Path) -> list[str]:
    found = Manifest.open(str(path))
    return [each for batch in found.batches() for each in batch.table["request_id"].to_pylist()]


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest.open(str(path))
    return str(caught.value)


ALL = [f"r{k:03d}" for k in range(4)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("extension", ["jsonl", "ndjson", "csv", "json"])
@pytest.mark.parametrize("folder", [True, False])
def test_compressed_text_is_read_by_name_in_a_folder_and_alone(
    extension: str, compression: str, folder: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{extension}{compression.upper()}"
    path.write_bytes(COMPRESS[compression](text(requests_table(4), extension)))

    assert ids(tmp_path if folder else path) == ALL


@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
@pytest.mark.parametrize("name", ["a.jsonl", "000000_0", "000000_0.gz", "20231115_063914_00027_ucnjy_0b9f4c9e-ab.gz"])
def test_compressed_json_lines_are_found_by_content(name: str, compression: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + text(requests_table(4), "jsonl")))

    assert ids(tmp_path / name) == ids(tmp_path) == ALL


@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
def test_a_file_of_several_compressed_members_is_read_whole(compression: str, tmp_path: Path) -> None:
    halves = [text(requests_table(4).slice(start, 2), "jsonl") for start in (0, 2)]
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(map(COMPRESS[compression], halves)))

    assert ids(tmp_path) == ALL


def test_a_file_that_a_server_has_decompressed_already_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(text(requests_table(4), "csv"))

    assert ids(tmp_path) == ALL


def test_a_folder_may_have_compressed_and_plain_files(tmp_path: Path) -> None:
    for number, compression in enumerate(COMPRESS):
        rows = requests_table(4).slice(number, 1)
        (tmp_path / f"{number}.jsonl{compression}").write_bytes(COMPRESS[compression](text(rows, "jsonl")))
    (tmp_path / "dataset_info.json").write_text("{}")

    found = Manifest.open(str(tmp_path))

    assert ids(tmp_path) == ALL
    assert [Path(path).name for path in found.left_out] == ["dataset_info.json"]


@pytest.mark.parametrize(
    "name",
    ["000000_0", "part-r-00000", "20231115_063914_00027_ucnjy_0b9f4c9e-6cf1.1", "part-0.c000", "x.snappy", "a.parq"],
)
def test_parquet_without_an_extension_is_found_by_content(name: str, tmp_path: Path) -> None:
    pq.write_table(requests_table(4).slice(0, 3), tmp_path / name)
    pq.write_table(requests_table(4).slice(3), tmp_path / "z.parquet")
    (tmp_path / "NOTICE").write_text("no rows")
    (tmp_path / "empty").write_bytes(b"")

    found = Manifest.open(str(tmp_path))

    assert found.format == "parquet"
    assert sorted(ids(tmp_path)) == ALL
    assert [Path(path).name for path in found.left_out] == ["NOTICE", "empty"]
    assert ids(tmp_path / name) == ALL[:3]


TEMPORARY = [
    *("b.parquet._COPYING_", "b.parquet.crdownload", "b.parquet.incomplete", "b.parquet.inprogress", "b.parquet.tmp"),
    *("part-0.in-progress", "b.parquet~", "~$b.parquet", "#b.parquet#", "b.parquet.part", "B.PARQUET.DOWNLOADING"),
]


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_temporary_file_is_no_part_of_a_manifest(name: str, tmp_path: Path) -> None:
    pq.write_table(requests_table(4), tmp_path / "a.parquet")
    pq.write_table(requests_table(4), tmp_path / name)

    found = Manifest.open(str(tmp_path))

    assert ids(tmp_path) == ALL
    assert [Path(path).name for path in found.left_out] == [name]
    assert ids(tmp_path / name) == ALL  # who names it means it


def test_formats_that_only_content_shows_are_not_mixed_either(tmp_path: Path) -> None:
    pq.write_table(requests_table(1), tmp_path / "000000_0")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text(requests_table(1), "csv")))

    assert "files of several formats, csv and parquet" in refusal(tmp_path)


def test_a_json_document_is_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(requests_table(2).to_pylist()))

    assert "line 1: each line must be one JSON object" in refusal(tmp_path)


@pytest.mark.parametrize("extension", [".gz", ".zst", ".bz2"])
def test_a_compressed_file_that_was_cut_is_refused_by_name(extension: str, tmp_path: Path) -> None:
    data = COMPRESS[extension](text(requests_table(400), "jsonl"))
    (tmp_path / f"a.jsonl{extension}").write_bytes(data[:-4])

    message = refusal(tmp_path)

    assert f"a.jsonl{extension}" in message
    assert "the file ends early" in message


def test_a_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(text(requests_table(400), "jsonl")))
    data[-6] ^= 1  # the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(data)

    assert "the file is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.parquet"])
def test_compressed_parquet_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(requests_table(1), sink)
    (tmp_path / name).write_bytes(gzip.compress(sink.getvalue()))

    assert "is compressed with gzip; name JSONL and CSV as such (.jsonl.gz, .csv.zst); decompress" in refusal(tmp_path)


@pytest.mark.parametrize("extension", [".gz", ".zst", ".bz2"])
def test_a_bomb_is_refused_before_it_is_unpacked_whole(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 8 * 2**20)
    (tmp_path / f"a.jsonl{extension}").write_bytes(COMPRESS[extension](b" " * 2**27))
    before = pa.total_allocated_bytes()

    assert f"more than {8 * 2**20} bytes of JSONL or CSV, decompressed; write it as Parquet" in refusal(tmp_path)
    assert pa.total_allocated_bytes() - before < 16 * 2**20


def test_the_limit_holds_for_all_files_of_a_manifest_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text(requests_table(4), "jsonl")
    for number in range(5):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(rows + b" " * 10_000))
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 5 * (len(rows) + 10_000))
    assert Manifest.open(str(tmp_path)).num_rows == 20

    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 5 * (len(rows) + 10_000) - 1)
    assert "decompressed; write it as Parquet" in refusal(tmp_path)


def test_text_larger_than_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "MAX_TEXT_BYTES", 10)
    (tmp_path / "a.csv").write_bytes(text(requests_table(1), "csv"))

    assert "above 10, write it as Parquet" in refusal(tmp_path)


def test_names_of_manifests_are_no_configs_and_no_folders(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl.gz", "a.CSV.zst", "a.json.gz"):
        (tmp_path / name).write_bytes(b"")
        assert names_file(name)
        with pytest.raises(ConfigError, match="is a manifest, not a config"):
            RunConfig.load(tmp_path / name)
    assert not names_file("a.yaml")
    (tmp_path / "config.json").write_text('{"manifest": "m", "output": "o"}')
    assert RunConfig.load(tmp_path / "config.json").manifest == "m"


@pytest.mark.long
def test_images_as_text_are_refused_by_name_even_where_they_are_too_long_to_be_read(tmp_path: Path) -> None:
    long = [f"data:image/png;base64,iVBORw0KGgo{k}" + "A" * 400_000 for k in range(40)]
    rows = requests_table(40, image=long)
    pq.write_table(pa.concat_tables([rows] * 200), tmp_path / "a.parquet", row_group_size=8000)

    with pytest.raises(ManifestError, match=r"Column 'image' has images as text; required: a URI .* from base64 into"):
        list(Manifest.open(str(tmp_path)).batches())


def test_a_table_on_a_store_is_named_as_prepare_takes_it() -> None:
    with pytest.raises(ManifestError, match="pia-batch prepare 's3://b/my table' --to DEST"):
        refuse_table(["b/my table/_delta_log/0.json"], "b/my table", "s3://b/my table")
