"""Columns under other names: mapped rows are the rows of a manifest that has our names, in every format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import png, requests_table

from pia_batch.config import RequestIdFrom, RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest import files as manifest_files
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import make_plan

ENGINES = {"default": "0123456789abcdef"}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def column_map(columns: Mapping[str, str] | None, ids: RequestIdFrom = "column") -> ColumnMap:
    return ColumnMap(tuple((columns or {}).items()), ids)


def opened(path: Path, columns: Mapping[str, str] | None = None, ids: RequestIdFrom = "column") -> Manifest:
    return Manifest.open(str(path), column_map=column_map(columns, ids))


def rows_of(path: Path, columns: Mapping[str, str] | None = None, ids: RequestIdFrom = "column") -> pa.Table:
    found = opened(path, columns, ids)
    return pa.concat_tables([found.schema.empty_table(), *(batch.table for batch in found.batches())])


def keys_of(path: Path, columns: Mapping[str, str] | None = None, ids: RequestIdFrom = "column") -> list[str]:
    config = RunConfig(manifest=str(path), output="out", columns=dict(columns or {}), request_id_from=ids)
    checked = check(rows_of(path, columns, ids), config, ENGINES)
    assert not len(checked.rejected), checked.rejected.to_pylist()
    return list(checked.requests["key"].to_pylist())


def refusal(path: Path, columns: Mapping[str, str]) -> str:
    with pytest.raises(ManifestError) as caught:
        opened(path, columns)
    return str(caught.value)


def parquet(path: Path, rows: pa.Table | Mapping[str, Any]) -> Path:
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(dict(rows)), path)
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# --- the same requests ------------------------------------------------------------------------------------------------


OURS = {"seed": [1, 2, 3, 4], "negative_prompt": ["NULL", "blur", None, "x"], "shop": ["a", "b", "c", "d"]}
THEIRS = {"request_id": "key", "prompt": "txt", "image": "file.name", "seed": "n", "negative_prompt": "neg"}


@pytest.mark.parametrize("extension", ["parquet", "jsonl", "csv"])
def test_renamed_columns_give_the_same_keys_and_carried_columns_in_every_format(extension: str, tmp_path: Path) -> None:
    ours = requests_table(4, **OURS)
    theirs = ours.rename_columns([THEIRS.get(name, name) for name in ours.column_names])
    for name, table in (("ours", ours), ("theirs", theirs)):
        path = tmp_path / f"{name}.{extension}"
        if extension == "parquet":
            parquet(path, table)
        elif extension == "csv":
            pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(quoting_style="needed"))
        else:
            lines(path, table.to_pylist())

    there = tmp_path / f"theirs.{extension}"
    assert keys_of(there, THEIRS) == keys_of(tmp_path / f"ours.{extension}")
    assert rows_of(there, THEIRS).select(ours.column_names).equals(rows_of(tmp_path / f"ours.{extension}"))


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_a_path_goes_into_structs_and_what_is_left_of_them_is_carried(extension: str, tmp_path: Path) -> None:
    rows = [
        {"key": "a", "meta": {"text": {"en": "red", "de": "rot"}, "url": "a.png", "tags": ["x"]}},
        {"key": "b", "meta": {"text": {"en": "blue", "de": None}, "url": "b.png", "tags": []}},
    ]
    path = tmp_path / f"m.{extension}"
    if extension == "parquet":
        parquet(path, pa.Table.from_pylist(rows))
    else:
        lines(path, rows)

    found = rows_of(path, {"request_id": "key", "prompt": "meta.text.en", "image": "meta.url"})

    assert sorted(found.column_names) == ["image", "meta", "prompt", "request_id"]
    assert found["prompt"].to_pylist() == ["red", "blue"]
    assert found["image"].to_pylist() == ["a.png", "b.png"]
    assert found["meta"].to_pylist() == [
        {"text": {"de": "rot"}, "tags": ["x"]},
        {"text": {"de": None}, "tags": []},
    ]


TEXTS = st.one_of(st.none(), st.text("ab", max_size=3))
LEAF = st.fixed_dictionaries({"c": TEXTS, "d": TEXTS})
ROWS = st.lists(st.one_of(st.none(), st.fixed_dictionaries({"b": st.one_of(st.none(), LEAF), "e": TEXTS})), min_size=1)
TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, text=st.sampled_from(TYPES), group=st.integers(1, 4), extension=st.sampled_from(["parquet", "jsonl"]))
def test_a_value_is_null_where_any_struct_on_its_way_is(
    rows: list[Any], text: pa.DataType, group: int, extension: str, tmp_path: Path
) -> None:
    path = tmp_path / f"any.{extension}"
    ids = [str(number) for number in range(len(rows))]
    data_type = pa.struct([("b", pa.struct([("c", text), ("d", text)])), ("e", text)])
    if extension == "parquet":
        table = pa.table({"request_id": ids, "image": ids, "a": pa.array(rows, data_type)})
        pq.write_table(table, path, row_group_size=group)
    else:
        lines(path, [{"request_id": each, "image": each, "a": row} for each, row in zip(ids, rows, strict=True)])
    wanted = [row and row["b"] and row["b"]["c"] for row in rows]
    wanted = [each if isinstance(each, str) else None for each in wanted]
    if extension == "jsonl" and not any(row and row["b"] for row in rows):
        return  # no line has the member at all

    found = rows_of(path, {"prompt": "a.b.c"})

    assert found["prompt"].to_pylist() == wanted
    assert [row and row["e"] for row in found["a"].to_pylist()] == [row and row["e"] for row in rows]


def test_texts_of_a_struct_that_fill_several_dictionaries_are_read(tmp_path: Path) -> None:
    texts = [f"{k} " + "x" * 900 for k in range(6000)]  # more than one dictionary page takes
    meta = pa.StructArray.from_arrays([pa.array(texts)], ["text"])
    rows = requests_table(6000).drop_columns(["prompt"]).append_column("meta", meta)
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=2500)

    assert rows_of(tmp_path / "a.parquet", {"prompt": "meta.text"})["prompt"].to_pylist() == texts


def test_one_source_may_be_two_columns(tmp_path: Path) -> None:
    columns = {"request_id": "file", "image": "file"}
    rows = {"file": ["a.png", "NULL"], "prompt": ["p", "q"]}
    parquet(tmp_path / "a.parquet", rows)
    lines(tmp_path / "a.jsonl", pa.table(rows).to_pylist())
    (tmp_path / "a.csv").write_text("file,prompt\na.png,p\nNULL,q\n")

    for name in ("a.parquet", "a.jsonl"):
        found = rows_of(tmp_path / name, columns)
        assert found["request_id"].to_pylist() == found["image"].to_pylist() == rows["file"]
        assert sorted(found.column_names) == ["image", "prompt", "request_id"]
    found = rows_of(tmp_path / "a.csv", columns)
    assert (found["request_id"].to_pylist(), found["image"].to_pylist()) == (["a.png", "NULL"], ["a.png", None])


def test_a_column_that_has_dots_in_its_name_comes_before_a_field(tmp_path: Path) -> None:
    rows = {"meta.text": ["literal"], "meta": [{"text": "field", "x.y": "deep"}]}
    path = parquet(
        tmp_path / "a.parquet",
        requests_table(1)
        .drop_columns(["prompt"])
        .append_column("meta.text", pa.array(rows["meta.text"]))
        .append_column("meta", pa.array(rows["meta"])),
    )

    found = rows_of(path, {"prompt": "meta.text", "negative_prompt": "meta.x.y"})

    assert (found["prompt"].to_pylist(), found["negative_prompt"].to_pylist()) == (["literal"], ["deep"])
    assert found["meta"].to_pylist() == [{"text": "field"}]


def test_a_column_may_be_carried_under_another_name(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", requests_table(2, status=["ok", "ok"], width=[640, 333]))

    columns = {"image_width": "width", "source_status": "status"}

    assert rows_of(path, columns)["image_width"].to_pylist() == [640, 333]
    assert keys_of(path, columns) == keys_of(parquet(tmp_path / "b.parquet", requests_table(2)))
    with pytest.raises(ManifestError, match=r"'status' has the name of a result column.*--column source_status=status"):
        opened(path)


def test_a_hive_partition_may_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "m" / "style=anime").mkdir(parents=True)
    (tmp_path / "m" / "style=ink").mkdir()
    for name in ("anime", "ink"):
        parquet(tmp_path / "m" / f"style={name}" / "a.parquet", requests_table(1, request_id=[name]))

    found = rows_of(tmp_path / "m", {"look": "style"})

    assert found["look"].to_pylist() == ["anime", "ink"]
    assert "style" not in found.column_names


def test_a_source_that_some_files_lack_is_null_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    parquet(tmp_path / "m" / "a.parquet", requests_table(1))
    parquet(tmp_path / "m" / "b.parquet", requests_table(1, request_id=["b"], n=[5]))

    assert rows_of(tmp_path / "m", {"seed": "n"})["seed"].to_pylist() == [None, 5]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("name", ["image", "photo", "sample.photo"])
def test_an_image_struct_is_understood_whatever_its_name(data: pa.DataType, name: str, tmp_path: Path) -> None:
    stored = [{"bytes": png(1), "path": "1.png"}, {"bytes": None, "path": "2.png"}, {"bytes": png(3), "path": None}]
    images = pa.array(stored, pa.struct([("bytes", data), ("path", pa.string())]))
    top, _, field = name.partition(".")
    column = pa.StructArray.from_arrays([images], [field]) if field else images
    rows = requests_table(3).drop_columns(["image"]).append_column(top, column)
    ours = requests_table(
        3, image=[None, "2.png", None], image_bytes=pa.array([png(1), None, png(3)], pa.large_binary())
    )
    columns = {} if name == "image" else {"image": name}

    path = parquet(tmp_path / "theirs.parquet", rows)

    assert keys_of(path, columns) == keys_of(parquet(tmp_path / "ours.parquet", ours))
    found = rows_of(path, columns)
    assert sorted(found.column_names) == ["image", "image_bytes", "prompt", "request_id"]
    assert found["image"].to_pylist() == [None, "2.png", None]


def test_files_of_the_datasets_library_are_read_as_they_are(tmp_path: Path) -> None:
    photo = {"bytes": png(1), "path": "1.png"}
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "pair": {"left": datasets.Image(), "text": datasets.Value("large_string")},
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = [{"photo": photo, "pair": {"left": photo, "text": "p"}, "label": "dog"}] * 2
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    ours = requests_table(2, prompt=["p"] * 2, image=pa.nulls(2), image_bytes=pa.array([png(1)] * 2, pa.binary()))
    parquet(tmp_path / "ours.parquet", ours.drop_columns(["request_id"]))

    for image in ("photo", "pair.left"):
        columns = {"image": image, "prompt": "pair.text"}
        found = keys_of(tmp_path / "a.parquet", columns, "content")
        assert found == keys_of(tmp_path / "ours.parquet", {}, "content")
        rest = {"photo": "pair", "pair.left": "photo"}[image]
        assert rest in rows_of(tmp_path / "a.parquet", columns, "content").column_names


def test_the_bytes_and_the_path_of_an_image_struct_may_be_named(tmp_path: Path) -> None:
    images = pa.array([{"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": "2.png"}], IMAGE)
    path = parquet(tmp_path / "a.parquet", {"image": images, "text": ["p", "q"]})

    both = rows_of(path, {"request_id": "image.path", "prompt": "text"})
    assert both["request_id"].to_pylist() == ["1.png", "2.png"]
    assert both["image_bytes"].to_pylist() == [png(1), png(2)]
    assert both["image"].to_pylist() == [None, None]
    data = rows_of(path, {"request_id": "image.path", "prompt": "text", "image_bytes": "image.bytes"})
    assert sorted(data.column_names) == ["image_bytes", "prompt", "request_id"]


def test_an_image_object_of_json_lines_with_only_a_path_is_understood(tmp_path: Path) -> None:
    row = {"image": {"bytes": None, "path": "a.png"}, "text": "p"}
    path = lines(tmp_path / "a.jsonl", [row])

    found = rows_of(path, {"request_id": "image.path", "prompt": "text"})

    assert found["image"].to_pylist() == found["request_id"].to_pylist() == ["a.png"]


def test_an_image_without_bytes_and_path_is_rejected_by_row(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": None}, None, {"bytes": b"", "path": ""}], IMAGE)
    path = parquet(tmp_path / "a.parquet", requests_table(3).set_column(1, "image", images))

    checked = check(rows_of(path), RunConfig(manifest="m", output="o"), ENGINES)

    assert checked.rejected["error_kind"].to_pylist() == ["missing_value"] * 3


def test_only_the_fields_that_are_used_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pa.array([{"bytes": png(k), "path": f"{k}.png"} for k in range(2)], IMAGE)
    path = parquet(tmp_path / "a.parquet", {"image": images, "meta": [{"t": "p", "u": 1}] * 2})
    found = opened(path, {"request_id": "image.path", "prompt": "meta.t"})
    asked = []
    read = pq.ParquetFile.iter_batches

    def recorded(self: pq.ParquetFile, *arguments: Any, columns: list[str], **options: Any) -> Any:
        asked.append(columns)
        return read(self, *arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    list(found.batches(["request_id"]))
    list(found.batches(["prompt"]))
    list(found.batches(["meta", "image_bytes"]))

    assert asked == [["image.path"], ["meta.t"], ["image.bytes", "meta.u"]]


def test_a_long_value_in_a_struct_that_rows_share_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    big = pa.DictionaryArray.from_arrays(pa.array([0] * 70_000, pa.int32()), pa.array(["x" * 200_000]))
    meta = pa.StructArray.from_arrays([big], ["text"])
    path = parquet(tmp_path / "a.parquet", {"request_id": [str(k) for k in range(70_000)], "image": meta, "meta": meta})
    found = opened(path, {"prompt": "meta.text", "image": "image.text"})

    with pytest.raises(ManifestError, match="MiB of text and bytes in the rows 0 to"):
        list(found.batches(["prompt"]))
    assert manifest_files.MAX_ROW_BYTES * manifest_files.BATCH_ROWS < 70_000 * 200_000


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "captoin"}, ["columns.prompt", "no column 'captoin'", "did you mean 'caption'?", "It has: "]),
        ({"prompt": "Caption"}, ["did you mean 'caption'?"]),
        ({"prompt": "meta.captoin"}, ["did you mean 'meta.caption_en'?"]),
        ({"prompt": "caption_en"}, ["did you mean 'meta.caption_en'?"]),
        ({"prompt": "zzz"}, ["no column 'zzz'; it has: request_id, image, caption, meta, meta.caption_en"]),
        ({"prompt": "tags.text"}, ["columns.prompt: 'tags.text': 'tags' is list<", "only a struct has fields"]),
        ({"prompt": "pairs.key"}, ["'pairs' is map<", "only a struct has fields"]),
        ({"prompt": "caption.en"}, ["'caption' is string, and only a struct has fields"]),
        ({"prompt": "meta.deep.x"}, ["'deep' is list<"]),
        ({"image": "caption"}, ["column 'image' is there", "takes it from 'caption'", "--column source_image=image"]),
    ],
)
def test_a_source_that_cannot_be_taken_is_refused_with_the_nearest(
    columns: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "request_id": ["a"],
            "image": ["a.png"],
            "caption": ["p"],
            "meta": pa.array([{"caption_en": "p", "deep": [{"x": "y"}]}]),
            "tags": pa.array([[{"text": "x"}]]),
            "pairs": pa.array([[("key", "x")]], pa.map_(pa.string(), pa.string())),
        },
    )

    message = refusal(path, columns)

    for each in words:
        assert each in message


def test_a_nearest_column_is_found_where_every_file_is_known_already(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", requests_table(1).rename_columns(["request_id", "image", "caption"]))
    columns = column_map({"prompt": "captoin"})
    contents = Manifest.open(str(path), column_map=column_map({"prompt": "caption"})).opened[0][1]
    known = manifest_files.Contents(contents.schema.remove(2), contents.groups, None)

    with pytest.raises(ManifestError, match="no column 'captoin'; did you mean 'caption'"):
        Manifest.open(str(path), lambda _path, _version: known, columns)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"meta": ["x"]}, "line 2: columns.prompt: 'meta.text': 'meta' is a list, and only an object has members"),
        ({"meta": "x"}, "'meta' is a text"),
        ({"meta": 5}, "'meta' is a number"),
        ({"meta": {"text": "x"}, "prompt": "y"}, "line 2: column 'prompt' is there, and columns.prompt takes it from"),
    ],
)
def test_a_line_that_does_not_fit_the_map_is_refused_by_its_number(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    good = {"request_id": "a", "image": "a.png", "meta": {"text": "p"}}

    assert words in refusal(lines(tmp_path / "a.jsonl", [good, good | row]), {"prompt": "meta.text"})


def test_a_csv_file_that_has_the_name_too_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("request_id,image,prompt,caption\na,b,c,d\n")

    assert "column 'prompt' is there" in refusal(tmp_path / "a.csv", {"prompt": "caption"})


def test_a_second_column_of_the_same_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 4, ["request_id", "image", "caption", "caption"])

    assert "more than one column 'caption'" in refusal(parquet(tmp_path / "a.parquet", table), {"prompt": "caption"})


def test_errors_of_values_and_types_name_our_column_and_its_source(tmp_path: Path) -> None:
    columns = {"prompt": "meta.caption", "seed": "n", "request_id": "key"}
    rows = {
        "key": ["a", "b", None],
        "image": ["a.png"] * 3,
        "meta": pa.array([{"caption": 5}, {"caption": None}, {"caption": 1}]),
        "n": [-1, 2, 3],
    }
    path = parquet(tmp_path / "a.parquet", rows)
    config = RunConfig(manifest="m", output="o", columns=columns)

    errors = check(rows_of(path, columns), config, ENGINES).rejected["error"].to_pylist()

    assert errors[0] == (
        "column 'prompt' (source 'meta.caption'): 5 is not allowed; allowed: a string, and not int64; cast the column "
        "to text"
    )
    assert errors[1].startswith("column 'prompt' (source 'meta.caption') is empty")
    texts = parquet(tmp_path / "b.parquet", {**rows, "meta": pa.array([{"caption": "x"}] * 3)})
    errors = check(rows_of(texts, columns), config, ENGINES).rejected["error"].to_pylist()
    assert errors[0].startswith("column 'seed' (source 'n'): -1 is not allowed")
    assert errors[1].startswith("column 'request_id' (source 'key') is empty")

    (tmp_path / "m").mkdir()
    parquet(tmp_path / "m" / "a.parquet", {**rows, "meta": pa.array([{"caption": "x"}] * 3)})
    parquet(tmp_path / "m" / "b.parquet", {**rows, "meta": pa.array([{"caption": ["x"]}] * 3)})
    assert "disagree on column 'prompt' (source 'meta.caption'): " in refusal(tmp_path / "m", columns)


def test_a_missing_column_names_the_flag_and_the_likely_source(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"key": ["a"], "jpg": [b"x"], "caption": ["p"], "url": ["a.png"]})

    message = refusal(path, {"request_id": "key"})

    assert "no column 'prompt' and no column 'image'" in message
    assert "--column prompt=caption --column image=url" in message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "caption"}, "columns: no column of a request (got 'promt'); did you mean 'prompt'"),
        ({"status": "caption"}, "columns: results have a column with this name (got 'status')"),
        ({"prompt": ""}, "neither the name nor the source of a column may be empty"),
        ({"prompt": 5}, "columns.prompt: must be a text"),
    ],
)
def test_a_map_that_cannot_work_is_refused_with_the_config(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.load(None, {"manifest": "m", "output": "o", "columns": columns})


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_after_another_map_does_not_use_what_the_first_one_has_scanned(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for number in range(10):  # as many files as are worth a scan cache
        rows = {"id": [f"r{number}"], "image": ["a.png"], "one": [f"a{number}"], "two": [f"b{number}"]}
        parquet(tmp_path / "m" / f"{number}.parquet", rows)

    def keys(prompt: str) -> list[str]:
        columns = {"request_id": "id", "prompt": prompt}
        config = RunConfig.load(
            None, {"manifest": str(tmp_path / "m"), "output": str(tmp_path / "out"), "columns": columns}
        )
        plan = make_plan(config)
        plan.save_scan()
        return [f"{high:016x}{low:016x}" for high, low in zip(plan.wanted.high, plan.wanted.low, strict=True)]

    first = keys("one")
    assert keys("one") == first
    assert not set(keys("two")) & set(first)
    assert keys("one") == first
