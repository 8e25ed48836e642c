"""Finding and reading a manifest's files. What is judged about its rows is in test_validation.py."""

import codecs
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from decimal import Decimal
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import requests_table
from servers import free_port, serving

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest import files as manifest_files
from pia_batch.manifest import reader
from pia_batch.manifest.files import BATCH_ROWS_WITH_BYTES
from pia_batch.manifest.reader import Manifest, refuse_output_inside
from pia_batch.manifest.unify import conform
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import RESERVED
from pia_batch.storage import filesystems

LINE = '{"request_id": "a", "image": "a.png", "prompt": "p"}'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, pa.Table | str | bytes]], str]:
    """Writes files by name below one folder, and returns it."""

    def write_all(files: dict[str, pa.Table | str | bytes]) -> str:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path)

    return write_all


def read(uri: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of a manifest, whose batches must add up."""
    found = Manifest.open(uri)
    ordinal = 0
    tables = []
    for batch in found.batches(columns):
        assert batch.ordinal == ordinal
        assert batch.file in found.files
        ordinal += len(batch.table)
        tables.append(batch.table)
    assert ordinal == found.num_rows
    return pa.concat_tables(tables)


def ids(uri: str) -> list[Any]:
    return list(read(uri)["request_id"].to_pylist())


def refusal(uri: str) -> str:
    with pytest.raises(ManifestError) as caught:
        read(uri)
    return str(caught.value)


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_single_file_is_a_manifest_and_its_images_lie_beside_it(write: Callable[..., str]) -> None:
    folder = write({"a.parquet": requests_table(3), "b.PARQUET": requests_table(2), "noextension": requests_table(1)})

    for name, num_rows in (("a.parquet", 3), ("b.PARQUET", 2), ("noextension", 1)):
        found = Manifest.open(f"{folder}/{name}")
        assert (found.num_rows, found.format, found.folder) == (num_rows, "parquet", Path(folder).as_uri())
        assert read(f"{folder}/{name}").equals(requests_table(num_rows))


@pytest.mark.parametrize("name", ["manifest", "requests.parquet"])
def test_a_folder_is_read_whole_in_the_order_of_its_names(write: Callable[..., str], name: str) -> None:
    whole = requests_table(6)
    folder = write(
        {f"{name}/b/x.pq": whole.slice(2, 3), f"{name}/a.parquet": whole.slice(0, 2), f"{name}/c.PARQUET": whole[5:]}
    )

    found = Manifest.open(f"{folder}/{name}/")

    assert [Path(path).name for path in found.files] == ["a.parquet", "x.pq", "c.PARQUET"]
    assert found.folder == f"{Path(folder).as_uri()}/{name}"
    assert read(f"{folder}/{name}").equals(whole)


def test_hidden_files_folders_and_other_files_are_passed_over(write: Callable[..., str]) -> None:
    bad = b"not a manifest"
    folder = write(
        {
            "part.parquet": requests_table(1),
            "_SUCCESS": bad,
            "_temporary/part.parquet": bad,
            "x/.part.parquet.crc": bad,
            "x/.hidden.parquet": bad,
            ".git/part.csv": bad,
            "_metadata.parquet": bad,
            "images/0.png": bad,
            "README.md": bad,
        }
    )

    assert ids(folder) == ["r000"]


def test_a_manifest_below_a_hidden_folder_can_be_named(write: Callable[..., str]) -> None:
    assert ids(write({"_tmp/.x/part.parquet": requests_table(1)}) + "/_tmp/.x") == ["r000"]


def test_folders_of_hive_partitions_are_columns(write: Callable[..., str]) -> None:
    folder = write(
        {
            "day=2026-11-22/zone=a%20b/part.parquet": requests_table(1),
            "day=2026-11-23/zone=c=d/part.parquet": requests_table(1),
        }
    )

    rows = read(folder)

    assert rows["day"].to_pylist() == ["2026-11-22", "2026-11-23"]
    assert rows["zone"].to_pylist() == ["a b", "c=d"]
    assert read(folder, ["request_id"]).column_names == ["request_id"]
    assert read(folder, ["zone"])["zone"].to_pylist() == ["a b", "c=d"]


@pytest.mark.parametrize("name", ["negative_prompt", "format", "seed", "zone"])
def test_the_default_partition_means_null(write: Callable[..., str], name: str) -> None:
    folder = write(
        {
            f"{name}=__HIVE_DEFAULT_PARTITION__/part.parquet": requests_table(1),
            f"{name}=__HIVE_DEFAULT_PARTITION__x/part.parquet": requests_table(1),
        }
    )

    assert read(folder)[name].to_pylist() == [None, "__HIVE_DEFAULT_PARTITION__x"]


def test_a_partition_may_be_a_setting(write: Callable[..., str]) -> None:
    assert read(write({"format=gif/part.parquet": requests_table(1)}))["format"].to_pylist() == ["gif"]


def test_paths_may_be_relative_or_hold_dots_spaces_and_percent_signs(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({"a b%20c#d/part.parquet": requests_table(1)})
    monkeypatch.chdir(tmp_path)

    for path in ("a b%20c#d", "./a b%20c#d/", "a b%20c#d/../a b%20c#d", (tmp_path / "a b%20c#d").as_uri()):
        assert ids(path) == ["r000"]


# --- Parquet --------------------------------------------------------------------------------------------------------


def test_integer_types_may_drift_from_file_to_file(write: Callable[..., str]) -> None:
    folder = write(
        {
            "a.parquet": requests_table(1, width=pa.array([64], pa.int32()), seed=pa.array([None], pa.null())),
            "b.parquet": requests_table(1, width=pa.array([72], pa.int64()), seed=pa.array([2**60 + 1])),
            "c.parquet": requests_table(1, width=pa.array([80], pa.uint16())),
        }
    )

    rows = read(folder)

    assert rows["width"].to_pylist() == [64, 72, 80]
    assert rows["seed"].to_pylist() == [None, 2**60 + 1, None]


def test_a_column_of_a_later_file_is_null_before(write: Callable[..., str]) -> None:
    folder = write({"a.parquet": requests_table(2), "b.parquet": requests_table(1, zone=["x"], fps=[3.0])})

    rows = read(folder)

    assert rows["zone"].to_pylist() == [None, None, "x"]
    assert rows["fps"].to_pylist() == [None, None, 3.0]


@pytest.mark.parametrize("columns", [["request_id"], ["zone"], None])
def test_rows_of_a_file_without_any_wanted_column_are_rows_all_the_same(
    write: Callable[..., str], columns: list[str] | None
) -> None:
    folder = write({"a.parquet": pa.table({"prompt": ["p", "q"]}), "b.parquet": requests_table(1, zone=["x"])})

    assert len(read(folder, columns)) == 3


@pytest.mark.parametrize(
    "text",
    [
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array(["x", "y"], pa.large_string()),
        pa.array(["x", "y"]).cast(pa.string_view()),
    ],
    ids=lambda text: str(text.type)[:12],
)
def test_texts_are_texts_whatever_their_encoding(write: Callable[..., str], text: pa.Array) -> None:
    rows = read(write({"a.parquet": requests_table(2, prompt=text, zone=text)}))

    assert rows.take([1])["zone"].to_pylist() == ["y"]
    assert rows["zone"].type == rows["prompt"].type
    assert rows["zone"].type in (pa.string(), pa.large_string())


def test_a_required_column_may_be_missing_from_a_later_file(write: Callable[..., str]) -> None:
    required = requests_table(1, zone=["x"]).cast(
        pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("request_id", "image", "prompt", "zone")])
    )

    rows = read(write({"a.parquet": required, "b.parquet": requests_table(1)}))

    assert rows["zone"].to_pylist() == ["x", None]
    assert all(field.nullable for field in rows.schema)


def test_batches_know_their_file_and_their_place_in_it(write: Callable[..., str]) -> None:
    count = BATCH_ROWS_WITH_BYTES + 3
    table = requests_table(count, image_bytes=[b"x"] * count)
    folder = write({"a.parquet": table, "b.parquet": table})

    found = [(batch.file[-9:], batch.first_row, batch.ordinal) for batch in Manifest.open(folder).batches()]

    assert found == [
        ("a.parquet", 0, 0),
        ("a.parquet", count - 3, count - 3),
        ("b.parquet", 0, count),
        ("b.parquet", count - 3, 2 * count - 3),
    ]


def test_values_that_do_not_fit_the_type_of_the_other_files_are_refused(write: Callable[..., str]) -> None:
    folder = write({"a.parquet": requests_table(1, seed=[2**60 + 1]), "b.parquet": requests_table(1, seed=[1.0])})

    assert "column 'seed' is int64 here, and double with the other files" in refusal(folder)


@pytest.mark.parametrize(
    ("first", "second", "types"),
    [
        (pa.array([1]), pa.array(["1"]), ("int64", "string")),
        (pa.array(["x"]), pa.array([True]), ("string", "bool")),
        (pa.array([[1.0]]), pa.array([1.0]), ("list<", "double")),
        (pa.array([b"x"]), pa.array([1]), ("binary", "int64")),
    ],
)
def test_types_that_contradict_each_other_are_refused_with_column_files_and_types(
    write: Callable[..., str], first: pa.Array, second: pa.Array, types: tuple[str, str]
) -> None:
    fine = requests_table(1)
    folder = write(
        {
            "a.parquet": fine,
            "b.parquet": fine.append_column("zone", first),
            "c.parquet": fine.append_column("zone", second),
        }
    )

    message = refusal(folder)

    assert message.startswith(f"manifest files disagree on column 'zone': {types[0]}")
    assert f"in {folder}/b.parquet, {types[1]}" in message
    assert f"in {folder}/c.parquet; write it with one type" in message


@pytest.mark.parametrize(
    ("types", "unified"),
    [
        ((pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())), pa.large_string()),
        ((pa.binary(), pa.large_binary(), pa.binary_view()), pa.large_binary()),
        ((pa.int8(), pa.uint8(), pa.int64(), pa.null()), pa.int64()),
        ((pa.float32(), pa.int32(), pa.float64()), pa.float64()),
        ((pa.list_(pa.float32()), pa.null(), pa.list_(pa.float64())), pa.list_(pa.float64())),
        ((pa.timestamp("ms"), pa.timestamp("us")), pa.timestamp("us")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_encodings_and_widths_of_one_kind_of_value_become_one(
    write: Callable[..., str], types: tuple[pa.DataType, ...], unified: pa.DataType
) -> None:
    files = {f"{k}.parquet": requests_table(1, zone=pa.nulls(1, one)) for k, one in enumerate(types)}
    backwards = {f"{k}.parquet": requests_table(1, zone=pa.nulls(1, one)) for k, one in enumerate(types[::-1])}

    assert read(write(files))["zone"].type == unified
    assert read(write(backwards))["zone"].type == unified


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_two_schemas_are_one_or_a_contradiction_that_names_column_and_file(
    tmp_path: Path, data: st.DataObject
) -> None:
    some = st.sampled_from(
        [
            *(pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.null(), pa.string()),
            *(pa.large_binary(), pa.binary(3), pa.date32(), pa.timestamp("ns"), pa.decimal128(9, 2), pa.time32("s")),
            *(pa.list_(pa.int64()), pa.list_(pa.string()), pa.struct([("a", pa.int64())])),
            *(pa.struct([("b", pa.string())]), pa.map_(pa.string(), pa.int64())),
        ]
    )
    for name in ("a", "b"):
        table = requests_table(1)
        for column in ("x", "y"):
            if data.draw(st.booleans()):
                table = table.append_column(pa.field(column, one := data.draw(some), nullable=True), pa.nulls(1, one))
        pq.write_table(table, tmp_path / f"{name}.parquet")

    try:
        rows = read(str(tmp_path))
    except ManifestError as err:
        assert "column '" in str(err)  # noqa: PT017 - either is fine
        assert ".parquet" in str(err)  # noqa: PT017
    else:
        assert len(rows) == 2


def test_text_that_is_no_utf8_is_refused(write: Callable[..., str]) -> None:
    offsets = pa.py_buffer(np.array([0, 1], np.int32))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff")])

    message = refusal(write({"a.parquet": requests_table(1, prompt=broken)}))

    assert "a.parquet" in message
    assert "UTF8" in message


@pytest.mark.parametrize("damage", ["truncated", "nothing", "garbage", "page"])
def test_a_corrupt_file_is_refused_by_name(write: Callable[..., str], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "whole" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(requests_table(1000), path, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    if damage == "page":
        data[len(data) // 3] ^= 0xFF
    content = {"truncated": data[:-20], "nothing": b"", "garbage": b"PAR1 is how it starts PAR1", "page": data}[damage]

    message = refusal(write({"damaged/a.parquet": bytes(content)}) + "/damaged")

    assert message.startswith(f"cannot read manifest {tmp_path}/damaged/a.parquet")


@pytest.mark.parametrize(
    ("manifest", "output", "inside"),
    [
        ("in", "in", True),
        ("in", "in/", True),
        ("in", "in/out", True),
        ("in/", "in/deep/down", True),
        ("in", "in/_out", False),  # what begins so is not read
        ("in", "in/a/.out", False),
        ("in", "inside", False),
        ("in", "out", False),
        ("in/day=1", "in", False),
        ("in/day=1/a.parquet", "in/day=1", False),
        ("in/day=1/a.parquet", "in/day=1/out", False),
    ],
)
def test_an_output_that_would_be_read_as_requests_is_refused(
    manifest: str, output: str, inside: bool, write: Callable[..., str]
) -> None:
    folder = write({"in/day=1/a.parquet": requests_table(1)})
    found = Manifest.open(f"{folder}/{manifest}")

    with pytest.raises(ConfigError, match="lies inside the folder") if inside else nullcontext():
        refuse_output_inside(found, f"{folder}/{output}")


class _Answers(BaseHTTPRequestHandler):
    """Answers `/403.parquet` with 403."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/").removesuffix(".parquet")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    with serving(_Answers) as address:
        yield address


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, "manifest URI does not exist; correct its path or URI"),
        (410, "manifest URI does not exist; correct its path or URI"),
        (403, "cannot read manifest URI: the server answers 403 Forbidden; over http nothing but the URL is sent"),
        (401, "cannot read manifest URI: the server answers 401 Unauthorized; over http nothing but the URL is sent"),
        (500, "cannot read manifest URI: the server answers 500 Internal Server Error; it is the server that fails"),
    ],
)
def test_what_a_web_server_answers_in_place_of_a_manifest_is_told(web_server: str, status: int, told: str) -> None:
    uri = f"{web_server}/{status}.parquet"

    assert refusal(uri).startswith(told.replace("URI", uri, 1))


