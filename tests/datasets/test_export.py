"""Exports are read by the libraries for which they are made, resumed after any end, and checked on the way."""

from __future__ import annotations

import hashlib
import json
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import lance
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import webdataset
from deltalake import DeltaTable
from finished_outputs import FRAMES, animation, make_output, poster
from hypothesis import given
from hypothesis import strategies as st
from journals import key as key_of

from pia_batch import export
from pia_batch.datasets import export_formats
from pia_batch.datasets.export_folder import MAX_NAME_BYTES, safe_name
from pia_batch.datasets.export_parquet import feature
from pia_batch.datasets.export_plan import ShardSize
from pia_batch.datasets.export_table import FORMATS
from pia_batch.errors import AccountingError, ConfigError, InterruptedRunError
from pia_batch.journal.layout import animation_name, poster_name
from pia_batch.media import codecs
from pia_batch.schema.dataset_columns import held_type
from pia_batch.storage.object_store import Store

pytestmark = pytest.mark.usefixtures("local_ray")

NUM = 8


@pytest.fixture
def output(tmp_path: Path) -> str:
    """An output with MP4 files, a carried column, and a request that failed."""
    place = str(tmp_path / "out")
    make_output(
        Store(place), ["mp4"] * NUM, failed=1, carried=pa.table({"shop": [f"s{k % 2}" for k in range(NUM + 1)]})
    )
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(tmp_path: Path, *arguments: Any, **options: Any) -> Any:
    return datasets.load_dataset(*arguments, split="train", cache_dir=str(tmp_path / "cache"), **options)


def number_of(request_id: str) -> int:
    return int(request_id.removeprefix("r"))


