import hashlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import (
    RecordingStore,
    commit,
    content,
    key,
    keys,
    keyset,
    publish_all,
    published_by,
    results,
    successes,
)

from pia_batch.errors import AccountingError, EncodingError, LeaseHeldError, ObjectExistsError, StorageError
from pia_batch.journal import layout, log
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal, digest_of
from pia_batch.journal.verify import find_problems, repair
from pia_batch.storage.object_store import Store


@pytest.fixture
def record(store: Store) -> Journal:
    return Journal(RecordingStore(store.uri))


# --- appending and reading -------------------------------------------------------------------------------------------


def test_the_same_outcome_is_committed_once_whatever_else_its_rows_say(record: Journal) -> None:
    first = commit(record, {1: "succeeded", 2: "failed"}, note="first")
    again = commit(record, {2: "failed", 1: "succeeded"}, note="again")
    other = commit(record, {2: "succeeded", 1: "failed"}, note="other")

    assert first == again
    assert record.fragments() == sorted([first, other])
    (table,) = record.read([first])
    assert table["run_id"].to_pylist() == ["first", "first"]


def test_a_failure_for_another_reason_is_another_outcome_and_the_same_one_is_not(record: Journal) -> None:
    def fail(error: str) -> str:
        table = results(record.store, {1: "failed", 2: "succeeded"})
        at = table.column_names.index("error")
        return record.append(table.set_column(at, "error", pa.array([error, None])))

    gone, late = fail("the image is gone"), fail("the image came too late")

    assert fail("the image is gone") == gone != late
    assert record.fragments() == sorted([gone, late])
    assert successes(record.outcomes()) == {key(1): False, key(2): True}


def test_a_fragment_reads_back_as_it_was_appended(record: Journal) -> None:
    table = results(record.store, {1: "succeeded", 2: "failed"})

    (read,) = record.read([record.append(table)])

    assert read.equals(table)


def test_other_files_of_the_journal_are_no_fragments(record: Journal) -> None:
    record.store.check(layout.CREATE_ONLY_PROBE)

    assert record.fragments() == []
    assert len(record.outcomes().keys) == 0


def test_an_empty_journal_knows_nothing(record: Journal, tmp_path: Path) -> None:
    outcomes = record.outcomes()

    assert successes(outcomes) == {}
    assert outcomes.failures.total() == 0
    assert len(outcomes.succeeded_keys) == 0
    assert len(outcomes.of(keyset(1)).keys) == 0
    assert list(record.winning_rows(outcomes)) == []
    assert not (tmp_path / "out").exists()


def test_a_fragment_without_rows_changes_nothing(record: Journal) -> None:
    record.append(results(record.store, {}))
    commit(record, {1: "failed"})

    assert successes(record.outcomes()) == {key(1): False}


def test_outcomes_know_every_key_once_and_no_other(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "failed"})
    commit(record, {3: "succeeded"})

    outcomes = record.outcomes()

    assert successes(outcomes) == {key(1): True, key(2): False, key(3): True}
    assert outcomes.failures == {"non_finite": 1}
    assert successes(outcomes.of(keyset(2, 3, 99))) == {key(2): False, key(3): True}


def test_a_success_beats_a_failure_in_either_order_of_names(record: Journal) -> None:
    commit(record, {1: "failed", 2: "succeeded"})
    commit(record, {1: "succeeded", 2: "failed"})

    assert successes(record.outcomes()) == {key(1): True, key(2): True}


def test_the_smaller_fragment_name_wins_among_equals(record: Journal) -> None:
    names = [commit(record, {1: "succeeded", other: "failed"}, note=f"with {other}") for other in range(2, 8)]
    smallest = names.index(min(names)) + 2

    outcomes = record.outcomes().of(keyset(1))

    assert outcomes.fragments[outcomes.fragment[0]] == min(names)
    (row,) = pa.concat_tables(record.winning_rows(outcomes)).to_pylist()
    assert (row["key"], row["run_id"]) == (key(1), f"with {smallest}")


FRAGMENT = st.dictionaries(st.integers(0, 7), st.sampled_from(["succeeded", "failed"]), max_size=5)


