import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from journals import SHOP, RecordingStore, commit, key, keyset, publish_all, published_by, results, rows_of

from pia_batch.errors import AccountingError
from pia_batch.journal import log
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal, digest_of, to_parquet
from pia_batch.journal.results import publish, read_latest
from pia_batch.schema.columns import RESULT
from pia_batch.storage.object_store import ObjectInfo, Store


@pytest.fixture
def record(store: Store) -> Journal:
    return Journal(RecordingStore(store.uri))


def complete(record: Journal) -> bool:
    return bool({"results/run-1/_SUCCESS.json", "results/LATEST.json"} & set(published_by(record)))


def test_results_have_one_row_for_each_wanted_request_and_no_other(record: Journal) -> None:
    commit(record, {1: "failed", 2: "failed", 3: "succeeded", 50: "succeeded"})
    commit(record, {2: "succeeded"})

    published = publish_all(record, 1, 2, 3)

    assert (published.num_requests, published.num_succeeded, published.num_failed) == (3, 2, 1)
    assert published.uri == record.store.uri_of("results/run-1")
    rows = rows_of(record)
    assert [(row["request_id"], row["status"]) for row in rows] == [
        ("r001", "failed"),
        ("r002", "succeeded"),
        ("r003", "succeeded"),
    ]
    assert [row["shop"] for row in rows] == ["shop 1", "shop 2", "shop 3"]
    (part,) = record.read(["results/run-1/part-00000.parquet"])
    assert part.schema == pa.schema([*RESULT, *SHOP])


def test_success_json_comes_after_all_parts_and_latest_points_at_it(record: Journal) -> None:
    commit(record, {1: "failed", 3: "succeeded"})

    publish_all(record, 1, 3, manifest="s3://bucket/manifest")

    assert published_by(record) == [
        "results/run-1/part-00000.parquet",
        "results/run-1/_SUCCESS.json",
        "results/LATEST.json",
    ]
    state = json.loads(record.store.read("results/run-1/_SUCCESS.json"))
    assert state.pop("published_at")
    digest = digest_of(record.outcomes())
    assert state == {
        "run_id": "run-1",
        "requests": 2,
        "succeeded": 1,
        "failed": 1,
        "parts": [{"name": "part-00000.parquet", "rows": 2}],
        "digest": digest,
        "manifest": "s3://bucket/manifest",
        "dataset": {"media": "file", "rows": 1},
    }
    assert read_latest(record.store) == {"run_id": "run-1", "digest": digest}


def test_rows_that_are_not_those_of_the_index_publish_nothing(record: Journal) -> None:
    """Only manual changes can cause this: a fragment with another row than the one that was indexed under its name."""
    name = commit(record, {1: "succeeded", 2: "failed"})
    commit(record, {3: "failed"})
    record.compact()
    commit(record, {4: "failed"})
    other = next(table for table in record.read(record.fragments()) if table["request_id"].to_pylist() == ["r004"])
    swapped = pa.concat_tables([other, next(record.read([name])).slice(0, 1)])
    record.store.replace(name, to_parquet(swapped))

    with pytest.raises(AccountingError, match=r"_journal/index/ does not match .*; delete the index"):
        publish_all(record, 1, 2, 3)

    assert not complete(record)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_rows_come_in_the_same_order_however_many_are_looked_at_together(
    record: Journal, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    for start in range(0, 12, 3):
        commit(record, dict.fromkeys(range(start, start + 3), "failed"))
    commit(record, dict.fromkeys(range(1, 9, 2), "succeeded"))
    outcomes = record.outcomes()
    digest = digest_of(outcomes)
    whole = pa.concat_tables(record.winning_rows(outcomes))
    monkeypatch.setattr(log, "ROWS_PER_STEP", at_once)

    assert pa.concat_tables(record.winning_rows(outcomes)).equals(whole)
    assert sorted(whole["request_id"].to_pylist()) == [f"r{number:03d}" for number in range(12)]
    assert digest_of(outcomes) == digest


def test_there_is_no_latest_before_the_first_complete_run(record: Journal) -> None:
    assert read_latest(record.store) is None


def test_a_request_without_result_publishes_nothing(record: Journal) -> None:
    commit(record, {1: "succeeded"})

    with pytest.raises(AccountingError, match="2 of 3 requests have no result yet; start the run again"):
        publish_all(record, 1, 2, 3)

    assert published_by(record) == []


def test_a_missing_animation_publishes_nothing(record: Journal) -> None:
    record.append(results(record.store, {1: "succeeded"}))

    with pytest.raises(
        AccountingError, match=r"of request 'r001' is missing, its result states \d+ bytes; `pia-batch verify --repair`"
    ):
        publish_all(record, 1)

    assert not complete(record)


def test_an_animation_of_another_size_publishes_nothing(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "succeeded"})
    record.store.replace(animation_name(key(2), "gif"), b"short")

    with pytest.raises(AccountingError, match="of request 'r002' has 5 bytes, its result states"):
        publish_all(record, 1, 2)

    assert not complete(record)


