"""The journal's index: with it, with a part of it, or without it, outcomes are the same."""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import commit, key, keys, keyset, results, successes

from pia_batch.errors import StorageError
from pia_batch.journal import layout, log, pack_index
from pia_batch.journal.compaction import MIN_UNINDEXED_FRAGMENTS, Compactor
from pia_batch.journal.log import Journal, Outcomes, digest_of
from pia_batch.schema.keys import keys_to_hex
from pia_batch.storage.object_store import Store


class CountingStore(Store):
    """Remembers which objects it was asked for."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.asked: list[str] = []

    def read(self, name: str) -> bytes:
        self.asked.append(name)
        return super().read(name)

    @property
    def fragments_read(self) -> int:
        return sum(name.startswith("_journal/") and "/index/" not in name for name in self.asked)


@pytest.fixture
def record(store: Store) -> Journal:
    return Journal(store)


def contents(outcomes: Outcomes) -> tuple[Any, ...]:
    """Everything that outcomes say."""
    rows = zip(
        keys_to_hex(outcomes.keys).to_pylist(),
        outcomes.succeeded.tolist(),
        [outcomes.fragments[number] for number in outcomes.fragment],
        [outcomes.kinds[code] for code in outcomes.kind],
        strict=True,
    )
    return list(rows), outcomes.fragments, outcomes.removed.tobytes(), outcomes.failures, digest_of(outcomes)


def index_of(record: Journal) -> list[Path]:
    return sorted(Path(record.store.uri.removeprefix("file://"), layout.FRAGMENT_INDEX).glob("*"))


def without_index(record: Journal) -> Outcomes:
    """The truth: outcomes of a journal whose index cannot be found."""

    class Hidden(Store):
        def list(self, prefix: str) -> Any:
            return iter(()) if prefix == layout.FRAGMENT_INDEX else super().list(prefix)

    return Journal(Hidden(record.store.uri)).outcomes()


FRAGMENT = st.dictionaries(st.integers(0, 7), st.sampled_from(["succeeded", "failed"]), max_size=5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), FRAGMENT),
        st.tuples(st.just("add tombstones"), st.sets(st.integers(0, 7), max_size=3)),
        st.tuples(st.just("see"), st.none()),
        st.tuples(st.just("add late tombstones"), st.sets(st.integers(0, 7), max_size=3)),
        st.tuples(st.just("compact"), st.sampled_from(["mine", "theirs"])),
        st.tuples(st.just("lose"), st.integers(0, 9)),
        st.tuples(st.just("delete fragment"), st.integers(0, 9)),
    ),
    max_size=14,
)


@settings(max_examples=30, deadline=None)
@given(STEPS, st.sampled_from([pack_index.PACK_BYTES, 150]))
def test_outcomes_are_the_same_with_and_without_an_index(steps: list[tuple[str, Any]], pack_bytes: int) -> None:
    """Commits, retries, withdrawals by what was seen long ago, compactions by two, and objects that go away."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_index, "PACK_BYTES", pack_bytes)
        record, other = Journal(Store(folder)), Journal(Store(folder))
        seen = record.outcomes()
        for verb, argument in steps:
            if verb == "commit":
                record.append(results(record.store, argument))
            elif verb == "add tombstones":
                record.add_tombstones(keys(*argument), record.outcomes())
            elif verb == "see":
                seen = other.outcomes()
            elif verb == "add late tombstones" and set(seen.fragments) <= set(record.fragments()):
                record.add_tombstones(keys(*argument), seen)
            elif verb == "compact":
                (record if argument == "mine" else other).compact()
            elif verb == "lose" and (files := index_of(record)):
                files[argument % len(files)].unlink()
            elif verb == "delete fragment" and (names := record.fragments()):
                record.store.delete(names[argument % len(names)])
                seen = other.outcomes()
            assert contents(record.outcomes()) == contents(without_index(record))
        winning = [row["key"] for table in record.winning_rows(record.outcomes()) for row in table.to_pylist()]
        assert sorted(winning) == sorted(successes(record.outcomes()))


def test_a_compacted_journal_is_read_without_its_fragments(record: Journal) -> None:
    for number in range(20):
        commit(record, {number: "succeeded", 100 + number: "failed"})
    truth = contents(record.outcomes())

    assert record.compact() == 20
    assert record.compact() == 0

    store = CountingStore(record.store.uri)
    assert contents(Journal(store).outcomes()) == truth
    assert store.fragments_read == 0
    late = commit(record, {7: "succeeded", 107: "succeeded"})  # a zombie's
    assert contents(Journal(store).outcomes()) == contents(without_index(record)) != truth
    assert store.fragments_read == 1
    assert late in Journal(store).outcomes().fragments


def test_what_was_taken_back_stays_so_though_the_index_has_it(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "succeeded"})
    record.compact()

    record.add_tombstones(keys(1), record.outcomes())
    assert successes(record.outcomes()) == {key(2): True}
    record.compact()
    assert successes(Journal(record.store).outcomes()) == {key(2): True}

    commit(record, {1: "failed"})
    record.compact()
    assert successes(Journal(record.store).outcomes()) == {key(1): False, key(2): True}


