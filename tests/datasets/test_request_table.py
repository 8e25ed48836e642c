"""Rows of a source as requests: which column means what, ids, missing values, rejected rows, and taken names."""

from __future__ import annotations

import pickle
from typing import Any

import pyarrow as pa
import pytest
from inputs import png

from pia_batch.config import RunConfig
from pia_batch.datasets.kinds import KINDS
from pia_batch.datasets.request_columns import RequestOptions
from pia_batch.datasets.request_table import Requests, RequestTable
from pia_batch.datasets.sources import Rows
from pia_batch.datasets.templates import Template
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.validation import check
from pia_batch.schema.expressions import RowFilter


def made(table: pa.Table, kind: str = "parquet", places: list[str] | None = None, **options: Any) -> Requests:
    options = {"prompt": Template("{caption}", "--prompt")} | options if "caption" in table.column_names else options
    converter = RequestTable(RequestOptions(kind=KINDS[kind], **options), table.schema)
    names = places or [f"a.parquet:{row}" for row in range(len(table))]
    (requests,) = pickle.loads(pickle.dumps(converter)).parts(Rows(table, pa.array(names, pa.string())))  # noqa: S301 - its own
    return requests


def hugging_face(count: int = 3, **columns: Any) -> pa.Table:
    images = [{"bytes": png(k), "path": f"{k}.png"} for k in range(count)]
    return pa.table({"image": images, "caption": [f"cat {k}" for k in range(count)]} | columns)


def test_an_image_struct_is_the_image_and_its_path_is_not() -> None:
    requests = made(hugging_face()).table
    assert requests["image_bytes"].to_pylist() == [png(0), png(1), png(2)]
    assert requests.schema.field("image_bytes").type == pa.large_binary()
    assert requests["prompt"].to_pylist() == ["cat 0", "cat 1", "cat 2"]
    assert "image" not in requests.column_names


def test_a_struct_with_a_path_only_is_a_uri() -> None:
    table = pa.table(
        {"image": [{"bytes": png(), "path": None}, {"bytes": None, "path": "s3://b/1.png"}], "caption": ["a", "b"]}
    )
    requests = made(table).table
    assert requests["image"].to_pylist() == [None, "s3://b/1.png"]


def test_ids_from_content_survive_another_order_and_name_true_duplicates() -> None:
    table = pa.concat_tables([hugging_face(), hugging_face(1)])
    ids = made(table).table["request_id"].to_pylist()
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3
    again = made(table.take([2, 0]), places=["other:1", "other:2"]).table["request_id"].to_pylist()
    assert again == [ids[2], ids[0]]
    assert made(table, prompt=Template("{caption}!", "--prompt")).table["request_id"].to_pylist() != ids


def test_ids_from_content_are_those_of_a_run_over_the_same_rows() -> None:
    table = made(hugging_face(motion=[0, 1, 2]), columns={"motion_scale": "motion"}).table
    rows = table.drop_columns(["request_id"])
    config = RunConfig.load(None, {"manifest": "m", "output": "o", "request_id_from": "content"})
    checked = check(rows, config, {"default": "0" * 32})
    assert checked.requests["request_id"].to_pylist() == table["request_id"].to_pylist()


def test_ids_come_from_a_column_or_from_the_place() -> None:
    table = hugging_face(key=["a", "b", "c"])
    assert made(table, columns={"request_id": "key"}).table["request_id"].to_pylist() == ["a", "b", "c"]
    by_place = made(table, ids_from="location").table["request_id"].to_pylist()
    assert by_place == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]
    numbers = hugging_face(number=[1, 2, 3])
    assert made(numbers, columns={"request_id": "number"}).table["request_id"].to_pylist() == ["1", "2", "3"]
    with pytest.raises(ConfigError, match="--column request_id=COLUMN"):
        made(table, ids_from="column")


def test_names_with_another_meaning_in_a_manifest_are_carried_under_others() -> None:
    table = hugging_face(width=[637, 1, 2], style=["ink"] * 3, key=["k"] * 3, other=[1, 2, 3])
    converter = RequestTable(
        RequestOptions(kind=KINDS["parquet"], prompt=Template("{caption}", "--prompt")), table.schema
    )
    (made_of_it,) = converter.parts(Rows(table, pa.array(["a", "b", "c"])))
    requests = made_of_it.table
    assert {"source_width", "source_style", "source_key", "other", "caption"} <= set(requests.column_names)
    assert not {"width", "style", "key"} & set(requests.column_names)
    assert "width as source_width" in converter.notes[0]
    assert "--column width=width makes a setting of it" in converter.notes[0]
    mapped = made(table, columns={"width": "width"}).table
    assert mapped["width"].to_pylist() == [637, 1, 2]


def test_a_manifest_of_ours_keeps_its_meaning() -> None:
    table = pa.table({"request_id": ["a"], "image": ["s3://b/a.png"], "prompt": ["p"], "width": [64], "mine": [1]})
    requests = made(table).table
    assert requests.to_pylist() == [{"request_id": "a", "image": "s3://b/a.png", "prompt": "p", "width": 64, "mine": 1}]