def test_a_web_server_that_nobody_can_reach_is_told_as_such() -> None:
    message = refusal(f"http://127.0.0.1:{free_port()}/m.parquet")

    assert "Cannot connect to host 127.0.0.1" in message
    assert message.endswith("; correct the host and the port, or start the server")


def test_a_manifest_with_a_signature_in_its_uri_is_told_without_it() -> None:
    for uri in ("memory://nowhere?sig=secret", "https://host.invalid/x.parquet?X-Amz-Signature=secret"):
        assert "secret" not in refusal(uri)


# --- Parquet files that are built to harm ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_files() -> list[bytes]:
    """Good files of every encoding and compression."""
    table = requests_table(
        40, seed=list(range(40)), motion_curve=[[1.0, 0.5]] * 40, zone=[None, "x"] * 20, image_bytes=[None, b"abc"] * 20
    )
    files = []
    for compression in ("none", "snappy", "zstd", "gzip"):
        for version in ("1.0", "2.0"):
            sink = io.BytesIO()
            pq.write_table(
                table,
                sink,
                compression=compression,
                data_page_version=version,
                row_group_size=15,
                use_dictionary=version == "1.0",
            )
            files.append(sink.getvalue())
    return files


FUZZ = int(os.environ.get("PIA_BATCH_FUZZ", "300"))