@settings(max_examples=25, deadline=None)
@given(st.lists(FRAGMENT, max_size=6), st.sets(st.integers(0, 9)))
def test_outcomes_agree_with_a_plain_dict(fragments: list[dict[int, str]], wanted: set[int]) -> None:
    with TemporaryDirectory() as folder:
        record = Journal(Store(folder))
        named = {}
        for index, statuses in enumerate(fragments):
            named.setdefault(record.append(results(record.store, statuses, note=str(index))), (index, statuses))
        best: dict[str, tuple[bool, str, str]] = {}  # key to (failed, fragment, note): the smallest counts
        for name, (index, statuses) in named.items():
            for number, status in statuses.items():
                mine = (status != "succeeded", name, str(index))
                best[key(number)] = min(best.get(key(number), mine), mine)

        outcomes = record.outcomes()

        assert successes(outcomes) == {one: not failed for one, (failed, _, _) in best.items()}
        some = outcomes.of(keyset(*wanted))
        assert set(successes(some)) == {key(number) for number in wanted} & set(best)
        winning = [row for table in record.winning_rows(some) for row in table.to_pylist()]
        assert {row["key"]: row["run_id"] for row in winning} == {one: best[one][2] for one in successes(some)}
        assert len(winning) == len(some.keys)


def flipped(data: bytes, column: str) -> bytes:
    """One bit of the values of a column turned over."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    chunk = metadata.row_group(0).column(metadata.schema.names.index(column))
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    return data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: flipped(data, "key"),
        lambda data: flipped(data, "status"),
        lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
        lambda _: b"",
        lambda _: b"<html>not found</html>",
        lambda _: log.to_parquet(pa.table({"a": [1]})),
    ],
    ids=["cut", "flipped key", "flipped status", "flipped footer", "empty", "text", "another table"],
)
def test_a_damaged_fragment_is_named_and_never_skipped(record: Journal, damage: Callable[[bytes], bytes]) -> None:
    commit(record, {1: "succeeded"})
    name = commit(record, {2: "succeeded"})
    record.store.replace(name, damage(record.store.read(name)))

    with pytest.raises(StorageError, match=f"(?s){name} is damaged.*restore it, or delete it"):
        record.outcomes()


def test_damage_that_only_the_other_columns_have_publishes_nothing(record: Journal) -> None:
    name = commit(record, {1: "succeeded"})
    record.store.replace(name, flipped(record.store.read(name), "sha256"))

    with pytest.raises(StorageError, match=f"{name} is damaged"):
        publish_all(record, 1)

    assert published_by(record) == []


def test_digests_are_equal_where_outcomes_are_and_only_there(record: Journal) -> None:
    seen = [digest_of(record.outcomes())]
    commit(record, {1: "succeeded", 2: "failed"})
    seen.append(digest_of(record.outcomes()))
    commit(record, {2: "failed"})
    assert digest_of(record.outcomes()) == seen[-1]
    commit(record, {2: "succeeded"})
    seen.append(digest_of(record.outcomes()))
    commit(record, {3: "failed"})
    seen.append(digest_of(record.outcomes()))

    assert len(set(seen)) == len(seen)
    assert all(len(digest) == 32 for digest in seen)
    other = Journal(Store(record.store.uri + "-other"))
    commit(other, {3: "failed"})
    commit(other, {1: "succeeded"})
    commit(other, {2: "succeeded"})
    assert digest_of(other.outcomes()) == seen[-1]


def test_an_animation_lies_where_no_manifest_can_name(record: Journal) -> None:
    del record
    assert animation_name("ab" * 16, "gif") == f"animations/ab/{'ab' * 16}.gif"


# --- verifying -------------------------------------------------------------------------------------------------------


def accept(data: bytes, row: dict[str, Any]) -> None:
    """Stands for the decoder; knows what was stored."""
    if data != content(int(row["request_id"].removeprefix("r"))):
        msg = "not a complete gif file of ours"
        raise EncodingError(msg)


def accept_poster(data: bytes, row: dict[str, Any]) -> None:
    """Stands for the decoder of posters."""
    if data != b"poster of " + content(int(row["request_id"].removeprefix("r"))):
        raise EncodingError("not a complete JPEG")


def problems(record: Journal) -> dict[str, str]:
    return {
        found.request_id: f"{found.kind}: {found.detail}"
        for found in find_problems(record, record.outcomes(), accept, accept_poster)
    }


def test_verify_finds_nothing_where_all_is_well_or_nothing_is_there(record: Journal) -> None:
    assert problems(record) == {}
    commit(record, {1: "failed"})
    assert problems(record) == {}
    commit(record, {1: "succeeded", 2: "succeeded", 3: "failed"})
    assert problems(record) == {}


def test_verify_finds_missing_changed_and_resized_animations_and_no_valid_ones(record: Journal) -> None:
    commit(record, dict.fromkeys(range(5), "succeeded"))
    record.store.replace(animation_name(key(1), "gif"), content(1)[::-1])
    record.store.replace(animation_name(key(2), "gif"), content(2) + b" ")
    Path(record.store.uri.removeprefix("file://"), animation_name(key(3), "gif")).unlink()

    assert problems(record) == {
        "r001": "content: its bytes are not those that were committed",
        "r002": f"size: it has {len(content(2)) + 1} bytes, its result states {len(content(2))}",
        "r003": "missing: it does not exist",
    }
    assert {found.uri for found in find_problems(record, record.outcomes(), accept, accept_poster)} == {
        record.store.uri_of(animation_name(key(number), "gif")) for number in (1, 2, 3)
    }


def test_verify_finds_what_was_committed_but_does_not_decode(record: Journal) -> None:
    table = results(record.store, {1: "succeeded"})
    for column, value in {"sha256": hashlib.sha256(b"broken").hexdigest(), "num_bytes": len(b"broken")}.items():
        table = table.set_column(table.column_names.index(column), column, pa.array([value]))
    record.store.create(animation_name(key(1), "gif"), b"broken")
    record.append(table)

    assert problems(record) == {"r001": "undecodable: not a complete gif file of ours"}


def commit_with_posters(record: Journal, *numbers: int) -> None:
    """Store animations and posters, then one fragment for all."""
    table = results(record.store, dict.fromkeys(numbers, "succeeded"))
    data = [b"poster of " + content(number) for number in numbers]
    for number, poster in zip(numbers, data, strict=True):
        record.store.create(animation_name(key(number), "gif"), content(number))
        record.store.create(layout.poster_name(key(number)), poster)
    for column, values in {
        "poster_uri": [record.store.uri_of(layout.poster_name(key(number))) for number in numbers],
        "poster_num_bytes": [len(poster) for poster in data],
        "poster_sha256": [hashlib.sha256(poster).hexdigest() for poster in data],
    }.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    record.append(table)


def test_verify_finds_broken_posters_and_repair_keeps_their_animations(record: Journal) -> None:
    commit(record, {9: "succeeded"})  # has no poster
    commit_with_posters(record, *range(5))
    assert problems(record) == {}
    poster = b"poster of " + content(1)
    record.store.replace(layout.poster_name(key(1)), poster[::-1])
    record.store.replace(layout.poster_name(key(2)), poster + b" ")
    record.store.delete(layout.poster_name(key(3)))
    record.store.replace(animation_name(key(4), "gif"), b"cut")
    seen = record.outcomes()

    assert {number: found.partition(":")[0] for number, found in problems(record).items()} == {
        "r001": "content", "r002": "size", "r003": "missing", "r004": "size",
    }  # fmt: skip
    assert {found.uri for found in find_problems(record, seen, accept, accept_poster)} == {
        *(record.store.uri_of(layout.poster_name(key(number))) for number in (1, 2, 3)),
        record.store.uri_of(animation_name(key(4), "gif")),
    }
    repair(record, seen, find_problems(record, seen, accept, accept_poster), held)
    left = {item.name for item in record.store.list("animations/")}
    assert left == {
        *(animation_name(key(number), "gif") for number in (0, 1, 2, 3, 9)),
        layout.poster_name(key(0)),  # the poster of a broken animation shows what nobody has any more
    }
    assert record.outcomes().needs_regeneration == 4


def test_results_with_a_missing_poster_are_not_published(record: Journal) -> None:
    commit_with_posters(record, 1, 2)
    assert publish_all(record, 1, 2).num_succeeded == 2
    record.store.delete(layout.poster_name(key(2)))

    with pytest.raises(AccountingError, match=r"poster .*\.jpg of request 'r002' is missing"):
        publish_all(record, 1, 2)


def test_verify_looks_at_every_animation_of_many_small_fragments_and_counts_them(record: Journal) -> None:
    for number in range(80):
        commit(record, {number: "succeeded"})
    Path(record.store.uri.removeprefix("file://"), animation_name(key(79), "gif")).unlink()
    examined = []

    found = list(find_problems(record, record.outcomes(), accept, accept_poster, lambda: examined.append(None)))

    assert [problem.request_id for problem in found] == ["r079"]
    assert len(examined) == 80


# --- taking back -----------------------------------------------------------------------------------------------------


def held() -> None:
    """No other process works here."""


def test_what_is_removed_is_unknown_until_it_is_committed_again(record: Journal) -> None:
    commit(record, {1: "failed", 2: "succeeded"})
    first = commit(record, {1: "succeeded", 3: "succeeded"})
    digests = [digest_of(record.outcomes())]

    record.add_tombstones(keys(1), record.outcomes())

    outcomes = record.outcomes()
    assert successes(outcomes) == {key(2): True, key(3): True}
    assert outcomes.needs_regeneration == 1
    digests.append(digest_of(outcomes))
    again = commit(record, {1: "succeeded", 3: "succeeded"}, note="again")
    assert again != first
    assert successes(record.outcomes()) == {key(1): True, key(2): True, key(3): True}
    assert record.outcomes().needs_regeneration == 0
    rows = [row for table in record.winning_rows(record.outcomes()) for row in table.to_pylist()]
    assert {row["run_id"] for row in rows if row["key"] == key(1)} == {"again"}
    digests.append(digest_of(record.outcomes()))
    assert len(set(digests)) == 3  # the published results describe the first animation, so they are outdated


def test_the_same_outcome_is_committed_once_after_it_was_removed_too(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    names = []
    for _ in range(2):
        record.add_tombstones(keys(1), record.outcomes())
        names += [commit(record, {1: "succeeded"}), commit(record, {1: "succeeded"})]

    assert names[0] == names[1] != names[2] == names[3]
    assert len(record.fragments()) == 3


def test_taking_back_the_same_twice_or_nothing_at_all_changes_nothing(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "succeeded"})
    seen = record.outcomes()
    record.add_tombstones(keys(), seen)
    assert list(record.store.list(layout.TOMBSTONES)) == []
    record.add_tombstones(keys(1), seen)
    digest = digest_of(record.outcomes())

    record.add_tombstones(keys(1), seen)

    assert digest_of(record.outcomes()) == digest
    assert successes(record.outcomes()) == {key(2): True}


def test_rows_of_a_fragment_that_was_not_seen_are_not_removed(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    seen = record.outcomes()
    commit(record, {1: "succeeded", 2: "failed"}, note="meanwhile")

    record.add_tombstones(keys(1), seen)

    assert successes(record.outcomes()) == {key(1): True, key(2): False}


def test_a_damaged_tombstone_is_named_and_never_skipped(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    record.add_tombstones(keys(1), record.outcomes())
    (item,) = record.store.list(layout.TOMBSTONES)
    record.store.replace(item.name, record.store.read(item.name)[:-5])

    with pytest.raises(StorageError, match=f"{item.name} is damaged"):
        record.outcomes()


STEP = st.one_of(
    st.tuples(st.just("commit"), FRAGMENT),
    st.tuples(st.just("commit again"), st.integers(0, 8)),
    st.tuples(st.just("take back"), st.sets(st.integers(0, 7), max_size=4)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, max_size=9), st.randoms(use_true_random=False), st.integers(0, 20))
def test_what_counts_is_what_was_not_removed_in_whatever_order_the_files_arrive(
    steps: list[tuple[str, Any]], random: Random, cut: int
) -> None:
    with TemporaryDirectory() as folder:
        record = Journal(Store(f"{folder}/one"))
        committed: list[dict[int, str]] = []
        live: list[dict[int, str]] = []  # rows of each commit, less those that were removed since
        for what, argument in steps:
            if what == "take back":
                record.add_tombstones(keys(*argument), record.outcomes())
                live = [{n: status for n, status in commit_rows.items() if n not in argument} for commit_rows in live]
                continue
            if what == "commit again":
                argument = committed[argument % len(committed)] if committed else {}  # noqa: PLW2901
            record.append(results(record.store, argument))
            committed.append(argument)
            live.append(argument)
        expected: dict[str, bool] = {}
        for commit_rows in live:
            for number, status in commit_rows.items():
                expected[key(number)] = expected.get(key(number), False) or status == "succeeded"

        assert successes(record.outcomes()) == expected

        names = [item.name for item in record.store.list("")]
        random.shuffle(names)
        other = Journal(Store(f"{folder}/two"))
        for index, name in enumerate(names):
            if index == cut:
                other.outcomes()  # a reader in between must not trip over what has not arrived
            other.store.create(name, record.store.read(name))
        mine, theirs = record.outcomes(), other.outcomes()
        assert successes(theirs) == expected
        assert digest_of(theirs) == digest_of(mine)
        assert theirs.needs_regeneration == mine.needs_regeneration


def test_repair_removes_what_is_broken_and_nothing_else(record: Journal) -> None:
    commit(record, dict.fromkeys(range(6), "succeeded"))
    commit(record, {9: "failed"})
    root = Path(record.store.uri.removeprefix("file://"))
    (root / animation_name(key(1), "gif")).unlink()
    record.store.replace(animation_name(key(2), "gif"), b"cut")
    before = {path: path.stat().st_mtime_ns for path in (root / "animations").rglob("*.gif")}
    seen = record.outcomes()

    repair(record, seen, find_problems(record, seen, accept, accept_poster), held)

    broken = root / animation_name(key(2), "gif")
    del before[broken]
    assert {path: path.stat().st_mtime_ns for path in (root / "animations").rglob("*.gif")} == before
    assert successes(record.outcomes()) == {key(0): True} | {key(n): True for n in (3, 4, 5)} | {key(9): False}
    assert problems(record) == {}
    commit(record, {1: "succeeded", 2: "succeeded"})
    assert publish_all(record, *range(6), 9).num_succeeded == 6


def test_a_repair_that_is_overtaken_or_killed_is_found_again(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "succeeded"})
    for number in (1, 2):
        record.store.replace(animation_name(key(number), "gif"), b"cut")
    seen = record.outcomes()
    asked = iter([True])

    def overtaken() -> None:
        if not next(asked, False):
            raise LeaseHeldError("another run")

    with pytest.raises(LeaseHeldError):
        repair(record, seen, find_problems(record, seen, accept, accept_poster), overtaken)

    assert sorted(what.split(":")[0] for what in problems(record).values()) == ["missing", "size"]
    repair(record, seen, find_problems(record, seen, accept, accept_poster), held)
    assert record.outcomes().needs_regeneration == 2


@pytest.mark.s3
def test_append_outcomes_publish_and_verify_work_on_s3(s3: str) -> None:
    record = Journal(Store(s3))
    commit(record, {1: "failed", 2: "succeeded"})
    commit(record, {1: "failed", 2: "succeeded"})
    commit(record, {1: "succeeded"})

    published = publish_all(record, 1, 2)

    assert (published.num_succeeded, published.num_failed) == (2, 0)
    (part,) = record.read(["results/run-1/part-00000.parquet"])
    assert part["status"].to_pylist() == ["succeeded", "succeeded"]
    assert problems(record) == {}
    assert np.array_equal(record.outcomes().succeeded, [True, True])
    record.store.delete(animation_name(key(2), "gif"))
    seen = record.outcomes()
    repair(record, seen, find_problems(record, seen, accept, accept_poster), held)
    assert successes(record.outcomes()) == {key(1): True}
    commit(record, {1: "failed", 2: "succeeded"})
    assert successes(record.outcomes()) == {key(1): True, key(2): True}
    with pytest.raises(ObjectExistsError):
        record.store.create(record.fragments()[0], b"")