def test_a_field_of_a_struct_can_be_any_column() -> None:
    table = pa.table({"data": [{"jpg": png(), "text": "cat", "id": 7}]})
    columns = {"image_bytes": "data.jpg", "prompt": "data.text", "request_id": "data.id"}
    requests = made(table, columns=columns).table
    assert requests["request_id"].to_pylist() == ["7"]
    assert requests["image_bytes"].to_pylist() == [png()]
    assert requests["prompt"].to_pylist() == ["cat"]


def test_the_condition_reads_the_names_of_the_source() -> None:
    requests = made(hugging_face(width=[100, 600, 700]), where=RowFilter("width >= 512 and caption != 'cat 2'"))
    assert requests.table["caption"].to_pylist() == ["cat 1"]
    assert +requests.counts == {"read": 3, "filtered": 2, "requests": 1}


def test_missing_values_fail_drop_or_are_empty_and_are_counted() -> None:
    table = hugging_face(style=["ink", None, " "])
    template = Template("{caption}, {style}", "--prompt")
    with pytest.raises(ManifestError, match=r"a\.parquet:1: column 'style' is null or blank.*--on-missing drop"):
        made(table, prompt=template)
    dropped = made(table, prompt=template, on_missing="drop")
    assert dropped.table["prompt"].to_pylist() == ["cat 0, ink"]
    assert +dropped.counts == {"read": 3, "dropped_missing": 2, "requests": 1}
    assert dropped.rejects.num_rows == 0
    empty = made(table, prompt=template, on_missing="empty")
    assert empty.table["prompt"].to_pylist() == ["cat 0, ink", "cat 1, ", "cat 2, "]


def test_bad_rows_are_rejected_with_a_reason() -> None:
    table = pa.table(
        {
            "image": [{"bytes": png(), "path": None}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}] * 2,
            "caption": ["cat"] * 3 + ["", "cat", "cat"],
            "id": ["a", "b", "c", "d", None, "x" * 513],
        }
    )
    requests = made(table, on_missing="empty", columns={"request_id": "id"})
    assert requests.table["request_id"].to_pylist() == ["a"]
    reasons = dict(zip(requests.rejects["place"].to_pylist(), requests.rejects["reason"].to_pylist(), strict=True))
    assert reasons == {
        "a.parquet:1": "the image is null",
        "a.parquet:2": "the image is null",
        "a.parquet:3": "the prompt is null or blank",
        "a.parquet:4": "the image is null",
        "a.parquet:5": "the image is null",
    }
    long = made(table.slice(0, 1).append_column("key", pa.array(["x" * 513])), columns={"request_id": "key"})
    assert "more than 512 bytes" in long.rejects["reason"][0].as_py()


def test_probing_adds_sizes_and_rejects_what_is_no_image() -> None:
    images = [
        {"bytes": png(0, 80, 48), "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": png()[:20], "path": None},
    ]
    requests = made(pa.table({"image": images, "caption": ["a", "b", "c"]}), probe=True)
    assert requests.table.select(["image_width", "image_height"]).to_pylist() == [
        {"image_width": 80, "image_height": 48}
    ]
    assert all("the image cannot be read" in reason for reason in requests.rejects["reason"].to_pylist())
    assert requests.rejects["place"].to_pylist() == ["a.parquet:1", "a.parquet:2"]


def test_a_sample_is_always_the_same_share() -> None:
    table = pa.table({"image": ["s3://b/a.png"] * 2000, "caption": ["a"] * 2000})
    one = made(table, sample=0.1, ids_from="location").table["request_id"].to_pylist()
    assert 120 < len(one) < 280
    assert made(table, sample=0.1, ids_from="location").table["request_id"].to_pylist() == one
    assert set(one) <= set(made(table, sample=0.2, ids_from="location").table["request_id"].to_pylist())


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        (hugging_face(), {"columns": {"seed": "sede"}}, ["--column seed=sede", "no column 'sede'"]),
        (hugging_face(), {"columns": {"status": "caption"}}, ["'status' is a column of results"]),
        (hugging_face(), {"where": RowFilter("widht > 1")}, ["no column 'widht'"]),
        (pa.table({"a": [1], "text": ["x"]}), {}, ["no column is the image", "--column image=COLUMN"]),
        (pa.table({"image": [b"x"], "text": ["x"]}), {}, ["no column is the prompt", "(columns of text: text)"]),
        (pa.table({"image": [1], "text": ["x"]}), {"columns": {"image": "image"}}, ["the column of images is int64"]),
        (hugging_face(), {"columns": {"prompt": "image"}, "prompt": None}, ["column 'image' has no text"]),
    ],
)
def test_an_error_names_option_and_remedy(table: pa.Table, options: dict[str, Any], words: list[str]) -> None:
    if "text" in table.column_names and "columns" in options:
        options = options | {"prompt": Template("{text}", "--prompt")}
    with pytest.raises((ConfigError, ManifestError)) as raised:
        made(table, **options)
    assert all(word in str(raised.value) for word in words), str(raised.value)