def test_any_damage_to_parquet_gives_rows_or_a_manifest_error_and_nothing_else(
    tmp_path: Path, small_files: list[bytes]
) -> None:
    rng = random.Random(20261123)
    path = tmp_path / "a.parquet"
    outcomes = {"rows": 0, "refused": 0}

    for _ in range(FUZZ):
        data = bytearray(rng.choice(small_files))
        for _ in range(rng.randint(1, 3)):
            # Half of the time in the footer, which is at the end.
            at = rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(len(data) // 4)
            kind = rng.randrange(6)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.randint(1, 30)]
            elif kind == 3:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", bytes(4), b"\xff" * 4, b"\x80\x80\x80\x10"])
            elif kind == 4:
                other = rng.choice(small_files)
                start = rng.randrange(len(other))
                data[at : at + rng.randint(0, 60)] = other[start : start + rng.randint(1, 200)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 50)]
        path.write_bytes(data)
        try:
            for batch in Manifest.open(str(path)).batches():
                batch.table.validate(full=True)
            outcomes["rows"] += 1
        except ManifestError as err:
            outcomes["refused"] += 1
            assert str(path) in str(err) or tmp_path.as_uri() in str(err)  # noqa: PT017 - either is fine

    assert min(outcomes.values()) > FUZZ / 100


