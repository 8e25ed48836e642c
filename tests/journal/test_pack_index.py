from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pia_batch.errors import StorageError
from pia_batch.journal import pack_index
from pia_batch.journal.pack_index import Head, PackIndex
from pia_batch.storage.object_store import Store

ENTRY = pa.schema([("name", pa.string()), ("data", pa.large_binary()), ("note", pa.binary())])


def entries(*names: str, num_bytes: int = 8) -> pa.Table:
    data = [np.random.default_rng(len(name)).bytes(num_bytes) for name in names]
    return pa.table([list(names), data, [b"same" for _ in names]], schema=ENTRY)


@pytest.fixture
def made(store: Store) -> PackIndex:
    return PackIndex(store, "_journal/index/", ENTRY)


def rows(of: PackIndex, head: Head | None = None) -> list[dict[str, object]]:
    tables = of.tables(of.head() if head is None else head)
    return pa.concat_tables([ENTRY.empty_table(), *tables]).sort_by("name").to_pylist()


def objects(store: Store) -> list[Path]:
    return sorted(Path(store.uri.removeprefix("file://"), "_journal/index").iterdir())


def test_an_index_that_does_not_exist_is_empty_and_is_not_made_by_looking(made: PackIndex, tmp_path: Path) -> None:
    assert made.head() == Head()
    assert rows(made) == made.entries(made.head()).to_pylist() == []
    assert not (tmp_path / "out").exists()


def test_what_is_added_reads_back_from_a_new_index(made: PackIndex, store: Store) -> None:
    head = made.extend(Head(), entries("a", "b"))
    head = made.extend(head, entries("c"))

    other = PackIndex(store, "_journal/index/", ENTRY)
    assert other.head() == head
    assert rows(other) == entries("a", "b", "c").to_pylist()
    assert sorted(other.entries(head).to_pylist()) == ["a", "b", "c"]
    assert head.generation == 2
    assert len(head.packs) == 1


def test_large_packs_stay_and_small_ones_are_merged(made: PackIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "PACK_BYTES", 8000)
    head = Head()
    names = [f"entry {number:03d}" for number in range(60)]
    before: set[str] = set()
    for name in names:
        head = made.extend(head, entries(name, num_bytes=1000))
        large = {pack.name for pack in head.packs if pack.num_bytes >= 4000}
        assert before <= large
        before = large

    assert len(head.packs) <= 60 * 1000 // 4000 + 1
    assert all(pack.num_bytes < 2 * 8000 for pack in head.packs)
    assert [row["name"] for row in rows(made)] == names


def test_an_entry_larger_than_a_pack_has_one_of_its_own(made: PackIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "PACK_BYTES", 100)

    head = made.extend(Head(), entries("a", "b", "c", num_bytes=500))

    assert len(head.packs) == 3


def test_of_two_writers_at_once_one_counts_and_nothing_is_broken(made: PackIndex, store: Store) -> None:
    start = made.extend(Head(), entries("a"))
    mine = made.extend(start, entries("b"))
    theirs = PackIndex(store, "_journal/index/", ENTRY).extend(start, entries("c"))

    assert made.head() in (mine, theirs)
    assert {row["name"] for row in rows(made)} in ({"a", "b"}, {"a", "c"})
    assert made.extend(made.head(), entries("d")).generation == 3
    assert made.extend(start, entries("b")) == mine  # as if an answer had been lost


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x00" + path.read_bytes()[1:]),
    ],
    ids=["gone", "cut", "empty", "flipped"],
)
def test_a_damaged_pack_is_left_out_and_dropped_by_the_next_writer(
    made: PackIndex,
    store: Store,
    damage: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pack_index, "PACK_BYTES", 100)
    head = made.extend(Head(), entries("a", "bb", "ccc", num_bytes=200))
    damage(Path(store.uri.removeprefix("file://"), "_journal/index", head.packs[1].name))

    other = PackIndex(store, "_journal/index/", ENTRY)
    assert rows(other, head) == entries("a", "ccc", num_bytes=200).to_pylist()
    assert f"index_damaged name=_journal/index/{head.packs[1].name}" in caplog.text
    assert head.packs[1] not in other.extend(head, entries("dddd", num_bytes=200)).packs
    assert len(rows(other)) == 3


def test_a_damaged_head_is_left_out_for_the_one_before(made: PackIndex, store: Store) -> None:
    first = made.extend(Head(), entries("a"))
    made.extend(first, entries("b"))
    newest = max(path for path in objects(store) if path.suffix == ".json")

    newest.write_bytes(newest.read_bytes() + b" ")

    assert made.head() == first
    newest.unlink()
    assert made.head() == first


@pytest.mark.parametrize("data", [b"no table", b""])
def test_what_others_have_put_there_under_its_right_name_is_left_out(
    made: PackIndex, store: Store, data: bytes
) -> None:
    head = made.extend(Head(), entries("a"))
    name = pack_index._hash(data)
    store.create(f"_journal/index/{name}.parquet", data)
    store.create(f"_journal/index/000000000009-{name}.json", data)
    store.create("_journal/index/notes.txt", b"mine")

    assert made.head() == head
    assert rows(made, Head(1, (pack_index.Pack(f"{name}.parquet", 1),))) == []
    assert "_journal/index/notes.txt" not in {item.name for item in pack_index.superseded(made._store, made._prefix)}


def test_a_pack_of_another_schema_is_left_out(made: PackIndex, store: Store) -> None:
    schema = pa.schema([*ENTRY, ("more", pa.int64())])
    other = PackIndex(store, "_journal/index/", schema)
    head = other.extend(Head(), entries("a").append_column("more", pa.array([1])))

    assert rows(made, head) == []
    assert len(list(other.tables(head))) == 1


def test_a_store_that_does_not_answer_is_no_damaged_pack(made: PackIndex, store: Store) -> None:
    head = made.extend(Head(), entries("a"))

    class Down(Store):
        def read(self, name: str) -> bytes:
            msg = f"cannot read {name}"
            raise StorageError(msg)

    with pytest.raises(StorageError):
        rows(PackIndex(Down(store.uri), "_journal/index/", ENTRY), head)


def test_superseded_are_all_but_the_two_newest_heads_and_their_packs(made: PackIndex, store: Store) -> None:
    head, kept = Head(), set()
    for name in ("a", "b", "c", "d"):
        head = made.extend(head, entries(name))
        kept.add(head.packs[0].name)
    listed = {path.name for path in objects(store)}

    gone = {item.name.removeprefix("_journal/index/") for item in pack_index.superseded(made._store, made._prefix)}

    assert len(listed) == 8
    assert len(gone) == 4
    for name in gone:
        store.delete(f"_journal/index/{name}")
    assert [row["name"] for row in rows(made)] == ["a", "b", "c", "d"]
    assert list(pack_index.superseded(made._store, made._prefix)) == []
