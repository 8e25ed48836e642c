import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from journals import SHOP, commit, key, keys, keyset, outages, results, successes

from pia_batch.errors import LeaseHeldError, StorageError, UnwritableStoreError
from pia_batch.journal import layout
from pia_batch.journal.garbage_collection import delete_garbage, find_garbage, make_room
from pia_batch.journal.layout import LEASES, animation_name, lease_name, poster_name
from pia_batch.journal.lease import Lease, read_newest_lease
from pia_batch.journal.log import Journal
from pia_batch.journal.pack_index import Head, PackIndex
from pia_batch.journal.results import publish
from pia_batch.journal.rows import INDEX_ENTRY
from pia_batch.storage.object_store import Store

DAY_S = 86_400.0


@pytest.fixture
def record(store: Store) -> Journal:
    return Journal(store)


def root_of(record: Journal) -> Path:
    return Path(record.store.uri.removeprefix("file://"))


def age(record: Journal, days: float, *names: str) -> None:
    """Make objects look as if they were written some days ago; all of them by default."""
    then = time.time() - days * DAY_S
    for path in [root_of(record) / name for name in names] or root_of(record).rglob("*"):
        os.utime(path, (then, then))


def found(record: Journal, days: float = 7) -> dict[str, set[str]]:
    sorts: dict[str, set[str]] = {}
    for item in find_garbage(record, time.time() - days * DAY_S):
        sorts.setdefault(item.kind, set()).add(item.info.name)
    return sorts


def on() -> None:
    """No run has come."""


def test_an_output_without_garbage_has_none_however_old_it_is(record: Journal) -> None:
    record.store.check(layout.CREATE_ONLY_PROBE)
    commit(record, {1: "succeeded", 2: "failed"})
    publish(record, record.outcomes(), keyset(1, 2), SHOP, "run-1", {})
    record.store.create("_runs/run-1/run.json", b"{}")
    record.store.create("_runs/run-1/report.html", b"")
    for generation in range(1, 4):
        record.store.create(lease_name(generation), b"{}")
    age(record, 1000)

    assert found(record) == {}
    assert found(Journal(Store(record.store.uri + "-nothing"))) == {}


def test_an_animation_that_no_result_names_is_garbage_once_it_is_old(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "failed"})
    orphans = {animation_name(key(number), "gif") for number in (2, 3, 4)}  # failed, unknown, and young
    orphans.add(poster_name(key(3)))
    record.store.create(poster_name(key(1)), b"in use")
    for name in orphans:
        record.store.create(name, b"orphan")
    age(record, 8)
    age(record, 6, animation_name(key(4), "gif"))

    assert found(record) == {"animations": orphans - {animation_name(key(4), "gif")}}
    assert found(record, days=5) == {"animations": orphans}
    assert found(record, days=9) == {}


def test_what_others_have_put_there_is_not_ours_to_remove(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    for name in (
        "animations/readme.txt",
        "animations/ab/notes.gif",
        f"animations/00/{'ab' * 16}.gif",
        f"animations/ab/{'AB' * 16}.gif",
        f"animations/ab/{'ab' * 16}.gif.bak",
        "results/readme.txt",
        "_lease/readme.txt",
        "other/ab.mp4",
        f"other/{'ab' * 16}.mp4#1",
    ):
        path = root_of(record) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"theirs")
    age(record, 100)

    assert found(record) == {}