def written(path: Path, table: pa.Table, **options: Any) -> str:
    """As others than pyarrow write: without the Arrow schema, so that a dictionary is a matter of encoding."""
    pq.write_table(table, path, compression="zstd", store_schema=False, **options)
    return str(path)


def test_a_value_that_a_million_rows_share_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    count = 200_000
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * 500_000]))
    table = pa.table({"request_id": pa.array(range(count)), "image": pa.nulls(count, pa.string()), "prompt": shared})
    path = written(tmp_path / "a.parquet", table)
    assert Path(path).stat().st_size < 2**20

    assert "31250 MiB of text and bytes in the rows 0 to 65535; at most 2048 MiB are read" in refusal(path)
    assert peak_mib(path) < 400


def test_long_values_that_rows_share_come_in_batches_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "SLICE_BYTES", 2**20)
    count = 3000
    shared = pa.DictionaryArray.from_arrays(
        pa.array(np.arange(count, dtype=np.int32) % 3), pa.array(["x" * 3000, "y" * 500, "z" * 2_000_000])
    )
    shared = pa.concat_arrays([shared.filter(pc.not_equal(shared.indices, 2)), shared.slice(2, 1)])
    count = len(shared)
    table = pa.table({"request_id": pa.array(range(count)), "image": pa.nulls(count, pa.string()), "prompt": shared})
    path = written(tmp_path / "a.parquet", table)

    batches = list(Manifest.open(path).batches())

    assert len(batches) == 5
    assert [batch.table["prompt"].nbytes < 1.1 * 2**20 for batch in batches] == [True] * 4 + [False]
    assert len(batches[-1].table) == 1
    assert [batch.ordinal for batch in batches] == [sum(len(b.table) for b in batches[:k]) for k in range(5)]
    assert [batch.first_row for batch in batches] == [batch.ordinal for batch in batches]
    assert pa.concat_tables([batch.table for batch in batches])["prompt"].to_pylist() == shared.to_pylist()
    assert len(list(Manifest.open(path).batches(["request_id"]))) == 1


def test_a_row_group_that_unpacks_to_more_than_a_machine_should_hold_is_refused_by_the_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 5000
    path = written(
        tmp_path / "a.parquet", requests_table(count, zone=pa.repeat("x" * 20_000, count)), use_dictionary=False
    )
    assert ids(path)[-1] == "r4999"
    monkeypatch.setattr(manifest_files, "MAX_EXPANDED_BYTES", 2**20)

    assert "row group 0 unpacks to 100" in refusal(path)
    assert "write it in smaller row groups" in refusal(path)


def test_more_rows_than_a_driver_can_plan_are_refused_by_the_footer(tmp_path: Path) -> None:
    table = pa.table({name: pa.nulls(10**6, pa.string()) for name in ("request_id", "image", "prompt")})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        writer.write_table(table)
    for k in range(201):
        os.link(tmp_path / "a.parquet", tmp_path / f"{k:03d}.parquet")
    (tmp_path / "a.parquet").unlink()

    assert "has 201000000 rows; split it into manifests of at most 200000000" in refusal(str(tmp_path))


def test_a_footer_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(2**30)
        file.seek(2**30 - 8)
        file.write((2**30 - 100).to_bytes(4, "little") + b"PAR1")

    assert "a.parquet has a footer of 1073741724 bytes" in refusal(str(path))