def test_a_late_missing_animation_leaves_no_complete_results(record: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pia_batch.journal.results.PART_ROWS", 1)
    for number in (1, 2, 3):
        commit(record, {number: "succeeded"})
    last = max(record.fragments())
    (table,) = record.read([last])
    record.store.replace(animation_name(table["key"][0].as_py(), "gif"), b"")

    with pytest.raises(AccountingError):
        publish_all(record, 1, 2, 3)

    assert not complete(record)


def test_animations_are_listed_folder_by_folder_and_never_all_at_once(store: Store) -> None:
    listed: list[str] = []

    class Listing(Store):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            listed.append(prefix)
            return super().list(prefix)

    record = Journal(Listing(store.uri))
    commit(record, dict.fromkeys(range(40), "succeeded"))
    listed.clear()

    publish(record, record.outcomes(), keyset(*range(40)), SHOP, "run-1", {})

    folders = {f"animations/{key(number)[:2]}/" for number in range(40)}
    assert sorted(prefix for prefix in listed if prefix.startswith("animations/")) == sorted(folders)


def test_publishing_twice_gives_the_same_files(record: Journal) -> None:
    commit(record, {1: "failed", 2: "succeeded"})
    commit(record, {3: "succeeded"})

    def files() -> dict[str, Any]:
        found = {item.name: record.store.read(item.name) for item in record.store.list("results/")}
        success = json.loads(found.pop("results/run-1/_SUCCESS.json"))
        return found | {"success": {name: value for name, value in success.items() if name != "published_at"}}

    publish_all(record, 1, 2, 3)
    first = files()
    publish_all(record, 1, 2, 3)

    assert files() == first


def test_more_rows_than_a_part_holds_make_several_parts_of_one_schema(
    record: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pia_batch.journal.results.PART_ROWS", 4)
    commit(record, dict.fromkeys(range(10), "failed"))  # no success here: null columns must keep their types
    for number in range(10, 17):
        commit(record, {number: "succeeded"})

    publish_all(record, *range(17))

    state = json.loads(record.store.read("results/run-1/_SUCCESS.json"))
    assert [part["rows"] for part in state["parts"]] == [4, 4, 4, 4, 1]
    parts = list(record.read([f"results/run-1/{part['name']}" for part in state["parts"]]))
    assert [len(part) for part in parts] == [4, 4, 4, 4, 1]
    assert {part.schema == pa.schema([*RESULT, *SHOP]) for part in parts} == {True}
    assert (state["succeeded"], state["failed"]) == (7, 10)
    assert [row["request_id"] for row in rows_of(record)] == [f"r{number:03d}" for number in range(17)]
    for part in parts:
        assert part["request_id"].to_pylist() == sorted(part["request_id"].to_pylist())


def test_carried_columns_that_came_changed_their_type_or_went_are_conformed(
    record: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    commit(record, {1: "succeeded"}, shops=pa.array([7]))
    commit(record, {2: "succeeded"}, shops=pa.array(["8"]))
    commit(record, {3: "succeeded"}, shops=pa.array(["not a number"]))
    commit(record, {4: "succeeded"}, shops=pa.array([9], pa.int16()))
    carried = pa.schema([("shop", pa.int64()), ("added", pa.list_(pa.string()))])

    publish(record, record.outcomes(), keyset(1, 2, 3, 4), carried, "run-1", {})

    assert [(row["shop"], row["added"]) for row in rows_of(record)] == [(7, None), (8, None), (None, None), (9, None)]
    assert "carried_column_changed name=shop old=string new=int64" in caplog.text
    publish(record, record.outcomes(), keyset(1, 2, 3, 4), pa.schema([]), "run-2", {})
    (part,) = record.read(["results/run-2/part-00000.parquet"])
    assert part.schema == RESULT
