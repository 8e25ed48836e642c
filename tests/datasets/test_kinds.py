"""Sources of every kind, written by other programs' own libraries: what is detected, read, skipped and refused."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import pickle
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_datasets as foreign
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from inputs import png

from pia_batch.datasets import lakes, table_files
from pia_batch.datasets.kinds import KINDS, kind_of
from pia_batch.datasets.sources import Place, ReadOptions, Source
from pia_batch.errors import ConfigError, ManifestError


def opened(path: Path, kind: str | None = None, **options: Any) -> tuple[str, Source]:
    place = Place.of(str(path))
    found = kind_of(place, kind)
    source = found.open(place, ReadOptions(**options))
    return found.name, pickle.loads(pickle.dumps(source))  # noqa: S301 - its own; workers get it like this


def rows_of(source: Source) -> list[dict[str, Any]]:
    tables = [rows for piece in source.pieces for rows in source.read(piece)]
    places = [place for rows in tables for place in rows.places.to_pylist()]
    assert len(set(places)) == len(places)
    found = [row for rows in tables for row in rows.table.to_pylist()]
    return [{"place": place} | row for place, row in zip(places, found, strict=True)]


def test_a_folder_of_images_has_captions_from_text_files(tmp_path: Path) -> None:
    kind, source = opened(foreign.write_photographs(tmp_path / "my photos"))
    rows = rows_of(source)
    assert kind == "folder"
    assert [row["place"] for row in rows] == [
        "trip 0/day one/IMG 000.png",
        "trip 0/day one/IMG 002.png",
        "trip 1/day one/IMG 001.png",
        "trip 1/day one/IMG 003.png",
    ]
    assert rows[1] == {
        "place": "trip 0/day one/IMG 002.png",
        "path": "trip 0/day one/IMG 002.png",
        "folder": "trip 0/day one",
        "name": "IMG 002",
        "caption": "a photograph, number 2",
        "image_bytes": png(2),
    }
    assert rows[3]["caption"] is None


def test_a_folder_can_be_read_as_uris(tmp_path: Path) -> None:
    _, source = opened(foreign.write_photographs(tmp_path / "my photos"), images="uris")
    assert rows_of(source)[0]["image"] == (tmp_path / "my photos/trip 0/day one/IMG 000.png").as_uri()


def test_values_next_to_an_image_come_from_json(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(png())
    (tmp_path / "a.json").write_text(json.dumps({"caption": "from json", "score": 2}))
    (tmp_path / "a.txt").write_text("from text")
    (row,) = rows_of(opened(tmp_path)[1])
    assert (row["caption"], row["txt"], row["score"]) == ("from json", "from text", 2)


def test_webdataset_keeps_the_encoded_image(tmp_path: Path) -> None:
    kind, source = opened(foreign.write_webdataset(tmp_path))
    rows = rows_of(source)
    assert kind == "webdataset"
    assert rows[3] == {
        "place": "shard-00001.tar/0000",
        "key": "0000",
        "image_bytes": png(10),
        "caption": "cat 1-0",
        "aesthetic": 5,
        "width": 640,
        "tags": ["a", "b"],
    }
    assert len(rows) == 6


def test_keys_of_webdataset_end_at_the_first_dot(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        foreign.add_members(archive, {"x/1.seg.jpg": b"other", "x/1.jpg": png(), "x/1.TXT": b"cat", "README": b"no"})
    (row,) = rows_of(opened(tmp_path)[1])
    assert (row["key"], row["image_bytes"], row["caption"]) == ("x/1", png(), "cat")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.jpg": png(), "2.jpg": png(), "1.txt": b"x"}, ["'1'", "not next to each other", "tar --sort=name"]),
        ({"1.jpg": png(), "1.png": png()}, ["'1.png'", "a second image"]),
        ({"1.jpg": png(), "1.json": b"{"}, ["'1.json'", "not JSON"]),
    ],
)
def test_shards_that_break_the_rules_are_refused_by_member(
    tmp_path: Path, members: dict[str, bytes], words: list[str]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        foreign.add_members(archive, members)
    with pytest.raises(ManifestError) as raised:
        rows_of(opened(tmp_path)[1])
    assert all(word in str(raised.value) for word in ["a.tar", *words]), str(raised.value)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    whole = foreign.write_webdataset(tmp_path / "whole", shards=1) / "shard-00000.tar"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.tar").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(ManifestError, match=r"a\.tar cannot be read"):
        rows_of(opened(tmp_path / "cut")[1])


@pytest.mark.parametrize("output_format", ["webdataset", "files", "parquet"])
def test_img2dataset_has_only_what_was_downloaded(tmp_path: Path, output_format: str) -> None:
    kind, source = opened(foreign.write_img2dataset(tmp_path, output_format))
    rows = rows_of(source)
    assert kind == "img2dataset"
    assert [row["caption"] for row in rows] == ["a lighthouse 0", "a lighthouse 2"]
    assert [row.get("image_bytes") or row["jpg"] for row in rows] == [png(0), png(2)]
    skipped = sum(found.skipped for piece in source.pieces for found in source.read(piece))
    assert skipped == (2 if output_format == "parquet" else 0)


def test_an_image_feature_of_hugging_face_is_a_struct(tmp_path: Path) -> None:
    kind, source = opened(foreign.write_hugging_face(tmp_path))
    rows = rows_of(source)
    assert kind == "parquet"
    assert rows[3]["place"] == "train-00001-of-00002.parquet:0"
    assert rows[3]["image"] == {"bytes": png(3), "path": "3.png"}
    assert len(rows) == 6


def test_parquet_is_read_in_pieces_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = foreign.image_table(20)
    (tmp_path / "style=ink").mkdir()
    pq.write_table(table, tmp_path / "style=ink" / "a.parquet", row_group_size=3)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=20)
    monkeypatch.setattr(table_files, "PART_BYTES", 4 * table.nbytes // 20)
    _, source = opened(tmp_path)
    rows = rows_of(source)
    assert [row["id"] for row in rows] == table["id"].to_pylist() * 2
    assert rows[20]["place"] == "style=ink/a.parquet:0"
    assert rows[20]["style"] == "ink"
    assert len(source.pieces) == 8
    parts = [len(found.table) for found in source.read(source.pieces[0])]
    assert max(parts) <= 5
    assert sum(parts) == 20


@pytest.mark.parametrize(("last", "unit"), [(2200, "ns"), (9999, "us")])
def test_old_timestamps_have_one_unit_that_holds_every_year(last: int, unit: str, tmp_path: Path) -> None:
    years = {"a": [1800, 2026], "b": [1900, last]}
    for name, values in years.items():
        column = pa.array([dt.datetime(year, 1, 2, 3, 4, 5, 6) for year in values], pa.timestamp("us"))  # noqa: DTZ001
        table = pa.table({"when": column, "in": pa.StructArray.from_arrays([column], ["x"]), "n": [1, 2]})
        pq.write_table(table, tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=True, store_schema=False)
    pq.write_table(pa.table({"n": [3]}), tmp_path / "c.parquet")

    _, source = opened(tmp_path)

    assert source.schema.field("when").type == pa.timestamp(unit)
    tables = [rows.table for piece in source.pieces for rows in source.read(piece)]
    assert [row["when"].year for table in tables[:2] for row in table.to_pylist()] == [1800, 2026, 1900, last]
    assert [row["in"]["x"].year for row in tables[1].to_pylist()] == [1900, last]
    assert {table["when"].type for table in tables[:2]} == {pa.timestamp(unit)}


def test_parquet_files_may_differ_in_their_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": ["b"], "n": [2.5], "text": ["x"]}), tmp_path / "b.parquet")
    _, source = opened(tmp_path)
    assert source.schema is not None
    assert source.schema.names == ["image", "n", "text"]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_jsonl_and_csv_are_read_compressed_or_not(tmp_path: Path, end: str) -> None:
    table = pa.table({"image": ["a.png", "b.png"], "caption": ["one, two", 'a "b"\nc'], "n": [1, 2]})
    for name in ("jsonl", "csv"):
        folder = tmp_path / name
        folder.mkdir()
        compression = {".gz": "gzip", ".zst": "zstd"}.get(end)
        with pa.output_stream(str(folder / f"a.{name}{end}"), compression=compression) as stream:
            if name == "csv":
                pyarrow.csv.write_csv(table, stream)
            else:
                stream.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
        kind, source = opened(folder)
        assert kind == name
        assert rows_of(source) == [{"place": f"a.{name}{end}:{k}"} | row for k, row in enumerate(table.to_pylist())]


def test_errors_in_text_files_name_the_line_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ManifestError, match=r"a\.jsonl, line 2: not JSON"):
        rows_of(opened(tmp_path)[1])
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ManifestError, match="line 2: each line must be one JSON object"):
        rows_of(opened(tmp_path)[1])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b"{}")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-5])
    with pytest.raises(ManifestError, match=r"a\.jsonl\.gz cannot be read"):
        rows_of(opened(tmp_path)[1])


@pytest.mark.parametrize(
    ("kind", "write", "pinned"),
    [
        ("lance", foreign.write_lance, "lance_version"),
        ("delta", foreign.write_delta, "delta_version"),
        ("iceberg", foreign.write_iceberg, "iceberg_snapshot"),
    ],
)
def test_tables_with_a_log_are_read_without_their_deleted_rows(
    tmp_path: Path, kind: str, write: Callable[[Path], Path], pinned: str
) -> None:
    folder = write(tmp_path / "table")
    found, source = opened(folder)
    rows = rows_of(source)
    assert found == kind
    assert sorted(row["id"] for row in rows) == ["row-0", "row-2", "row-3"]
    assert {row["id"]: row["image_bytes"] for row in rows}["row-2"] == png(2)
    assert list(source.pinned) == [pinned]
    if kind == "delta":
        assert {row["id"]: row["style"] for row in rows}["row-2"] == "ink"


def test_an_older_version_can_be_read(tmp_path: Path) -> None:
    lance = foreign.write_lance(tmp_path / "lance")
    assert len(rows_of(opened(lance, version="1")[1])) == 4
    delta = foreign.write_delta(tmp_path / "delta")
    assert len(rows_of(opened(delta, version="0")[1])) == 4
    iceberg = foreign.write_iceberg(tmp_path / "iceberg")
    metadata = json.loads(max((iceberg / "metadata").glob("*.metadata.json")).read_text())
    first = str(metadata["snapshots"][0]["snapshot-id"])
    assert len(rows_of(opened(iceberg, version=first)[1])) == 4
    with pytest.raises(ConfigError, match="--version x"):
        opened(lance, version="x")


@pytest.mark.parametrize(
    ("kind", "write", "module"),
    [
        ("lance", foreign.write_lance, "lance"),
        ("delta", foreign.write_delta, "deltalake"),
        ("iceberg", foreign.write_iceberg, "pyiceberg.table"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, write: Callable[[Path], Path], module: str
) -> None:
    folder = write(tmp_path / "table")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'pia-batch\[{kind}\]'"):
        opened(folder)


def test_a_kind_can_be_chosen_and_an_unclear_place_is_refused(tmp_path: Path) -> None:
    pq.write_table(foreign.image_table(1), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ManifestError, match="parquet and jsonl files; choose one by --kind"):
        opened(tmp_path)
    assert opened(tmp_path, "jsonl")[0] == "jsonl"
    with pytest.raises(ConfigError, match=f"--kind tar: unknown; write one of {', '.join(KINDS)}"):
        opened(tmp_path, "tar")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.doc").write_text("x")
    with pytest.raises(ManifestError, match=r"holds none of .* \(files: a\.doc\)"):
        opened(tmp_path / "other")
    with pytest.raises(ManifestError, match="there is no file"):
        opened(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet", "jsonl"])
def test_a_file_that_was_replaced_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "webdataset":
        foreign.write_webdataset(folder)
    elif kind == "folder":
        foreign.write_photographs(folder)
    elif kind == "parquet":
        pq.write_table(foreign.image_table(2), folder / "a.parquet")
    else:
        (folder / "a.jsonl").write_text('{"image": "a.png"}\n')
    _, source = opened(folder)
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path, (1, 1))
    with pytest.raises(ManifestError, match="was replaced, added or removed"):
        rows_of(source)


def test_animatebench_has_its_105_cases_with_models_by_name(tmp_path: Path) -> None:
    kind, source = opened(foreign.write_animatebench(tmp_path / "bench"))
    rows = rows_of(source)
    assert kind == "animatebench"
    assert len(rows) == len({row["request_id"] for row in rows}) == 105
    assert {row["model"] for row in rows} == set(foreign.ANIMATE_BENCH)
    assert rows[4] == {
        "place": "MoonFile/2/2",
        "request_id": "MoonFile/2/2",
        "prompt": "MoonFile image 2, prompt 2, lowres,watermark",
        "model": "MoonFile",
        "image": (tmp_path / "bench/img/MoonFile/2.png").as_uri(),
        "negative_prompt": "wrong white balance, dark, sketches",
        "image_number": 2,
    }
    (first, *_) = rows_of(opened(tmp_path / "bench", images="bytes")[1])
    assert first["image_bytes"] == png(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompts:\n- [a, b, c]\n", "`prompts` has 1 entries for 5 images"),
        ("prompts: a\n", "`prompts` has no list for 5 images"),
        ("prompts: [", "line"),
        ("prompts: [[a], [a], [a], [a], [a]]\nn_prompt: [x, y]\n", "`n_prompt` has 2 entries for 5 images"),
    ],
)
def test_a_config_of_animatebench_that_fits_no_image_is_named(tmp_path: Path, text: str, words: str) -> None:
    folder = foreign.write_animatebench(tmp_path / "bench")
    (folder / "configs" / "film.yaml").write_text(text)
    with pytest.raises(ManifestError, match=re.escape(words)) as raised:
        rows_of(opened(folder)[1])
    assert "configs/film.yaml" in str(raised.value)


def test_a_hudi_table_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / ".hoodie").mkdir()
    (tmp_path / ".hoodie" / "hoodie.properties").write_text("hoodie.table.name=photos\n")
    pq.write_table(foreign.image_table(1), tmp_path / "a.parquet")
    for kind in (None, "parquet"):
        with pytest.raises(ManifestError, match=r"is an Apache Hudi table.*Spark and Hudi's reader"):
            opened(tmp_path, kind)


@pytest.mark.parametrize(
    ("log", "data", "words"),
    [
        ("_delta_log/00000000000000000000.json", "day=1/a.parquet", "a Delta table .*pia-batch prepare .*/x/t --to"),
        ("metadata/v1.metadata.json", "data/a.parquet", "an Apache Iceberg table .*pia-batch prepare .*/x/t --to"),
        (".hoodie/hoodie.properties", "2026/11/22/a.parquet", "an Apache Hudi table .*Hudi's reader"),
        ("snapshot/snapshot-12", "bucket-0/a.parquet", "an Apache Paimon table .*Paimon's reader"),
        ("base_0000003/b.parquet", "delta_0000001_0000001_0000/a.parquet", "a transactional Hive table .*with Hive"),
    ],
)
@pytest.mark.parametrize("kind", [None, "parquet"])
def test_files_of_a_table_whose_log_says_which_rows_are_current_are_refused(tmp_path, log, data, words, kind) -> None:
    table = tmp_path / "x" / "t"
    for name in (log, data):
        (table / name).parent.mkdir(parents=True, exist_ok=True)
    (table / log).write_text("{}")
    pq.write_table(foreign.image_table(1), table / data)

    for place in (tmp_path, tmp_path / "x", (table / data).parent, table / data):
        with pytest.raises(ManifestError, match=f"source .* is {words}"):
            opened(place, kind)


@pytest.mark.parametrize("content", ["{}", "", "[]", '{"format-version": 9}', '{"format-version": 2}'])
def test_damaged_metadata_of_iceberg_are_named(tmp_path, content) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "v1.metadata.json").write_text(content)

    with pytest.raises(ManifestError, match=r"source .*v1\.metadata\.json (is damaged|cannot be read)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("footer", "column", "words"),
    [
        ({"iceberg.schema": "{}"}, "x", "an Apache Iceberg table"),
        ({"org.apache.hudi.bloomfilter": ""}, "x", "an Apache Hudi table"),
        ({}, "_hoodie_commit_time", "an Apache Hudi table"),
    ],
)
def test_a_data_file_of_a_table_is_refused_wherever_it_is(tmp_path, footer, column, words) -> None:
    table = foreign.image_table(1).append_column(column, pa.array(["x"])).replace_schema_metadata(footer)
    pq.write_table(table, tmp_path / "a.parquet")

    with pytest.raises(ManifestError, match=rf"source .*/a\.parquet is a data file of {words}"):
        opened(tmp_path)


def test_files_that_a_stream_of_spark_did_not_commit_are_left_out(tmp_path) -> None:
    (tmp_path / "_spark_metadata").mkdir()
    (tmp_path / "_spark_metadata" / "0").write_text('v1\n{"path": "file:///was/there/a.parquet", "action": "add"}\n')
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(foreign.image_table(1), tmp_path / name)

    assert [row["place"] for row in rows_of(opened(tmp_path)[1])] == ["a.parquet:0"]
    assert Place.of(str(tmp_path)).broken == {str(tmp_path / "b.parquet")}


def test_a_delta_table_with_deletion_vectors_is_refused_with_the_remedy(tmp_path: Path) -> None:
    log = foreign.write_delta(tmp_path / "table") / "_delta_log"
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7} | features}
    (log / f"{len(list(log.glob('*.json'))):020d}.json").write_text(json.dumps(protocol) + "\n")
    with pytest.raises(ManifestError, match=r"deletionVectors.*write its current rows to Parquet by Spark or DuckDB"):
        opened(tmp_path / "table")


def test_an_iceberg_table_is_found_by_its_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyiceberg.catalog  # noqa: PLC0415 - an optional library
    from pyiceberg.utils.config import Config  # noqa: PLC0415

    foreign.write_iceberg(tmp_path)
    (tmp_path / ".pyiceberg.yaml").write_text(
        f"catalog:\n  test:\n    type: sql\n    uri: sqlite:///{tmp_path}/catalog.db\n"
    )
    monkeypatch.setenv("PYICEBERG_HOME", str(tmp_path))
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())  # a program reads it once, when it starts
    found = lakes.of_catalog("iceberg://test/shop.photos")
    assert found.endswith(".metadata.json")
    kind, source = opened(Path(found.removeprefix("file://")))
    assert kind == "iceberg"
    assert sorted(row["id"] for row in rows_of(source)) == ["row-0", "row-2", "row-3"]
    with pytest.raises(
        ManifestError, match=r"iceberg://test/shop\.none: the catalog cannot be read.*\.pyiceberg\.yaml"
    ):
        lakes.of_catalog("iceberg://test/shop.none")
    with pytest.raises(ConfigError, match=r"write iceberg://CATALOG/NAMESPACE\.TABLE"):
        lakes.of_catalog("iceberg://test")


OF_OTHERS = {
    "a.parquet": (b"ORC" + bytes(60), "is an ORC file; write it as Parquet"),
    "b.parquet": (b"ARROW1\0\0" + bytes(60), "is an Arrow IPC (Feather) file; write it as Parquet"),
    "c.parquet": (b'{"a": 1}\n', "is text, not Parquet; JSONL and CSV are known by their names"),
    "d.parquet": (b"", "Parquet file size is 0 bytes; remove it, or write it again"),
    "a.feather": (b"ARROW1\0\0" + bytes(60), "is an Arrow IPC (Feather) file; write it as Parquet"),
    "a.xlsx": (b"PK\x03\x04" + bytes(60), "is a zip archive or an Excel workbook; unpack it, or save it as CSV UTF-8"),
    "a.csv": (b"PK\x03\x04" + bytes(60), "is a zip archive or an Excel workbook; unpack it, or save it as CSV UTF-8"),
    "b.csv": ("a,b\n1,2\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "c.csv": ("a,b\n1,r\xe9d\n".encode("latin1"), "column 'b' has text that is not UTF-8; save the file as UTF-8"),
    "d.csv": (b'a,b\n1,"x"\n2,"a \\"sign\\" says"\n', "line 3: text goes on after the closing quote of a field"),
    "e.csv.gz": (gzip.compress(b'a\n"a \\"sign\\" says"\n'), "line 2: text goes on after the closing quote of a field"),
    "a.jsonl": ('{"a": 1}\n'.encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "b.jsonl": (gzip.compress(b"{}\n"), "is compressed with gzip; name JSONL and CSV as such"),
    "c.jsonl.gz": (gzip.compress(b"PAR1" + bytes(60)), "is Parquet; name it .parquet"),
    "d.jsonl": (
        b'{"a": 1}{"a": 2}\n',
        "line 1: not JSON: Extra data: line 1 column 9 (char 8); write one object",
    ),
    "e.jsonl": (b"[1]\n", "line 1: each line must be one JSON object; write one object on each line"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_neighbouring_format_is_refused_by_its_name_as_in_a_manifest(name: str, tmp_path: Path) -> None:
    content, words = OF_OTHERS[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ManifestError, match=re.escape(words)) as caught:
        rows_of(opened(tmp_path)[1])

    assert str(caught.value).startswith(f"source {tmp_path / name}")


def test_a_backslash_at_the_end_of_a_quoted_field_is_a_backslash(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\r\n"C:\\",2\r\n"two\nlines ""\\""",3\r\n')

    assert [row["a"] for row in rows_of(opened(tmp_path)[1])] == ["C:\\", 'two\nlines "\\"']