def test_text_files_that_would_not_fit_are_refused_by_their_size(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(300 * 2**20)

    assert "has 629145600 bytes of JSONL or CSV; above 536870912, write it as Parquet" in refusal(str(tmp_path))


def test_lists_nested_a_thousand_deep_are_refused(tmp_path: Path) -> None:
    deep = pa.int64()
    for _ in range(99):
        deep = pa.list_(deep)
    pq.write_table(requests_table(1, zone=pa.nulls(1, deep)), tmp_path / "a.parquet")

    assert "nested" in refusal(str(tmp_path))
    assert refusal(str(tmp_path)).startswith("cannot read manifest")


PEAK = """
import resource, sys
from pia_batch.errors import ManifestError
from pia_batch.manifest.reader import Manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for batch in Manifest.open(sys.argv[1]).batches():
        pass
except ManifestError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak_mib(uri: str) -> int:
    """What reading a manifest adds to a process's largest size."""
    done = subprocess.run([sys.executable, "-c", PEAK, uri], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_manifest_with_one_bad_row_in_a_hundred_is_read_whole_and_only_those_fail(tmp_path: Path) -> None:
    count = 30_000
    bad = {k: k % 7 for k in range(0, count, 100)}
    table = requests_table(count).to_pydict() | {
        "fps": [8.0] * count,
        "width": [64] * count,
        "image_sha256": [None] * count,
    }
    spoil: list[tuple[str, Any]] = [
        ("prompt", "  "),
        ("fps", float("nan")),
        ("width", 63),
        ("image", None),
        ("request_id", "a\x07"),
        ("image_sha256", "../x"),
        ("prompt", "x" * 10_000),
    ]
    for row, kind in bad.items():
        table[spoil[kind][0]][row] = spoil[kind][1]
    folder = tmp_path / "requests"
    folder.mkdir()
    for part in range(3):
        pq.write_table(pa.table(table).slice(part * 10_000, 10_000), folder / f"{part}.parquet", row_group_size=3000)

    plan = make_plan(RunConfig.load(None, {"manifest": str(folder), "output": str(tmp_path / "out")}))

    assert (plan.num_pending, plan.num_rejected) == (count - len(bad), len(bad))
    found = plan.rejected["error_kind"].value_counts().to_pylist()
    assert {item["values"]: item["counts"] for item in found} == {
        "missing_value": 43 + 43,
        "not_finite": 43,
        "out_of_range": 43 + 43,
        "invalid_id": 43,
        "invalid_value": 42,
    }


def test_a_file_that_went_away_is_refused_by_name(write: Callable[..., str], tmp_path: Path) -> None:
    found = Manifest.open(write({"a.parquet": requests_table(1)}))
    (tmp_path / "a.parquet").unlink()

    with pytest.raises(ManifestError, match=r"a\.parquet"):
        list(found.batches())


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "quoted.csv"])
def test_a_text_that_reads_like_a_missing_value_is_a_text_in_every_format(name: str, tmp_path: Path) -> None:
    words = ["None", "nan", "NULL", "NaT", "<NA>", "\\N", "null", "NaN"]
    table = requests_table(len(words), prompt=words, negative_prompt=words)
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        pyarrow.csv.write_csv(table, tmp_path / name)  # quotes all texts

    (rows,) = [batch.table for batch in Manifest.open(str(tmp_path / name)).batches()]

    checked = check(rows, RunConfig.load(None, {"manifest": "m", "output": "o"}), {"default": "e" * 32})
    assert checked.requests["prompt"].to_pylist() == words
    assert checked.requests["negative_prompt"].to_pylist() == words


# --- JSONL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_json_lines_are_rows_and_a_missing_value_is_null(write: Callable[..., str], name: str) -> None:
    text = (
        LINE + '\r\n\n  \n{"prompt": "q \\ud83d\\ude00\\u0000", "request_id": "b", "seed": 9007199254740993, '
        '"motion_curve": [1, 0.5], "zone": null, "fps": NaN}'
    )

    found = Manifest.open(write({name: codecs.BOM_UTF8 + text.encode()}))

    (batch,) = found.batches()
    assert found.format == "jsonl"
    assert batch.table.column_names == ["request_id", "image", "prompt", "seed", "motion_curve", "zone", "fps"]
    first, second = batch.table.to_pylist()
    assert first == dict.fromkeys(batch.table.column_names) | json.loads(LINE)
    assert (second["prompt"], second["image"], second["seed"]) == ("q 😀\0", None, 2**53 + 1)
    assert second["motion_curve"] == [1.0, 0.5]


def test_json_values_of_several_types_become_texts_to_be_judged(write: Callable[..., str]) -> None:
    rows = [{"seed": value, "zone": value} for value in (1, "x", 2.5, None, [1], {"a": True}, 10**30, "é")]
    text = "\n".join(json.dumps(json.loads(LINE) | row) for row in rows)

    table = read(write({"a.jsonl": text}))

    assert table["seed"].to_pylist() == ["1", "x", "2.5", None, "[1]", '{"a": true}', str(10**30), "é"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ('{"a": 1} x', "line 2: not JSON"),
        ("[1]", "line 2: each line must be one JSON object, such as"),
        ("null", "not a null"),
        (b"\xff", "line 2: not JSON"),
        ("[" * 100_000, "line 2: lists or objects are nested too deeply"),
        ("1" * 5000, "line 2: a number has more than 4300 digits"),
        (r'{"prompt": "\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_with_its_number(
    write: Callable[..., str], line: str | bytes, reason: str
) -> None:
    data = LINE.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode())

    message = refusal(write({"a.jsonl": data}))

    assert "a.jsonl" in message
    assert reason in message


