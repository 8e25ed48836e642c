"""Values of another type than a column of requests takes: each is rejected alone, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import REQUEST

TEXTS = [item.name for item in REQUEST if pa.types.is_string(item.type)]
ENGINES = {"default": "f" * 32}


def errors(folder: Path) -> dict[int, tuple[str, str]]:
    """Return error kind and message of each rejected row of a manifest."""
    rows = pa.concat_tables([batch.table for batch in Manifest.open(str(folder)).batches()])
    config = RunConfig.load(None, {"manifest": str(folder), "output": str(folder / "_out")})
    rejected = check(rows, config, ENGINES).rejected.to_pylist()
    return {row["row"]: (row["error_kind"], row["error"]) for row in rejected}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    base = {"image": "a.png", "prompt": "p"}
    path.write_text("\n".join(json.dumps({"request_id": f"r{at}"} | base | row) for at, row in enumerate(rows)))


others = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.integers(), max_size=2), st.just({}),
    st.dictionaries(st.sampled_from("ab"), st.text(max_size=2), max_size=2), st.lists(st.text(max_size=2), max_size=2),
)  # fmt: skip


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["prompt", "negative_prompt", "image"]), values=st.lists(others, min_size=1, max_size=3))
def test_what_is_no_text_in_json_lines_is_rejected_and_the_texts_next_to_it_are_not(
    tmp_path: Path, name: str, values: list[Any]
) -> None:
    texts: list[Any] = ["5", "a text"]
    write_lines(tmp_path / "a.jsonl", [{name: value} for value in [*texts, *values]])

    found = errors(tmp_path)

    assert {row: kind for row, (kind, _) in found.items()} == dict.fromkeys(range(2, 2 + len(values)), "invalid_type")
    assert all(f"column '{name}': " in message and "allowed: a string" in message for _, message in found.values())


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"request_id", "image", "prompt"}))
def test_no_other_column_of_texts_takes_a_number_next_to_texts(name: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{name: None}, {name: 5}, {name: "x"}, {}])

    found = errors(tmp_path)

    assert found[1][0] == "invalid_type"
    assert 0 not in found
    assert 3 not in found


def test_integer_ids_next_to_texts_are_ids_and_other_values_are_not(tmp_path: Path) -> None:
    ids = [7, "a", 1.5, True, ["x"], None, 10**30]
    write_lines(tmp_path / "a.jsonl", [{"request_id": value} for value in ids])
    config = RunConfig.load(None, {"manifest": str(tmp_path), "output": str(tmp_path / "_out")})

    found = errors(tmp_path)

    kinds = {2: "invalid_type", 3: "invalid_type", 4: "invalid_type", 5: "missing_value"}
    assert {row: kind for row, (kind, _) in found.items()} == kinds
    assert (make_plan(config).num_pending, make_plan(config).num_rejected) == (3, 4)


def test_an_id_that_is_rejected_for_another_column_is_in_its_result(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"request_id": 7, "prompt": 5}, {"request_id": "b"}])
    config = RunConfig.load(None, {"manifest": str(tmp_path), "output": str(tmp_path / "_out")})

    (row,) = make_plan(config).rejected.to_pylist()

    assert (row["request_id"], row["error_kind"], row["prompt"]) == ("7", "invalid_type", None)


def test_a_bad_curve_does_not_reject_the_others(tmp_path: Path) -> None:
    curves: list[Any] = [[1, 0.5], "x", [1], ["a"], [1, None], {"a": 1}, None]
    write_lines(tmp_path / "a.jsonl", [{"motion_curve": value} for value in curves])

    found = errors(tmp_path)

    assert {row: kind for row, (kind, _) in found.items()} == dict.fromkeys((1, 3, 4, 5), "invalid_type")
    assert "allowed: a list of numbers" in found[1][1]


def test_values_of_several_types_may_be_in_one_of_several_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p"}])
    write_lines(tmp_path / "b.jsonl", [{"prompt": 5}, {"prompt": "p"}])
    write_lines(tmp_path / "c.jsonl", [{"prompt": 5}])

    assert {row: kind for row, (kind, _) in errors(tmp_path).items()} == {1: "invalid_type", 3: "invalid_type"}


@pytest.mark.parametrize(
    ("column", "remedy"),
    [
        (
            {"image": pa.array([{"bytes": b"x", "width": 8}])},
            "name one of its fields: --column image_bytes=image.bytes",
        ),
        ({"image": pa.array([b"a.png"])}, "name a column of encoded images by --column image_bytes=NAME, or cast a"),
        ({"prompt": pa.array([b"a red circle"])}, "Impala and Hive: write strings with the UTF8 annotation"),
        ({"request_id": pa.array([b"0" * 16], pa.binary(16))}, "cast the column to text"),
        ({"request_id": pa.array([1.0])}, "a string, and not double; cast the column to text"),
        ({"prompt": pa.array([5])}, "a string, and not int64; cast the column to text"),
        ({"image_bytes": pa.array(["iVBORw0KGgo"]), "image": pa.nulls(1)}, "decode text such as base64 to bytes"),
        ({"image": ["data:image/png;base64,iVBORw0KGgo="]}, "decode the image itself from base64 into the column"),
        ({"image": ["DATA:,x"]}, "decode the image itself from base64 into the column `image_bytes`"),
        ({"image": ["iVBORw0KGgo" + "A" * 9000]}, "decode the image itself from base64 into the column `image_bytes`"),
        ({"image": ["/9j/4AAQSkZJRgABAQ" + "A" * 90]}, "decode the image itself from base64 into the column"),
        ({"ip_adapter_image": ["data:,x"]}, "store it as a file"),
    ],
)
def test_a_column_that_another_tool_writes_differently_is_rejected_with_the_remedy(
    column: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    pq.write_table(requests_table(1, **column), tmp_path / "a.parquet")

    kind, message = errors(tmp_path)[0]

    assert kind in ("invalid_type", "invalid_value")
    assert f"column '{next(iter(column))}': " in message
    assert remedy in message


@pytest.mark.parametrize("uri", ["/9j/a.png", "database/x.png", "iVBORw0KGgo.png", "data/x.png"])
def test_a_path_that_looks_a_little_like_an_image_is_a_path(uri: str, tmp_path: Path) -> None:
    pq.write_table(requests_table(1, image=[uri]), tmp_path / "a.parquet")

    assert errors(tmp_path) == {}