# --- other people's libraries -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_webdataset_reads_each_animation_with_its_columns_and_its_prompt(output: str, tmp_path: Path) -> None:
    summary = export(output, str(tmp_path / "to"), "webdataset", shard_size="3")

    assert (summary.rows, summary.shards, summary.written) == (NUM, 3, 3)
    urls = sorted(map(str, (tmp_path / "to").glob("part-*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["request_id"] for sample in samples] == [f"r{k:03d}" for k in range(NUM)]
    for sample in samples:
        number = number_of(sample["json"]["request_id"])
        assert sample["mp4"] == animation(number, "mp4")
        assert sample["txt"] == f"prompt {number}"
        assert sample["json"]["shop"] == f"s{number % 2}"
        assert "." not in sample["__key__"]


@pytest.mark.long
@pytest.mark.parametrize(("formats", "column"), [(["mp4"] * 5, "video"), (["gif", "webp", "gif"], "image")])
def test_datasets_reads_parquet_with_its_own_type_of_the_media(formats: list[str], column: str, tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), formats)
    export(str(tmp_path / "out"), str(tmp_path / "to"), "parquet", shard_size="2")

    dataset = load(tmp_path, "parquet", data_files=str(tmp_path / "to" / "part-*.parquet"))

    kind = {"video": datasets.Video, "image": datasets.Image}[column]
    assert isinstance(dataset.features[column], kind)
    for row in dataset.cast_column(column, kind(decode=False)):
        number = number_of(row["request_id"])
        assert row[column]["bytes"] == animation(number, formats[number])
        assert row[column]["path"] == f"{row['key']}.{formats[number]}"
    if column == "image":
        assert dataset[0]["image"].n_frames == FRAMES


def test_a_folder_for_the_hub_loads_as_it_is(output: str, tmp_path: Path) -> None:
    export(output, str(tmp_path / "to"), "huggingface", shard_size="4", columns=["prompt", "image", "seed"])

    dataset = load(tmp_path, str(tmp_path / "to"))

    assert dataset.column_names == ["video", "request_id", "prompt", "condition_image", "seed"]
    assert isinstance(dataset.features["video"], datasets.Video)
    first = dataset.cast_column("video", datasets.Video(decode=False))[0]
    assert first["video"]["bytes"] == animation(0, "mp4")
    assert first["condition_image"] == "images/0.png"
    assert sorted(path.name for path in (tmp_path / "to" / "data").iterdir()) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    card = (tmp_path / "to" / "README.md").read_text()
    assert "8 animations" in card
    assert "| `seed` |" in card
    assert "| `shop` |" not in card


def test_lance_reads_columns_without_the_animations_and_each_animation_as_a_blob(output: str, tmp_path: Path) -> None:
    export(output, str(tmp_path / "to"), "lance", shard_size="3")

    dataset = lance.dataset(str(tmp_path / "to"))

    assert dataset.count_rows() == NUM
    rows = dataset.to_table(columns=["request_id", "prompt", "shop", "finished_at"]).to_pylist()
    assert [row["request_id"] for row in rows] == [f"r{k:03d}" for k in range(NUM)]
    blobs = [blob.readall() for blob in dataset.take_blobs("video", indices=list(range(NUM)))]
    assert blobs == [animation(k, "mp4") for k in range(NUM)]
    assert dataset.to_table(filter="motion > 5", columns=["request_id"]).num_rows == 2


def test_delta_reads_the_table(output: str, tmp_path: Path) -> None:
    export(output, str(tmp_path / "to"), "delta", shard_size="3")

    table = DeltaTable(str(tmp_path / "to"))

    assert table.version() == 0
    rows = pa.table(table.to_pyarrow_dataset().to_table()).sort_by("request_id").to_pylist()
    assert [row["video"] for row in rows] == [animation(k, "mp4") for k in range(NUM)]
    assert [row["shop"] for row in rows] == [f"s{k % 2}" for k in range(NUM)]
    assert rows[0]["file_name"] == f"{rows[0]['key']}.mp4"


def test_a_plain_folder_has_files_by_request_id_and_loads_too(tmp_path: Path) -> None:
    ids = ["cats/1", "cat-1#seed=2,motion_scale=1", "..", "a cat", "Ä", "con", "x" * 300]
    make_output(Store(str(tmp_path / "out")), ["mp4"] * len(ids), request_ids=ids)
    export(str(tmp_path / "out"), str(tmp_path / "to"), "folder", shard_size="2")

    found = {path.stem: path.read_bytes() for path in (tmp_path / "to").glob("*.mp4")}
    names = ["cats_1", "cat-1_seed=2,motion_scale=1", "_..", "a_cat", "Ä", "_con", "x" * 200]
    assert found == {name: animation(number, "mp4") for number, name in enumerate(names)}
    dataset = load(tmp_path, str(tmp_path / "to"))
    assert sorted(dataset["request_id"]) == sorted(ids)
    assert {"video", "prompt"} < set(dataset.column_names)
    paths = dataset.cast_column("video", datasets.Video(decode=False))["video"]
    assert {Path(value["path"]).stem for value in paths} == set(names)


@pytest.mark.parametrize("name", ["webdataset", "folder"])
def test_formats_without_a_column_for_the_media_take_a_mixture(name: str, tmp_path: Path) -> None:
    formats = ["mp4", "gif", "webp", "png_zip"]
    make_output(Store(str(tmp_path / "out")), formats)

    assert export(str(tmp_path / "out"), str(tmp_path / "to"), name).rows == 4
    if name == "folder":
        assert {path.suffix for path in (tmp_path / "to").glob("r0*")} == {".mp4", ".gif", ".webp", ".zip"}
        assert load(tmp_path, str(tmp_path / "to"))["file_name"][:] != []


@pytest.mark.parametrize("name", ["parquet", "lance", "delta", "huggingface"])
@pytest.mark.parametrize("formats", [["mp4", "gif"], ["png_zip"]])
def test_formats_with_one_type_of_media_refuse_a_mixture(name: str, formats: list[str], tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), formats)

    with pytest.raises(
        ConfigError, match=rf"--format {name}: .* there are 1 .*; give --transcode mp4, choose by --where"
    ):
        export(str(tmp_path / "out"), str(tmp_path / "to"), name)
    assert not (tmp_path / "to").exists()


def test_carried_columns_of_any_type_are_exported_in_every_format(tmp_path: Path) -> None:
    carried = pa.table(
        {
            "scores": pa.array([[("x", 1)], None], pa.map_(pa.string(), pa.int64())),
            "curve": pa.array([[1.5, float("nan")], []]),
            "nested": pa.array([{"a": [1], "b": {"c": "d"}}, None]),
            "price": pa.array([Decimal("1.00"), None], pa.decimal128(10, 2)),
            "day": pa.array([20_000, None], pa.int32()).cast(pa.date32()),
            "raw": pa.array([b"\x00\x01", None]),
        }
    )
    make_output(Store(str(tmp_path / "out")), ["gif", "gif"], carried=carried)
    for name in FORMATS:
        assert export(str(tmp_path / "out"), str(tmp_path / name), name).rows == 2

    (sample, _) = webdataset.WebDataset(str(tmp_path / "webdataset" / "part-00000.tar"), shardshuffle=False)
    row = json.loads(sample["json"])
    assert row["scores"] == [{"key": "x", "value": 1}]
    assert (row["curve"], row["nested"]) == ([1.5, None], {"a": [1], "b": {"c": "d"}})
    assert (row["price"], row["day"], row["raw"]) == ("1.00", "2024-10-04", "0001")
    assert load(tmp_path, str(tmp_path / "huggingface"))[0]["nested"] == {"a": [1], "b": {"c": "d"}}
    assert lance.dataset(str(tmp_path / "lance")).to_table(columns=["nested"]).to_pylist()[0]["nested"]["a"] == [1]
    delta = DeltaTable(str(tmp_path / "delta")).to_pyarrow_dataset().to_table(["scores"]).to_pylist()
    assert {"scores": [{"key": "x", "value": 1}]} in delta


def test_webdataset_has_texts_for_values_that_python_lacks(tmp_path: Path) -> None:
    far, unknown_zone = pa.array([10**7], pa.int32()).cast(pa.date32()), pa.timestamp("s", "Mars/Olympus")
    carried = pa.table({"day": far, "times": pa.array([[0]], pa.list_(unknown_zone))})
    make_output(Store(str(tmp_path / "out")), ["gif"], carried=carried)

    export(str(tmp_path / "out"), str(tmp_path / "webdataset"), "webdataset")

    (sample,) = webdataset.WebDataset(str(tmp_path / "webdataset" / "part-00000.tar"), shardshuffle=False)
    row = json.loads(sample["json"])
    assert (row["day"], row["times"]) == ("29349-01-26", ["1970-01-01T00:00:00+00:00"])


@pytest.mark.parametrize("zone", ["Mars/Olympus", "ABC", "+24:00", "Europe/Berlin", "+05:30", "UTC"])
def test_times_in_any_zone_have_one_that_python_knows(zone: str) -> None:
    written = pa.array([1, None], pa.timestamp("us", zone))
    listed = pa.array([[1], None], pa.list_(written.type))

    own, inner = written.cast(held_type(written.type)), listed.cast(held_type(listed.type))

    assert own.type.tz == inner.type.value_type.tz == ("UTC" if zone in ("Mars/Olympus", "ABC", "+24:00") else zone)
    assert [value and value.timestamp() for value in own.to_pylist()] == [1e-6, None]
    assert inner.to_pylist() == [[own[0].as_py()], None]


@pytest.mark.parametrize(("name", "data_type"), [("delta", pa.time64("us")), ("delta", pa.duration("s"))])
def test_a_column_that_a_format_cannot_hold_is_named_before_anything_is_written(
    name: str, data_type: pa.DataType, tmp_path: Path
) -> None:
    carried = pa.table({"odd": pa.array([1], pa.int64()).cast(data_type)})
    make_output(Store(str(tmp_path / "out")), ["gif"], carried=carried)

    with pytest.raises(ConfigError, match=f"--format {name} cannot hold the column odd .*; leave it out by --columns"):
        export(str(tmp_path / "out"), str(tmp_path / "to"), name)

    assert not (tmp_path / "to").exists()
    assert export(str(tmp_path / "out"), str(tmp_path / "to"), name, columns=["prompt"]).rows == 1


TYPES = [
    *(pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string()),
    *(pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(4), pa.date32(), pa.date64(), pa.time32("s")),
    *(pa.time64("us"), pa.timestamp("us", tz="UTC"), pa.timestamp("s"), pa.duration("ms"), pa.decimal128(10, 2)),
    *(pa.decimal256(40, 2), pa.list_(pa.int64()), pa.large_list(pa.string()), pa.list_(pa.float64(), 3)),
    *(pa.struct([("a", pa.list_(pa.struct([("b", pa.float32())])))]), pa.map_(pa.string(), pa.int64())),
    *(pa.uuid(), pa.dictionary(pa.int32(), pa.string()), pa.decimal32(5, 1), pa.list_view(pa.int8())),
]


@pytest.mark.parametrize("data_type", TYPES, ids=str)
def test_features_are_those_that_datasets_itself_gives_a_type(data_type: pa.DataType) -> None:
    held = held_type(data_type)
    assert held is not None
    wanted = datasets.Features.from_arrow_schema(pa.schema([("x", held)]))

    assert datasets.Features.from_dict({"x": feature(held)}) == wanted


# --- what is exported -------------------------------------------------------------------------------------------------


def exported_ids(folder: Path) -> list[str]:
    return sorted(pq.read_table(folder, columns=["request_id"])["request_id"].to_pylist())


def test_where_only_and_run_choose_the_rows(output: str, tmp_path: Path) -> None:
    make_output(Store(output), ["mp4", "mp4"], run_id="run-2", first=20, carried=pa.table({"shop": ["t", "t"]}))
    (tmp_path / "best.csv").write_text("request_id,score\nr001,2\nr007,3\nr999,1\nr001,2\n")

    export(output, str(tmp_path / "newest"), "parquet")
    export(output, str(tmp_path / "a"), "parquet", run_id="run-1", where="motion > 2 and shop == 's1'")
    summary = export(output, str(tmp_path / "b"), "parquet", run_id="run-1", only=str(tmp_path / "best.csv"))

    assert exported_ids(tmp_path / "newest") == ["r020", "r021"]
    assert exported_ids(tmp_path / "a") == ["r003", "r005", "r007"]
    assert exported_ids(tmp_path / "b") == ["r001", "r007"]
    assert summary.unknown == 1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_table_of_ids_may_be_parquet_or_jsonl(output: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"best.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"request_id": ["r002"]}), path)
    else:
        path.write_text('{"request_id": "r002"}\n')

    export(output, str(tmp_path / "to"), "parquet", only=str(path))

    assert exported_ids(tmp_path / "to") == ["r002"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, r"--format: invalid value \(got 'zip', expected one of webdataset, parquet"),
        ({"where": "motoin > 2"}, r"--where: .*motoin.*motion"),
        ({"where": "motion > 99"}, r"--where leave no animation to export from run run-1"),
        ({"columns": ["promt"]}, r"--columns: no column promt; there are request_id, prompt"),
        ({"shard_size": "0"}, r"--shard-size: invalid value \(got '0'"),
        ({"transcode": "avi"}, r"--transcode: invalid value \(got 'avi', expected one of mp4, gif, webp, webm\)"),
        ({"only": "/nowhere/ids.parquet"}, r"--only: .*nowhere/ids.parquet does not exist; correct its path or URI"),
        ({"run_id": "run-9"}, r"--run: run-9 has no complete results in .*; the newest ones are run-1's"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    output: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(output, str(tmp_path / "to"), **({"format": "parquet"} | options))

    assert not (tmp_path / "to").exists()


def test_a_table_without_ids_is_refused(output: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["r002"]}), tmp_path / "ids.parquet")
    with pytest.raises(ConfigError, match=r"--only: .*ids.parquet has no column request_id; it has id"):
        export(output, str(tmp_path / "to"), "parquet", only=str(tmp_path / "ids.parquet"))


def test_an_output_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no complete results; `pia-batch run` publishes them"):
        export(str(tmp_path / "nothing"), str(tmp_path / "to"), "parquet")


@pytest.mark.parametrize("to", ["", "/sub", "/.."])
def test_a_destination_that_overlaps_with_the_output_is_refused(output: str, to: str) -> None:
    with pytest.raises(ConfigError, match="overlaps with the output"):
        export(output, str(Path(output + to).resolve()), "parquet")


def test_names_that_become_the_same_file_are_refused(tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["mp4"] * 3, request_ids=["a/b", "c", "A_B"])

    with pytest.raises(
        ConfigError, match=r"--format folder: requests '(a/b|A_B)' and '(a/b|A_B)' have the same file name"
    ):
        export(str(tmp_path / "out"), str(tmp_path / "to"), "folder")

    assert export(str(tmp_path / "out"), str(tmp_path / "to"), "folder", where="request_id != 'A_B'").rows == 2


@pytest.mark.parametrize("transcode", ["mp4", "gif", "webp", "webm"])
def test_animations_are_transcoded_and_their_columns_say_so(tmp_path: Path, transcode: str) -> None:
    formats = ["gif", "webp", "png_zip", "mp4"]
    make_output(Store(str(tmp_path / "out")), formats)

    export(str(tmp_path / "out"), str(tmp_path / "to"), "folder", transcode=transcode)

    rows = pq.read_table(tmp_path / "to" / "metadata.parquet").to_pylist()
    for row in rows:
        data = (tmp_path / "to" / row["file_name"]).read_bytes()
        info = codecs.probe(data, transcode)
        assert (info.num_frames, round(info.num_frames / info.duration_s)) == (FRAMES, 8)
        assert (row["format"], row["num_bytes"]) == (transcode, len(data))
        if formats[number_of(row["request_id"])] == transcode:
            assert data == animation(number_of(row["request_id"]), transcode)
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("text", "rows", "num_bytes"),
    [("1", 1, None), ("1000", 1000, None), ("500MB", 100_000, 500_000_000), ("1.5 GiB", 100_000, 1_610_612_736)],
)
def test_shard_sizes_are_animations_or_bytes(text: str, rows: int, num_bytes: int | None) -> None:
    assert ShardSize.parse(text) == ShardSize(rows, num_bytes)