# --- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_values_stay_texts_and_an_empty_field_is_null(write: Callable[..., str]) -> None:
    text = 'request_id,image,prompt,seed,zone\r\n007,a.png,"two\nlines, ""quoted""",,1e3\n8,,a NULL,nan,""\n'

    found = Manifest.open(write({"a.csv": codecs.BOM_UTF8 + text.encode()}))

    (batch,) = found.batches()
    assert found.format == "csv"
    assert batch.table.to_pylist() == [
        {"request_id": "007", "image": "a.png", "prompt": 'two\nlines, "quoted"', "seed": None, "zone": "1e3"},
        {"request_id": "8", "image": None, "prompt": "a NULL", "seed": None, "zone": ""},
    ]


def test_a_csv_larger_than_any_buffer_may_have_line_breaks_in_its_values(write: Callable[..., str]) -> None:
    prompt = "a red circle,\nmoving left; " * 10
    text = "".join(f'{k},a.png,"{prompt}{k}"\n' for k in range(8000))
    assert len(text) > 2 * 2**20

    table = read(write({"a.csv": "request_id,image,prompt\n" + text}))

    assert table["prompt"].to_pylist() == [f"{prompt}{k}" for k in range(8000)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("request_id,image,prompt\n1,2\n", "Expected 3 columns, got 2: 1,2"),
        ("request_id,image,prompt\n1,2,3,4\n", "Expected 3 columns, got 4"),
        ("", "Empty CSV"),
        ("request_id,image,prompt\n1,2,\xe9\n".encode("latin1"), "line 2: column 'prompt' has text that is not UTF-8"),
        ("request_id,image,prompt,zone,zone\n1,2,3,4,5\n", "more than one column 'zone'"),
    ],
)
def test_a_csv_that_is_no_table_is_refused(write: Callable[..., str], content: str | bytes, reason: str) -> None:
    assert reason in refusal(write({"a.csv": content}))


# --- what is refused in every format --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "has no file that ends in .parquet, .pq, .parq, .jsonl, .ndjson, .csv"),
        ({"a.txt": "x", "_a.csv": "y"}, "has no file that ends in"),
        ({"a.csv": "x", "b.jsonl": LINE}, "has files of several formats, csv and jsonl"),
        ({"a.parquet": requests_table(0)}, "has no rows"),
        ({"a.csv": "request_id,image,prompt\n"}, "has no rows"),
        ({"a.csv": '"1","a.png","a cat"\n'}, "has no column 'request_id' and no column 'prompt' and no"),
        (
            {"a.parquet": pa.table({f"c{k}": [1] for k in range(1001)})},
            "has 1001 columns; at most 1000 are read",
        ),
        ({"a.csv": ",".join(f"c{k}" for k in range(1001)) + "\n" + "x," * 1000}, "has 1001 columns; at most 1000"),
        (
            {"a.jsonl": "\n".join(f'{{"c{k}": {k}}}' for k in range(2000))},
            "line 1001: more than 1000 different names; are they values?",
        ),
        ({"a.jsonl": "\n\n"}, "has no rows"),
        (
            {"a.parquet": requests_table(1).drop_columns(["prompt"])},
            "has no column 'prompt'; it has: request_id, image",
        ),
        ({"a.parquet": requests_table(1).drop_columns(["image"])}, "has no column 'image'"),
        ({"a.jsonl": '{"x": 1}'}, "has no column 'request_id' and no column 'prompt' and no column 'image'; it has: x"),
        ({"a.csv": "Request_ID,image,prompt\n1,2,3\n"}, "has no column 'request_id'"),
        ({"a.parquet": requests_table(1, key=["k"])}, "column 'key' has the name of a result column; rename it"),
        ({"status=x/a.parquet": requests_table(1)}, "column 'status' has the name of a result column"),
        (
            {"a.parquet": pa.table([["x"]] * 4, names=["request_id", "image", "prompt", "prompt"])},
            "has more than one column 'prompt'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_a_manifest_that_cannot_be_one_is_refused_with_the_reason(
    write: Callable[..., str], tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    write(files)

    message = refusal(str(tmp_path))

    assert str(tmp_path) in message
    assert reason in message


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_column_may_have_a_name_that_a_result_needs(write: Callable[..., str], name: str) -> None:
    assert f"column '{name}' has the name of a result column" in refusal(
        write({"a.parquet": requests_table(1, **{name: [1]})})
    )


def test_either_image_column_is_enough(write: Callable[..., str]) -> None:
    table = requests_table(1, image_bytes=[b"x"]).drop_columns(["image"])

    assert read(write({"a.parquet": table})).equals(table.cast(read(write({"a.parquet": table})).schema))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("/nowhere/at/all", "manifest file:///nowhere/at/all does not exist"),
        ("memory://nowhere", "cannot read manifest memory://nowhere: scheme 'memory' is not supported"),
        ("foo://bucket/x", "cannot read manifest foo://bucket/x: "),
    ],
)
def test_a_manifest_that_is_not_there_is_refused(uri: str, reason: str) -> None:
    assert refusal(uri).startswith(reason)