def test_unfinished_files_of_a_local_store_are_found_though_no_listing_shows_them(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    names = {f"{animation_name(key(1), 'mp4')}#1", "_journal/0.parquet#12", "results/run-1/part-00000.parquet#3"}
    for name in names:
        path = root_of(record) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    age(record, 8)
    (root_of(record) / "animations" / "young.gif#1").write_bytes(b"being written")
    listed = {item.name for prefix in ("animations/", "_journal/", "results/") for item in record.store.list(prefix)}

    assert not listed & names
    assert found(record) == {"staged": names}


def test_old_generations_of_the_lease_are_garbage_but_for_the_newest(record: Journal) -> None:
    for generation in range(1, 12):
        record.store.create(lease_name(generation), b"{}")
    age(record, 30)
    age(record, 1, lease_name(7))

    assert found(record) == {"leases": {lease_name(generation) for generation in (1, 2, 3, 4, 5, 6, 8)}}
    assert all(name.startswith(LEASES) for name in found(record)["leases"])


def test_results_without_success_json_are_garbage_when_all_of_them_are_old(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    publish(record, record.outcomes(), keyset(1), SHOP, "complete", {})
    for run_id in ("dead", "going-on"):
        for part in range(2):
            record.store.create(f"results/{run_id}/part-{part:05d}.parquet", b"x")
    age(record, 8)
    age(record, 1, "results/going-on/part-00001.parquet")

    assert found(record) == {"results": {"results/dead/part-00000.parquet", "results/dead/part-00001.parquet"}}


def test_what_the_newest_results_name_stays_also_where_it_was_taken_back(record: Journal) -> None:
    commit(record, {1: "succeeded", 2: "succeeded"})
    publish(record, record.outcomes(), keyset(1), SHOP, "run-1", {})
    record.add_tombstones(keys(1, 2), record.outcomes())
    age(record, 8)

    assert found(record) == {"animations": {animation_name(key(2), "gif")}}


def test_a_commit_between_the_first_look_and_the_listing_saves_its_animation(record: Journal) -> None:
    commit(record, {1: "succeeded"})
    for number in (2, 3):
        record.store.create(animation_name(key(number), "gif"), b"orphan")
    age(record, 8)

    class LateStore(Store):
        """Another worker commits as soon as the animations are listed."""

        def list(self, prefix):
            if prefix == layout.ANIMATIONS:
                record.append(results(record.store, {2: "succeeded"}))
            return super().list(prefix)

    assert found(Journal(LateStore(record.store.uri))) == {"animations": {animation_name(key(3), "gif")}}


def test_a_damaged_journal_ends_the_search_before_anything_is_named(record: Journal) -> None:
    name = commit(record, {1: "succeeded"})
    record.store.create(animation_name(key(2), "gif"), b"orphan")
    record.store.replace(name, b"damaged")
    age(record, 8)

    with pytest.raises(StorageError, match="is damaged"):
        found(record)


def test_what_is_replaced_in_the_index_is_garbage_and_outcomes_stay_without_it(record: Journal) -> None:
    for number in range(4):
        commit(record, {number: "succeeded"})
        record.compact()
    folder = root_of(record) / "_journal/index"
    heads = sorted(folder.glob("*.json"))
    age(record, 8)

    gone = list(delete_garbage(record.store, find_garbage(record, time.time() - 7 * DAY_S), on))

    assert Counter(item.kind for item in gone) == Counter(index=4)
    assert sorted(folder.glob("*.json")) == heads[2:]
    assert found(record) == {}
    assert len(Journal(record.store).outcomes().keys) == 4
    assert Journal(record.store).compact() == 0


def test_scans_are_garbage_but_for_the_last_that_was_kept(record: Journal) -> None:
    for name in ("aa" * 16, "bb" * 16):
        cache = PackIndex(record.store, layout.scan_cache_folder(name), INDEX_ENTRY)
        head = Head()
        for _ in range(3):
            head = cache.extend(head, INDEX_ENTRY.empty_table())
    record.store.create("_scans/notes.txt", b"mine")
    age(record, 9)
    age(record, 8, f"_scans/{'aa' * 16}/{min((root_of(record) / '_scans' / ('aa' * 16)).iterdir()).name}")

    sorts = found(record)

    assert sorts.keys() == {"scans"}
    assert {name.split("/")[1] for name in sorts["scans"]} == {"aa" * 16, "bb" * 16}
    assert sum(name.startswith(f"_scans/{'bb' * 16}/") for name in sorts["scans"]) == 3
    assert sum(name.startswith(f"_scans/{'aa' * 16}/") for name in sorts["scans"]) == 1


def make_garbage(record: Journal, put: Callable[[str, bytes], None]) -> Counter[str]:
    """Some of every sort that any store can have, and results that have to stay."""
    commit(record, {1: "succeeded", 2: "failed"})
    publish(record, record.outcomes(), keyset(1, 2), SHOP, "run-1", {})
    for number in range(10, 40):
        put(animation_name(key(number), "gif"), b"orphan")
    for generation in range(1, 6):
        put(lease_name(generation), b"{}")
    put("results/dead/part-00000.parquet", b"x")
    return Counter(animations=30, leases=2, results=1)


def test_deleting_removes_what_was_found_and_only_that(record: Journal) -> None:
    before = set()
    counts = make_garbage(record, lambda name, data: (record.store.create(name, data), before.add(name))[0])
    staged = root_of(record) / f"{animation_name(key(1), 'gif')}#1"
    staged.write_bytes(b"half")
    age(record, 8)
    everything = {path for path in root_of(record).rglob("*") if path.is_file()}

    gone = list(delete_garbage(record.store, find_garbage(record, time.time() - 7 * DAY_S), on))

    assert Counter(item.kind for item in gone) == counts + Counter(staged=1)
    left = {path for path in root_of(record).rglob("*") if path.is_file()}
    assert everything - left == {root_of(record) / item.info.name for item in gone}
    assert found(record) == {}
    assert publish(record, record.outcomes(), keyset(1, 2), SHOP, "run-2", {}).num_succeeded == 1
    assert list(delete_garbage(record.store, gone, on)) == gone  # gone already, which is as good


def test_deleting_ends_where_a_run_has_come(record: Journal) -> None:
    make_garbage(record, record.store.create)
    age(record, 8)
    before = found(record)

    def overtaken() -> None:
        raise LeaseHeldError("another run")

    with pytest.raises(LeaseHeldError):
        list(delete_garbage(record.store, find_garbage(record, time.time() - 7 * DAY_S), overtaken))
    assert found(record) == before


def test_an_outage_at_any_request_of_a_deletion_loses_nothing_and_the_next_one_ends_it(
    record: Journal, tmp_path: Path
) -> None:
    commit(record, {1: "succeeded", 2: "failed"})
    publish(record, record.outcomes(), keyset(1, 2), SHOP, "run-1", {})
    kept = {item.name for item in record.store.list("")}
    for name in (animation_name(key(3), "gif"), poster_name(key(3)), "results/dead/part-00000.parquet"):
        record.store.create(name, b"garbage")
    age(record, 8)

    def delete(store: Store) -> None:
        list(delete_garbage(store, find_garbage(Journal(store), time.time() - 7 * DAY_S), on))

    for copy in outages(record.store, tmp_path / "copies", delete):
        assert {item.name for item in copy.list("")} >= kept
        delete(copy)
        assert {item.name for item in copy.list("")} == kept
        assert successes(Journal(copy).outcomes()) == {key(1): True, key(2): False}


class FullStore(Store):
    """A store whose disk has room for a lease only after some deletions."""

    def __init__(self, uri: str, deletions: int) -> None:
        super().__init__(uri)
        self.deletions = deletions

    def delete(self, name: str) -> None:
        super().delete(name)
        self.deletions -= 1

    def is_full(self, probe: str) -> bool:
        del probe
        return self.deletions > 0

    def create(self, name: str, data: bytes) -> None:
        assert self.deletions <= 0
        super().create(name, data)


def make_orphans(record: Journal) -> None:
    for number in range(4):
        record.store.create(animation_name(key(number), "gif"), b"orphan")
    age(record, 8)


def test_a_disk_that_is_too_full_for_a_lease_has_room_after_as_few_deletions_as_that_takes(record: Journal) -> None:
    make_orphans(record)
    full, gone = FullStore(record.store.uri, deletions=2), []
    garbage = find_garbage(record, time.time() - 7 * DAY_S)

    with Lease(full, "gc", 60.0, make_room=lambda: gone.extend(make_room(full, garbage))):
        assert len(gone) == 2
        assert read_newest_lease(record.store)[1]["run_id"] == "gc"  # type: ignore[index]


def test_a_full_disk_without_enough_garbage_is_an_error_with_a_remedy(record: Journal) -> None:
    make_orphans(record)
    full = FullStore(record.store.uri, deletions=1000)

    with (
        pytest.raises(StorageError, match="is full, and no more garbage is old enough; delete other files there"),
        Lease(full, "gc", 60.0, make_room=lambda: list(make_room(full, find_garbage(record, time.time() + DAY_S)))),  # type: ignore[arg-type,return-value]
    ):
        pass
    assert found(record, days=-1) == {}


def test_no_room_is_made_while_a_run_is_alive(record: Journal) -> None:
    make_orphans(record)
    with (
        Lease(record.store, "alive", 1.0),
        pytest.raises(LeaseHeldError),
        Lease(FullStore(record.store.uri, 1), "gc", 1.0, make_room=lambda: pytest.fail("deleted")),
    ):
        pass


class StoreWithQuota(Store):
    """A store whose quota has no room for any object, and that counts what was deleted only later."""

    def create(self, name: str, data: bytes) -> None:
        del data
        msg = f"{name}: QuotaExceeded"
        raise UnwritableStoreError(msg)


def test_a_store_without_room_for_a_lease_is_freed_without_one(
    record: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    make_orphans(record)
    full = StoreWithQuota(record.store.uri)

    with Lease(full, "gc", 60.0, make_room=lambda: pytest.fail("no disk is full")) as lease:
        gone = list(delete_garbage(full, find_garbage(record, time.time() - 7 * DAY_S), lease.check))

    assert len(gone) == 4
    assert read_newest_lease(record.store) == (0, None)
    assert "lease_skipped run_id=gc" in caplog.text


def test_deleting_without_a_lease_ends_where_a_run_has_begun(record: Journal) -> None:
    make_orphans(record)
    full = StoreWithQuota(record.store.uri)

    with (
        Lease(full, "gc", 60.0, make_room=lambda: pytest.fail("no disk is full")) as lease,
        Lease(record.store, "begun", 60.0),
        pytest.raises(LeaseHeldError, match="another run has taken over"),
    ):
        list(delete_garbage(full, find_garbage(record, time.time() - 7 * DAY_S), lease.check))
    assert len(found(record)["animations"]) == 4


def test_a_command_that_frees_no_space_does_not_begin_without_a_lease(record: Journal) -> None:
    with pytest.raises(UnwritableStoreError), Lease(StoreWithQuota(record.store.uri), "verify", 60.0):
        pass


@pytest.mark.s3
def test_garbage_is_found_and_deleted_on_s3(s3: str) -> None:
    record = Journal(Store(s3))
    counts = make_garbage(record, record.store.create)
    before = {item.name for item in record.store.list("")}

    assert found(record, days=1) == {}
    gone = list(delete_garbage(record.store, find_garbage(record, time.time() + DAY_S), on))

    assert Counter(item.kind for item in gone) == counts
    assert before - {item.name for item in record.store.list("")} == {item.info.name for item in gone}
    assert found(record, days=-1) == {}