@pytest.mark.parametrize("text", ["", "-1", "0", "0MB", "1.5", "100001", "5 TB", "MB", "1e3", "500 M B"])
def test_other_shard_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard-size: invalid value"):
        ShardSize.parse(text)


@pytest.mark.long
def test_shards_are_cut_by_bytes_and_cross_the_parts_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pia_batch.journal.results.PART_ROWS", 3)
    make_output(Store(str(tmp_path / "out")), ["gif"] * 10)
    sizes = [len(animation(k, "gif")) for k in range(10)]

    export(str(tmp_path / "out"), str(tmp_path / "to"), "parquet", shard_size=f"{sum(sizes[:4])}B")

    shards = [pq.read_table(path)["request_id"].to_pylist() for path in sorted((tmp_path / "to").glob("part-*"))]
    assert [name for shard in shards for name in shard] == [f"r{k:03d}" for k in range(10)]
    assert len(shards[0]) == 4
    assert all(sum(sizes[number_of(name)] for name in shard) <= sum(sizes[:4]) for shard in shards)
    export(str(tmp_path / "out"), str(tmp_path / "each"), "parquet", shard_size="1B")
    assert len(list((tmp_path / "each").glob("part-*"))) == 10


# --- faults -----------------------------------------------------------------------------------------------------------