def test_a_store_that_does_not_answer_is_told_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        def get_file_info(self, path: str) -> None:
            msg = f"no route to https://me:secret@host/{path}?sign=secret"
            raise RuntimeError(msg)

    monkeypatch.setattr(filesystems, "arrow_filesystem", lambda uri: (Down(), uri.removeprefix("s3://")))

    assert refusal("s3://bucket/x") == "cannot read manifest s3://bucket/x: no route to https://host/bucket/x"


# --- conforming -----------------------------------------------------------------------------------------------------


def test_conform_gives_the_columns_of_a_schema_in_its_order_and_types() -> None:
    schema = pa.schema(
        [("day", pa.string()), ("seed", pa.int64()), ("prompt", pa.large_string()), ("fps", pa.float64())]
    )
    table = pa.table({"prompt": ["a", "b"], "seed": pa.array([1, None], pa.int8()), "other": [1, 2]})

    made = conform(table, schema, {"day": "monday", "prompt": "unused"})

    assert made.schema.equals(schema)
    assert made.to_pylist() == [
        {"day": "monday", "seed": 1, "prompt": "a", "fps": None},
        {"day": "monday", "seed": None, "prompt": "b", "fps": None},
    ]


# --- S3 -------------------------------------------------------------------------------------------------------------


def put(uri: str, data: bytes) -> None:
    filesystem, path = filesystems.arrow_filesystem(uri)
    with filesystem.open_output_stream(path) as sink:
        sink.write(data)


@pytest.mark.s3
def test_a_parquet_folder_is_read_from_s3(s3: str, tmp_path: Path) -> None:
    pq.write_table(requests_table(2), tmp_path / "a.parquet")
    for name in ("day=1/a.parquet", "day=2/a.parquet", "_tmp/a.parquet"):
        put(f"{s3}/{name}", (tmp_path / "a.parquet").read_bytes())

    rows = read(s3)

    assert rows["request_id"].to_pylist() == ["r000", "r001"] * 2
    assert rows["day"].to_pylist() == ["1", "1", "2", "2"]
    assert Manifest.open(s3).folder == s3
    assert Manifest.open(f"{s3}/day=1/a.parquet").folder == f"{s3}/day=1"
    assert "does not exist" in refusal(f"{s3}/nothing")


@pytest.mark.s3
def test_json_lines_are_read_from_s3(s3: str) -> None:
    put(f"{s3}/requests.jsonl", LINE.encode())

    assert ids(f"{s3}/requests.jsonl") == ids(s3) == ["a"]