def test_taking_back_needs_no_fragment_that_is_indexed(record: Journal) -> None:
    for number in range(5):
        commit(record, {number: "succeeded"})
    record.compact()
    store = CountingStore(record.store.uri)

    Journal(store).add_tombstones(keys(1, 3), Journal(store).outcomes())

    assert store.fragments_read == 0
    assert set(successes(record.outcomes())) == {key(0), key(2), key(4)}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_without_a_part_of_its_index_a_journal_has_the_same_outcomes(
    record: Journal, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    commit(record, {1: "succeeded", 2: "failed"})
    record.compact()
    truth = contents(record.outcomes())

    for path in index_of(record):
        data = path.read_bytes()
        damage(path)
        caplog.clear()
        assert contents(Journal(record.store).outcomes()) == truth
        assert "index_damaged" in caplog.text or not path.exists()
        path.write_bytes(data)


def test_a_damaged_fragment_stops_the_compaction_and_is_named(record: Journal) -> None:
    name = commit(record, {1: "succeeded"})
    record.store.replace(name, b"")

    with pytest.raises(StorageError, match=f"{name} is damaged"):
        record.compact()

    assert index_of(record) == []


def test_compaction_goes_by_portions_of_which_the_earlier_ones_stay(
    record: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "FRAGMENTS_PER_STEP", 2)
    for number in range(5):
        commit(record, {number: "succeeded"})
    last = max(record.fragments())
    data = record.store.read(last)
    record.store.replace(last, b"")

    with pytest.raises(StorageError):
        record.compact()
    record.store.replace(last, data)

    store = CountingStore(record.store.uri)
    assert len(Journal(store).outcomes().keys) == 5
    assert store.fragments_read == 1
    assert Journal(store).compact() == 1


def test_outcomes_by_the_index_are_at_least_five_times_cheaper_than_by_fragments(record: Journal) -> None:
    for number in range(0, 150 * 20, 20):
        record.append(results(record.store, dict.fromkeys(range(number, number + 20), "succeeded")))

    def seconds() -> float:
        start = time.process_time()
        assert len(Journal(record.store).outcomes().keys) == 3000
        return time.process_time() - start

    by_fragments = seconds()
    record.compact()

    assert by_fragments > 5 * min(seconds(), seconds())


# --- while a run goes on ---------------------------------------------------------------------------------------------


def commit_many(record: Journal, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        record.append(results(record.store, {number: "failed"}))


def test_a_run_compacts_as_it_goes_and_at_its_end(record: Journal) -> None:
    compactor = Compactor(Journal(record.store), batch_size=2, fragments=32)
    commit_many(record, MIN_UNINDEXED_FRAGMENTS)

    compactor.record_committed(63)
    assert index_of(record) == []
    compactor.record_committed(64)
    compactor.finish()
    first = index_of(record)
    assert len(first) == 2

    compactor.finish()
    assert index_of(record) == first
    commit_many(record, MIN_UNINDEXED_FRAGMENTS, start=MIN_UNINDEXED_FRAGMENTS)
    compactor.finish()

    store = CountingStore(record.store.uri)
    assert len(Journal(store).outcomes().keys) == 2 * MIN_UNINDEXED_FRAGMENTS
    assert store.fragments_read == 0


def test_a_few_fragments_are_not_worth_an_index(record: Journal) -> None:
    commit_many(record, MIN_UNINDEXED_FRAGMENTS - 1)

    Compactor(record, batch_size=1).finish()

    assert index_of(record) == []


def test_compactions_become_rarer_as_the_journal_grows(store: Store) -> None:
    committed: list[int] = []

    class Recording(Journal):
        def compact(self, at_least: int = 1) -> int:
            committed.append(at_least)
            return at_least

    compactor = Compactor(Recording(store), batch_size=1, fragments=10)

    for rows in range(0, 64_000, 10):
        compactor.record_committed(rows)
        if compactor._thread is not None:
            compactor._thread.join()

    assert 64 < len(committed) - 1 < 400  # 6,400 if each waited for ten rows only


def test_one_compaction_at_a_time(store: Store) -> None:
    going, may_end, calls = threading.Event(), threading.Event(), itertools.count()

    class Slow(Journal):
        def compact(self, at_least: int = 1) -> int:
            next(calls)
            going.set()
            may_end.wait(60)
            return at_least

    compactor = Compactor(Slow(store), batch_size=1, fragments=1)
    compactor.record_committed(1)
    going.wait(60)
    compactor.record_committed(2)
    compactor.record_committed(3)
    may_end.set()
    compactor.finish()

    assert next(calls) == 2


def test_a_compaction_that_fails_ends_no_run(record: Journal, caplog: pytest.LogCaptureFixture) -> None:
    commit_many(record, MIN_UNINDEXED_FRAGMENTS)
    record.store.replace(record.fragments()[0], b"")

    with caplog.at_level(logging.WARNING):
        Compactor(record, batch_size=1).finish()

    assert "compaction_failed" in caplog.text


@pytest.mark.long
@pytest.mark.s3
def test_two_that_compact_at_once_do_no_harm_on_s3(s3: str) -> None:
    store = Store(f"{s3}/compaction")
    writer = Journal(store)
    random = Random(3)
    for number in range(40):
        writer.append(results(store, {number: random.choice(["succeeded", "failed"]), number // 2: "succeeded"}))
    both = [Journal(Store(store.uri)) for _ in range(2)]
    threads = [threading.Thread(target=one.compact) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    counting = CountingStore(store.uri)
    outcomes = Journal(counting).outcomes()

    assert contents(outcomes) == contents(without_index(writer))
    assert counting.fragments_read == 0
    assert np.array_equal(outcomes.of(keyset(1)).succeeded, [True])
    assert isinstance(outcomes.fragments, tuple)
    assert pa.table({"keys": keys_to_hex(outcomes.keys)}).num_rows == 40