CHANGING = ("_transactions/", "_versions/", "_delta_log/")
"""Files into which other libraries write the time."""


@pytest.mark.long
@pytest.mark.parametrize("name", list(FORMATS))
def test_an_export_that_was_stopped_is_continued_to_the_same_files(output: str, tmp_path: Path, name: str) -> None:
    export(output, str(tmp_path / "whole"), name, shard_size="2")
    stop = threading.Event()

    def stop_early(done: int, _: int) -> None:
        if done:
            stop.set()

    with pytest.raises(InterruptedRunError, match="the export was stopped; start it again to continue"):
        export(output, str(tmp_path / "to"), name, shard_size="2", on_shard=stop_early, stop=stop)
    assert not (tmp_path / "to" / "_SUCCESS.json").exists()

    summary = export(output, str(tmp_path / "to"), name, shard_size="2")

    assert summary.written < summary.shards == 4
    found, whole = files(tmp_path / "to"), files(tmp_path / "whole")
    assert {key: data for key, data in found.items() if not key.startswith(CHANGING)} == {
        key: data for key, data in whole.items() if not key.startswith(CHANGING)
    }
    again = export(output, str(tmp_path / "to"), name, shard_size="2")
    assert (again.rows, again.num_bytes, again.written) == (summary.rows, summary.num_bytes, 0)
    assert files(tmp_path / "to") == found


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_death_after_any_object_is_continued_to_the_same_files(output: str, tmp_path: Path, name: str) -> None:
    """The objects of an export are written again one by one, as a death before each of them would leave them."""
    whole = tmp_path / "whole"
    export(output, str(whole), name, shard_size="4")
    wanted = files(whole)
    data = [key for key in wanted if key != "_SUCCESS.json"]
    for case, missing in enumerate(({"_SUCCESS.json"}, {"_SUCCESS.json", *data[:1]}, {"_SUCCESS.json", *data[1:]})):
        place = tmp_path / f"case-{case}"
        for key, content in wanted.items():
            if key not in missing:
                (place / key).parent.mkdir(parents=True, exist_ok=True)
                (place / key).write_bytes(content)
        (place / "_export").mkdir(parents=True, exist_ok=True)
        (place / f"{data[0]}#1").parent.mkdir(exist_ok=True)
        (place / f"{data[0]}#1").write_bytes(b"half of a file")
        identity = json.loads(wanted["_SUCCESS.json"])["export"]
        (place / "_export" / "options.json").write_text(json.dumps(identity))

        export(output, str(place), name, shard_size="4")

        found = files(place)
        assert {key for key in found if not key.startswith(CHANGING)} == {
            key for key in wanted if not key.startswith(CHANGING)
        }
        assert all(found[key] == wanted[key] for key in found if not key.startswith(CHANGING))


