"""Ids made of content or location: stable over releases, shards and order; equal rows are one request."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import png, requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import Plan, make_plan
from pia_batch.planning.statistics import Statistics

ENGINES = {"default": "0123456789abcdef"}
RECORDED = json.loads(Path(__file__).with_name("request_ids.json").read_text(encoding="utf-8"))


def config_of(folder: Path, origin: str = "content", **more: Any) -> RunConfig:
    keys = {"manifest": str(folder), "output": str(folder.parent / "out"), "request_id_from": origin}
    return RunConfig.load(None, keys | {key.replace("__", "."): value for key, value in more.items()})


def ids_of(table: pa.Table, **more: Any) -> list[str]:
    config = RunConfig.load(None, {"manifest": "m", "output": "o", "request_id_from": "content"} | more)
    checked = check(table, config, ENGINES)
    assert not len(checked.rejected), checked.rejected.to_pylist()
    return list(checked.requests["request_id"].to_pylist())


def ids_in(folder: Path, origin: str) -> list[str]:
    config = config_of(folder, origin)
    found = Manifest.open(str(folder), column_map=ColumnMap.of(config))
    tables = [check(batch.table, config, ENGINES).requests for batch in found.batches()]
    return [each for table in tables for each in table["request_id"].to_pylist()]


def put(folder: Path, shards: Mapping[str, pa.Table], row_group_size: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name, row_group_size=row_group_size)
    return folder


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: json.dumps(row["columns"])[:60])
def test_a_recorded_id_never_changes(row: dict[str, Any]) -> None:
    columns = {name: [value] for name, value in row["columns"].items()}
    if "image_bytes" in columns:
        columns["image_bytes"] = [columns["image_bytes"][0].encode()]

    assert ids_of(pa.table(columns)) == [row["request_id"]], "users would generate every finished animation again"


def test_recorded_ids_differ_wherever_their_content_does() -> None:
    contents = {json.dumps(row["columns"], sort_keys=True) for row in RECORDED}

    assert len({row["request_id"] for row in RECORDED}) == len(contents) > 12


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=6)
CONTENT = st.fixed_dictionaries(
    {
        "image": WORDS.map(lambda text: f"images/{text}"),
        "prompt": WORDS.filter(str.strip),
        "seed": st.one_of(st.none(), st.integers(0, 3)),
        "guidance_scale": st.one_of(st.none(), st.sampled_from([0.0, 1.5, 7.5])),
        "motion_curve": st.one_of(st.none(), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3)),
        "loop": st.one_of(st.none(), st.booleans()),
        "shop": st.one_of(st.none(), WORDS),
    }
)
TYPES = pa.schema(
    [
        *(("image", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()), ("guidance_scale", pa.float64())),
        *(("motion_curve", pa.list_(pa.float64())), ("loop", pa.bool_()), ("shop", pa.string())),
    ]
)


def content_of(row: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "shop"}, sort_keys=True)


@pytest.mark.long
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(CONTENT, min_size=1, max_size=8), seed=st.integers(0, 99), shards=st.integers(1, 3))
def test_shards_order_and_carried_columns_do_not_change_an_id_and_equal_content_has_one(
    rows: list[dict[str, Any]], seed: int, shards: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = ids_of(pa.Table.from_pylist(rows, TYPES))
    expected = dict(zip(map(content_of, rows), whole, strict=True))
    assert len(set(whole)) == len(expected)  # neither more nor fewer ids than contents
    assert [expected[content_of(row)] for row in rows] == whole

    shuffled = [row | {"shop": "another"} for row in rows + rows[:2]]
    random.Random(seed).shuffle(shuffled)
    folder = tmp_path_factory.mktemp("m")
    parts = {
        f"{number}/x.parquet": pa.Table.from_pylist(part, TYPES)
        for number in range(shards)
        if (part := shuffled[number::shards])
    }
    assert sorted(ids_in(put(folder, parts), "content")) == sorted(expected[content_of(row)] for row in shuffled)


@pytest.mark.long
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(CONTENT, min_size=1, max_size=6), copies=st.lists(st.integers(0, 5), max_size=5))
def test_a_plan_counts_equal_rows_as_duplicates_of_one_request(
    rows: list[dict[str, Any]], copies: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    repeated = rows + [rows[number % len(rows)] for number in copies]
    folder = put(tmp_path_factory.mktemp("p") / "m", {"a.parquet": pa.Table.from_pylist(repeated, TYPES)})
    distinct = len(set(map(content_of, rows)))

    plan = make_plan(config_of(folder, limits__max_frame_pixels=2**26), statistics=Statistics())

    assert (plan.num_pending, plan.num_duplicates, plan.num_rejected) == (distinct, len(repeated) - distinct, 0)


def test_an_id_depends_on_the_image_itself_where_its_bytes_or_hash_are_given() -> None:
    data = png(1)
    digest = "9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08"
    by_bytes = pa.table({"image_bytes": pa.array([data, data, png(2)]), "prompt": ["p"] * 3, "n": [1, 2, 3]})
    by_hash = pa.table({"image": ["a", "b"], "image_sha256": [digest, digest.lower()], "prompt": ["p"] * 2})

    first, second, other = ids_of(by_bytes)
    assert first == second != other
    assert len(set(ids_of(by_hash))) == 1


def test_an_id_is_the_rows_own_and_does_not_depend_on_the_config() -> None:
    table = requests_table(2).drop_columns(["request_id"])

    assert ids_of(table) == ids_of(table, **{"defaults.guidance_scale": 3.0})
    assert ids_of(table) != ids_of(table.append_column("guidance_scale", pa.array([3.0] * 2)))


def test_numbers_that_say_the_same_in_other_types_have_the_same_id() -> None:
    base = requests_table(1).drop_columns(["request_id"])
    seeds = [pa.array([8], kind) for kind in (pa.int64(), pa.int8(), pa.uint64(), pa.float32())] + [pa.array(["8"])]

    assert len({ids_of(base.append_column("seed", seed))[0] for seed in seeds}) == 1
    assert len({ids_of(base.append_column("fps", pa.array([fps])))[0] for fps in (8, 8.0, "8", "8.0")}) == 1


def test_rejected_rows_have_no_id_by_content_and_do_not_contradict_valid_ones(tmp_path: Path) -> None:
    table = requests_table(3, prompt=["p"] * 3, image=["a.png"] * 3, seed=pa.array([None, "x", None], pa.string()))
    folder = put(tmp_path / "m", {"a.parquet": table.drop_columns(["request_id"])})

    plan = make_plan(config_of(folder))

    assert (plan.num_pending, plan.num_duplicates, plan.num_rejected) == (1, 1, 1)
    assert plan.rejected["request_id"].to_pylist() == [None]
    assert "a.parquet row 1: column 'seed'" in plan.rejected["error"][0].as_py()


# --- location ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["parquet", "jsonl", "csv"])
def test_a_location_is_the_path_below_the_folder_and_the_row(origin: str, tmp_path: Path) -> None:
    table = requests_table(5).drop_columns(["request_id"])
    folder = tmp_path / "m" / "day 1"
    folder.mkdir(parents=True)
    path = folder / f"a.{origin}"
    if origin == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif origin == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, table.to_pylist())))
    else:
        table.to_pandas().to_csv(path, index=False)

    assert ids_in(tmp_path / "m", "location") == [f"day 1/a.{origin}#{row}" for row in range(5)]
    assert ids_in(path, "location") == [f"a.{origin}#{row}" for row in range(5)]


def test_a_piece_for_one_worker_has_the_ids_of_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pia_batch.manifest.pieces.PIECE_BYTES", 1)
    folder = put(tmp_path / "m", {"a.parquet": requests_table(5).drop_columns(["request_id"])})
    found = Manifest.open(str(folder), column_map=ColumnMap.of(config_of(folder, "location")))

    pieces = [pa.concat_tables(piece.tables(found.schema))["request_id"].to_pylist() for piece in found.pieces()]

    assert pieces == [["a.parquet#0", "a.parquet#1"], ["a.parquet#2", "a.parquet#3"], ["a.parquet#4"]]


def test_equal_rows_are_requests_of_their_own_by_location(tmp_path: Path) -> None:
    rows = requests_table(3, image=["a.png"] * 3, prompt=["p", "p", " "]).drop_columns(["request_id"])

    plan = make_plan(config_of(put(tmp_path / "m", {"a.parquet": rows}), "location"))

    assert (plan.num_pending, plan.num_duplicates, plan.num_rejected) == (2, 0, 1)
    assert plan.rejected["request_id"].to_pylist() == ["a.parquet#2"]


def planned(folder: Path) -> Plan:
    plan = make_plan(config_of(folder, "location"))
    plan.record_locations()
    return plan


def test_a_file_that_changed_since_a_run_is_refused_and_a_new_one_is_not(tmp_path: Path) -> None:
    rows = requests_table(3).drop_columns(["request_id"])
    folder = put(tmp_path / "m", {"a.parquet": rows, "b.parquet": rows})
    first = planned(folder)
    assert planned(folder).wanted.high.tolist() == first.wanted.high.tolist()

    put(folder, {"c.parquet": rows})
    assert planned(folder).num_pending == 9
    put(folder, {"b.parquet": rows.slice(1)})
    with pytest.raises(ManifestError, match=r"location: 1 of the files .* earlier run: b\.parquet; an id may now"):
        planned(folder)
    (folder / "b.parquet").unlink()
    assert planned(folder).num_pending == 6


def test_what_another_manifest_has_seen_says_nothing_about_this_one(tmp_path: Path) -> None:
    rows = requests_table(3).drop_columns(["request_id"])
    planned(put(tmp_path / "m", {"a.parquet": rows}))

    assert planned(put(tmp_path / "n", {"a.parquet": rows.slice(1)})).num_pending == 2
    os.utime(tmp_path / "m" / "a.parquet", (1, 1))
    with pytest.raises(ManifestError, match="were replaced since an earlier run"):
        planned(tmp_path / "m")
    assert make_plan(config_of(tmp_path / "m", "content")).num_pending == 3


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_manifest_without_ids_names_the_key_the_flag_and_both_choices(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", {"a.parquet": requests_table(1).rename_columns(["key", "image", "prompt"])})

    with pytest.raises(ManifestError) as caught:
        make_plan(config_of(folder, "column"))

    for words in ("no column 'request_id'", "--column request_id=key", "request_id_from (--request-id-from)"):
        assert words in str(caught.value)
    for words in ("content makes them of image, prompt and settings", "location of file and row"):
        assert words in str(caught.value)


@pytest.mark.parametrize("origin", ["content", "location"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "request_id=1/a.parquet"])
def test_a_column_of_ids_next_to_other_ids_is_refused_and_may_be_renamed(
    origin: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "m" / name
    path.parent.mkdir(parents=True)
    table = requests_table(1)
    if name == "a.parquet":
        pq.write_table(table, path)
    elif name == "a.jsonl":
        path.write_text(json.dumps(table.to_pylist()[0]))
    elif name == "a.csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(table.drop_columns(["request_id"]), path)

    with pytest.raises(ManifestError, match=f"request_id_from is {origin}; .* --column source_id=request_id"):
        make_plan(config_of(tmp_path / "m", origin))
    assert make_plan(config_of(tmp_path / "m", origin, columns__source_id="request_id")).num_pending == 1


def test_a_column_of_ids_and_another_origin_contradict_each_other_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"columns\.request_id: request_id_from is content"):
        config_of(tmp_path, columns__request_id="key")
    with pytest.raises(ConfigError, match="request_id_from: must be 'column', 'content' or 'location'"):
        config_of(tmp_path, "hash")