@pytest.mark.parametrize(("extra", "complete"), [(-1, [True, False]), (0, [True, False]), (1, [True, True])])
def test_lists_are_read_in_full_up_to_a_number_of_bytes(
    tmp_path: Path, extra: int, complete: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        table = requests_table(3, request_id=[f"{number}{k}" for k in range(3)], tags=[["a"], ["b"], ["c"]])
        pq.write_table(table, tmp_path / f"{number}.parquet")
    run = RunConfig.load(None, {"manifest": str(tmp_path), "output": str(tmp_path.with_name("out"))})
    read, check_readable = [], Manifest._check_readable

    def recorded(*arguments: Any, complete: bool) -> int:
        read.append((complete, check_readable(*arguments, complete=complete)))
        return read[-1][1]

    monkeypatch.setattr(Manifest, "_check_readable", recorded)
    make_plan(run)
    size = read[0][1]
    read.clear()
    monkeypatch.setattr(reader, "CHECKED_BYTES", size + extra)

    make_plan(run)

    assert [each for each, _ in read] == complete


TEXT_ENCODINGS = ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN", "RLE_DICTIONARY")
"""Encodings of texts in Parquet; those of version 2 of the format cannot be read as dictionaries."""


@pytest.mark.parametrize("encoding", TEXT_ENCODINGS)
def test_texts_in_every_encoding_of_parquet_are_read(encoding: str, tmp_path: Path) -> None:
    table = requests_table(1000, note=[f"{k:08x}" if k % 3 else None for k in range(1000)])
    table = table.append_column("raw", table["request_id"].cast(pa.binary()))
    table = table.append_column("meta", pa.StructArray.from_arrays([table["prompt"].combine_chunks()], ["text"]))
    columns = [*table.column_names[:-1], "meta.text"]
    own = {} if encoding == "RLE_DICTIONARY" else {"column_encoding": dict.fromkeys(columns, encoding)}
    pq.write_table(table, tmp_path / "m.parquet", use_dictionary=not own, row_group_size=300, **own)

    assert read(str(tmp_path)).select(table.column_names).equals(table)


def test_texts_whose_encoding_changes_within_a_file_are_read_once_each(tmp_path: Path) -> None:
    table = requests_table(900)
    schema = table.schema
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        writer.write_table(table.slice(0, 400))
    with pq.ParquetWriter(
        tmp_path / "b.parquet",
        schema,
        use_dictionary=["image"],
        column_encoding={"request_id": "DELTA_BYTE_ARRAY", "prompt": "DELTA_LENGTH_BYTE_ARRAY"},
    ) as writer:
        writer.write_table(table.slice(400), row_group_size=100)

    assert read(str(tmp_path))["request_id"].equals(table["request_id"])


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_a_table_that_duckdb_writes_is_read_in_both_versions_of_its_parquet(version: str, tmp_path: Path) -> None:
    rows = (
        "select i::varchar request_id, 'a.png' image, 'number ' || i prompt, i::double score, i::hugeint huge "
        "from range(3000) t(i)"
    )
    target = f"'{tmp_path / 'm.parquet'}' (format parquet, parquet_version {version})"
    duckdb.sql(f"copy ({rows}) to {target}")

    found = read(str(tmp_path))

    assert found["request_id"].to_pylist() == [str(k) for k in range(3000)]
    assert found["prompt"].to_pylist() == [f"number {k}" for k in range(3000)]
    assert found["score"].to_pylist() == [float(k) for k in range(3000)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("row", [0, 299, 300, 999])
@pytest.mark.parametrize("name", ["request_id", "image", "prompt", "note"])
def test_the_row_and_the_column_of_a_text_that_is_not_utf8_are_named(
    name: str, row: int, kind: pa.DataType, tmp_path: Path
) -> None:
    table = requests_table(1000, note=["n"] * 1000)
    values = [text.encode() for text in table[name].to_pylist()]
    values[row:] = [values[row] + b"\xff", *values[row + 1 :]]
    stored = pa.array(values, pa.binary() if kind == pa.string() else pa.large_binary()).view(kind)
    table = table.set_column(table.column_names.index(name), name, stored)
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=300)

    with pytest.raises(ManifestError) as refused:
        read(str(tmp_path))

    wanted = f"m.parquet, row {row}: column '{name}': Invalid UTF8 sequence; write the texts as UTF-8, or drop"
    assert wanted in str(refused.value)


def test_a_time_beyond_the_day_is_refused_by_row_and_column(tmp_path: Path) -> None:
    times = pa.array([1, 86_400_000_000], pa.int64()).view(pa.time64("us"))
    pq.write_table(requests_table(2, at=times), tmp_path / "m.parquet")

    with pytest.raises(ManifestError, match=r"m\.parquet, row 1: column 'at': time64\[us\] 86400000000 is not within"):
        read(str(tmp_path))


DECIMALS = pa.decimal128(20, 2)


@pytest.mark.parametrize(
    ("one", "two", "read_as"),
    [
        ([Decimal("1.25")], pa.array([2**62]), None),
        ([Decimal("1.25")], pa.array([5]), [Decimal("1.25"), Decimal(5)]),
        (pa.array([Decimal("1.5")], pa.decimal128(3, 1)), pa.array([20], pa.uint8()), [Decimal("1.5"), Decimal(20)]),
        (pa.array([Decimal("1.5")], pa.decimal128(3, 1)), pa.array([200], pa.uint8()), None),
        (pa.array([Decimal("1.25")], DECIMALS), pa.array([0.1]), [1.25, 0.1]),
        (pa.array([Decimal("0.1")], DECIMALS), pa.array([0.5]), [0.1, 0.5]),
        (pa.array([Decimal("0.1")], pa.decimal128(38, 20)), pa.array([0.5], pa.float32()), None),
        (pa.array([Decimal("12345678901234567.01")], DECIMALS), pa.array([0.5]), None),
        (pa.array([[Decimal("12345678901234567.01")]]), pa.array([[0.5]]), None),
    ],
)
def test_decimals_next_to_other_numbers_keep_their_values_or_are_refused(
    one: Any, two: Any, read_as: list[Any] | None, tmp_path: Path
) -> None:
    for name, values in (("a", one), ("b", two)):
        pq.write_table(requests_table(1, request_id=[name], price=values), tmp_path / f"{name}.parquet")

    if read_as is not None:
        assert read(str(tmp_path))["price"].to_pylist() == read_as
        return
    with pytest.raises(ManifestError, match=r"column 'price' is .* with the other files: .*; write it with one type"):
        read(str(tmp_path))


def test_a_setting_that_one_file_has_as_decimals_and_another_as_floats_is_read(tmp_path: Path) -> None:
    strengths = {"a": pa.array([Decimal("0.1")]), "b": pa.array([0.5], pa.float32())}
    for name, values in strengths.items():
        pq.write_table(requests_table(1, request_id=[name], strength=values), tmp_path / f"{name}.parquet")

    assert read(str(tmp_path))["strength"].to_pylist() == [pytest.approx(0.1), 0.5]


@pytest.mark.parametrize(
    ("contents", "remedy"),
    [
        (b"", "remove it, or write it again"),
        (b"PAR1PAR1", "the file is damaged; write or copy it again"),
    ],
)
def test_a_parquet_file_that_is_none_is_refused_with_a_remedy(contents: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(contents)

    with pytest.raises(ManifestError, match=remedy):
        Manifest.open(str(tmp_path))