def test_an_animation_with_other_bytes_is_named_with_the_remedy(output: str, tmp_path: Path) -> None:
    store = Store(output)
    row = next(row for row in ds.dataset(Path(output) / "results" / "run-1").to_table().to_pylist() if row["seed"] == 3)
    name = animation_name(row["key"], "mp4")
    data = store.read(name)
    store.replace(name, data[:-1] + b"?")

    with pytest.raises(
        AccountingError, match=r"of request 'r003' has other bytes than its result states \(sha256\); `pia-batch verify"
    ):
        export(output, str(tmp_path / "to"), "webdataset")
    store.delete(name)
    with pytest.raises(AccountingError, match=r"of request 'r003' does not exist; `pia-batch verify"):
        export(output, str(tmp_path / "to"), "webdataset")
    assert not (tmp_path / "to" / "_SUCCESS.json").exists()
    store.replace(name, data)
    assert export(output, str(tmp_path / "to"), "webdataset").rows == NUM


def test_posters_are_exported_where_each_animation_is_a_file(tmp_path: Path) -> None:
    place = str(tmp_path / "out")
    make_output(Store(place), ["mp4", "gif", "mp4"], posters=[0, 1])

    export(place, str(tmp_path / "tars"), "webdataset")
    export(place, str(tmp_path / "plain"), "folder")
    export(place, str(tmp_path / "rows"), "parquet", where="format == 'mp4'")

    (tar,) = map(str, (tmp_path / "tars").glob("*.tar"))
    samples = list(webdataset.WebDataset(tar, shardshuffle=False))
    assert [sample.get("jpg") for sample in samples] == [poster(0), poster(1), None]
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.jpg")} == {
        f"r{number:03d}.jpg": poster(number) for number in range(2)
    }
    assert sorted(path.name for path in (tmp_path / "plain").glob("r00?.*")) == [
        "r000.jpg", "r000.mp4", "r001.gif", "r001.jpg", "r002.mp4",
    ]  # fmt: skip
    table = ds.dataset(tmp_path / "rows", exclude_invalid_files=True).to_table()
    assert table["poster_sha256"].to_pylist() == [hashlib.sha256(poster(0)).hexdigest(), None]
    assert "poster_uri" not in table.column_names
    Store(place).replace(poster_name(key_of(1)), b"another")
    with pytest.raises(AccountingError, match=r"poster .*\.jpg of request 'r001' has other bytes"):
        export(place, str(tmp_path / "again"), "folder")


