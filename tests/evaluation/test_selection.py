"""Selection of requests by measures, and the commands that take its table."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from columns_of_types import EXTENSIONS, extension_column, types, values
from evaluated import Frames, key_of, publish_evaluation, publish_output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pia_batch import cli
from pia_batch.errors import ConfigError, StorageError
from pia_batch.evaluation.publication import Evaluation
from pia_batch.evaluation.selection import Choice, Selection, group_numbers, select, write
from pia_batch.manifest import id_tables
from pia_batch.schema import python_values
from pia_batch.schema.expressions import RowFilter, RowNumber
from pia_batch.storage.object_store import Store

IDS = ["a-0", "a-1", "a-2", "b-0", "b-1", "c-0", "d-0", "e-0"]
BASES = ["a", "a", "a", "b", "b", "c", None, "e"]
SCORES = [0.1, 0.9, 0.9, 0.4, 0.5, None, 0.2, None]
FLICKER = [0.99, 0.98, 0.99, 0.5, 0.99, 0.99, 0.99, None]


def selection() -> Selection:
    table = pa.table({"request_id": ["a"], "key": ["k"]})
    return Selection(table, Evaluation("e", "r", "", (), {"measures": {}}), 1, 1, 0, 1)


def test_a_table_goes_through_a_link_and_into_a_pipe(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "real.csv", tmp_path / "link.csv", tmp_path / "pipe.csv"
    file.write_text("before")
    link.symlink_to(file)
    os.mkfifo(pipe)

    write(selection(), str(link))
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write(selection(), str(pipe))
        data = read.result(20)

    assert link.is_symlink()
    assert data == file.read_bytes()
    assert b"request_id" in data
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.csv", "pipe.csv", "real.csv"]


def test_a_table_that_cannot_be_written_names_the_option_and_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")

    with pytest.raises(StorageError, match=r"--out: cannot write .*file/x.csv: File exists; a file, or a link"):
        write(selection(), str(tmp_path / "file" / "x.csv"))
    with pytest.raises(StorageError, match=r"--out: cannot write .*: File name too long; choose a shorter path"):
        write(selection(), str(tmp_path / f"{'n' * 300}.csv"))
    assert (tmp_path / "file").read_text() == "before"


@pytest.fixture
def output(store: Store) -> Store:
    still: Frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    clips: dict[str, Frames | None] = dict.fromkeys(IDS, still)
    clips["e-0"] = None
    publish_output(store, clips, carried={"base_id": BASES, "flicker_limit": [0.97] * 8})
    publish_evaluation(store, {"clip_t": SCORES, "flicker": FLICKER})
    return store


def choose(store: Store, *, by: str | None = None, where: str | None = None, **options: object) -> Selection:
    score, condition = by and RowNumber(by), where and RowFilter(where)
    return select(store.uri, Choice(score or None, condition or None, **options))  # type: ignore[arg-type]


def chosen(found: Selection) -> list[str]:
    return found.table["request_id"].to_pylist()


def test_the_best_of_each_group_is_chosen_and_ties_go_by_id(output: Store) -> None:
    found = choose(output, by="clip_t", group_by=("base_id",))

    assert chosen(found) == ["a-1", "b-1", "d-0"]
    assert found.table["score"].to_pylist() == [0.9, 0.5, 0.2]
    assert found.table["rank"].to_pylist() == [1, 1, 1]
    assert (found.num_requests, found.num_accepted, found.num_unscored, found.num_groups) == (8, 7, 1, 3)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_groups_are_the_equal_values_of_any_type(data: st.DataObject) -> None:
    one = data.draw(types)
    drawn = data.draw(st.lists(values(one), min_size=3, max_size=3))
    array = pa.array([*drawn, None, *drawn, None], one)
    keys = [python_values.group_key(value) for value in python_values.of_column(array)]

    numbers = group_numbers(pa.chunked_array([array.slice(0, 3), array.slice(3)])).tolist()

    assert numbers[:4] == numbers[4:]
    assert [[a == b for b in numbers] for a in numbers] == [[a == b for b in keys] for a in keys]


@pytest.mark.parametrize("extension", EXTENSIONS, ids=str)
def test_groups_of_extension_types_are_those_of_what_they_store(extension: pa.DataType) -> None:
    column = extension_column(extension, 4)

    numbers = group_numbers(pa.chunked_array([column, column])).tolist()

    assert numbers == group_numbers(pa.chunked_array([column.storage, column.storage])).tolist()
    assert numbers[:4] == numbers[4:]


def test_columns_named_score_and_rank_or_like_a_field_of_a_struct_are_selected_by(store: Store) -> None:
    still: Frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    carried = {"score": [1, 1, 7], "rank": list("xxy"), "a": [{"b": 5}] * 3, "a.b": [1, 1, 2], "key.x": [3] * 3}
    publish_output(store, dict.fromkeys(["r0", "r1", "r2"], still), carried=carried)
    publish_evaluation(store, {"clip_t": [0.1, 0.2, 0.3]})

    found = choose(store, by="clip_t", where='score < 5 and column("key.x") == 3', group_by=("rank", "a.b"))

    assert found.table.to_pylist() == [
        {"request_id": "r1", "key": key_of(f"{store.uri} r1"), "a.b": 1, "key.x": 3}
        | {"rank_": "x", "score_": 1, "clip_t": 0.2, "score": 0.2, "rank": 1}
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"by": "clip_t", "group_by": ("base_id",), "top": 2}, ["a-1", "a-2", "b-1", "b-0", "d-0"]),
        ({"by": "-clip_t", "top": 2}, ["a-0", "d-0"]),
        ({"by": "clip_t"}, ["a-1", "a-2", "b-1", "b-0", "d-0", "a-0"]),
        ({"by": "clip_t", "where": "flicker > 0.97", "group_by": ("base_id",)}, ["a-1", "b-1", "d-0"]),
        ({"by": "0.5 * clip_t - 1000 * flicker", "top": 1}, ["b-0"]),
        ({"by": "1 / (clip_t - clip_t)"}, []),
        ({"where": "flicker < flicker_limit"}, ["b-0"]),
        ({"where": "base_id is null"}, ["d-0"]),
        ({"where": "base_id == 'a' and clip_t > 0.5"}, ["a-1", "a-2"]),
        ({"where": "flicker > 2"}, []),
        ({"by": "clip_t", "where": "flicker > 2", "group_by": ("base_id",)}, []),
    ],
)
def test_conditions_and_scores_choose(options: dict[str, str], expected: list[str], output: Store) -> None:
    assert chosen(choose(output, **options)) == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "nothing to select by"),
        ({"where": "flicker > 0", "group_by": ("base_id",)}, "give the score with --by"),
        (
            {"by": "clip_x"},
            "no column 'clip_x' in the evaluation and its results; there are flicker, .*base_id",
        ),
        ({"by": "base_id"}, "--by: character 1: base_id is a text; only numbers can be computed with"),
        ({"by": "clip_t +"}, "--by: character .*: not a number; write such as clip_t . 0.5 . clip_i"),
        ({"by": "1 + 1"}, "--by: '1 . 1' names no column"),
        ({"by": "clip_t", "group_by": ("shop",)}, "no column 'shop'"),
    ],
)
def test_what_cannot_be_selected_is_refused(options: dict[str, str], problem: str, output: Store) -> None:
    with pytest.raises(ConfigError, match=problem):
        choose(output, **options)


def test_an_output_without_an_evaluation_names_the_command(store: Store) -> None:
    with pytest.raises(ConfigError, match="no complete evaluation; `pia-batch evaluate` makes one"):
        choose(store, by="clip_t")


@pytest.mark.parametrize("name", ["best.parquet", "best.csv"])
def test_the_table_is_one_that_only_takes(name: str, output: Store, tmp_path: Path) -> None:
    found = choose(output, by="clip_t", group_by=("base_id",))

    uri = write(found, str(tmp_path / name))

    assert id_tables.read(uri).to_pylist() == ["a-1", "b-1", "d-0"]
    with pytest.raises(ConfigError, match=r"unknown ending of 'best\.txt'"):
        write(found, str(tmp_path / "best.txt"))


def test_the_command_writes_the_table_and_the_report_shows_only_that(
    output: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "best.parquet"
    arguments = ["--by", "clip_t", "--group-by", "base_id", "--out", str(table), "--json"]
    with pytest.raises(SystemExit):
        cli.main(["select", output.uri, *arguments])
    payload = json.loads(capsys.readouterr().out)
    assert (payload["selected"], payload["table"]) == (3, table.as_uri())
    assert pq.read_table(table).column_names == ["request_id", "key", "base_id", "clip_t", "score", "rank"]

    with pytest.raises(SystemExit):
        cli.main(["report", output.uri, "--only", str(table)])

    printed = capsys.readouterr().out
    assert "3 results" in printed
    assert "_runs/run-1/report-" in printed
    with pytest.raises(FileNotFoundError):
        output.read("_runs/run-1/report.html")
    pq.write_table(pa.table({"request_id": ["nobody"]}), table)
    with pytest.raises(SystemExit) as end:
        cli.main(["report", output.uri, "--only", str(table)])
    assert end.value.code == 2
    assert "has none of the 1 requests" in capsys.readouterr().err