def test_a_destination_with_other_things_or_another_export_is_refused(output: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--to: .*mine is not empty: it has file; choose another folder"):
        export(output, str(tmp_path / "mine"), "parquet")
    export(output, str(tmp_path / "to"), "parquet")
    with pytest.raises(
        ConfigError, match="has another export: where is None there and 'motion > 2' now; choose another"
    ):
        export(output, str(tmp_path / "to"), "parquet", where="motion > 2")
    make_output(Store(output), ["mp4"], run_id="run-2", first=20)
    with pytest.raises(ConfigError, match="has another export: run_id is 'run-1' there and 'run-2' now"):
        export(output, str(tmp_path / "to"), "parquet")
    assert export(output, str(tmp_path / "to"), "parquet", run_id="run-1").written == 0


@pytest.mark.parametrize(("name", "extra"), [("lance", "lance"), ("delta", "delta")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(export_formats.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(
        ConfigError, match=rf"--format {name} needs another library; .*pip install 'pia-batch\[{extra}\]'"
    ):
        export(output, str(tmp_path / "to"), name)


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1))
def test_safe_names_are_safe(request_id: str) -> None:
    name = safe_name(request_id)

    assert name
    assert len(name.encode()) <= MAX_NAME_BYTES
    assert not set(name) & set('/\\:*?"<>|#%\0 \n[]{}')
    assert name[0] not in ".-"
    assert safe_name(name) == name
