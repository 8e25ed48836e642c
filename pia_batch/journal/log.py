"""Commit log of an output: the record of all finished requests.

A *fragment* is one immutable Parquet file of result rows. It is named by its content and created by one conditional
PUT, after the animations of its rows are stored. A request is finished when it is in a fragment, and not earlier.
Nothing is renamed or deleted here. Two fragments may have a row for the same key, after a retry or because a worker
outlived its run. Then a success beats a failure, and the smaller fragment name wins among equals.

A *tombstone* removes rows whose animation turned out to be lost or damaged. It names each row by key and fragment, as
an observed-remove set does, and so it needs no clock: a row counts unless a tombstone names it, in whatever order the
two are read. A later commit of the same key is in another fragment, and counts. A key that has only removed rows is
unknown to the journal again, so the next run generates it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import ObjectExistsError, StorageError
from pia_batch.journal import layout
from pia_batch.journal.pack_index import Head, PackIndex
from pia_batch.journal.rows import ENTRY_COLUMNS, INDEX_ENTRY, NO_KEYS, RowCollector, Rows, index_entry
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, halves, keys_from_hex, keys_to_hex, sorted_order
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

ROWS_PER_STEP = 500_000
"""Rows whose keys are processed at a time if each needs additional memory."""

FRAGMENTS_PER_STEP = 10_000
"""Fragments that are read before they are written to the index: the memory of a compaction, and what it can lose."""

_TOMBSTONE = pa.schema([("key", pa.string()), ("fragment", pa.string())])


@dataclass(frozen=True)
class Outcomes:
    """Outcome of every key in the journal: one row per key, sorted by key."""

    keys: Keys
    succeeded: npt.NDArray[np.bool_]
    fragment: npt.NDArray[np.int32]
    """Index into `fragments` of the row that counts."""
    fragments: tuple[str, ...]
    kind: npt.NDArray[np.int16]
    """Index into `kinds` of the row's `error_kind`."""
    kinds: tuple[str | None, ...]
    """Error kinds; the first one is None, that of a success."""
    removed: Keys = field(default_factory=lambda: NO_KEYS)
    """Key of every row that a tombstone removed, sorted; a key occurs once for each of its removed rows."""

    def of(self, wanted: KeySet) -> Outcomes:
        """Return the outcomes of the keys in `wanted`."""
        mine, mine_removed = wanted.contains(self.keys), wanted.contains(self.removed)
        if mine.all() and mine_removed.all():
            return self
        return Outcomes(
            self.keys[mine],
            self.succeeded[mine],
            self.fragment[mine],
            self.fragments,
            self.kind[mine],
            self.kinds,
            self.removed[mine_removed],
        )

    def failed(self, kinds: frozenset[str] | None = None) -> npt.NDArray[np.bool_]:
        """Return a mask of the keys that only failed, with one of these error kinds (None: any); bool, shape (n,)."""
        chosen = np.array([kinds is None or kind in kinds for kind in self.kinds], dtype=bool)
        failed: npt.NDArray[np.bool_] = ~self.succeeded & chosen[self.kind]
        return failed

    @property
    def needs_regeneration(self) -> int:
        """Number of keys of which every row was removed."""
        removed = KeySet.of(self.removed)
        return len(removed) - int(removed.contains(self.keys).sum())

    @property
    def succeeded_keys(self) -> KeySet:
        """Keys with an animation."""
        return KeySet.of(self.keys[self.succeeded])

    @property
    def failures(self) -> Counter[str | None]:
        """Number of keys that only failed, by `error_kind`."""
        counts = np.bincount(self.kind[~self.succeeded], minlength=len(self.kinds)).tolist()
        return Counter({kind: count for kind, count in zip(self.kinds, counts, strict=True) if count})


class Journal:
    """Commit log under an output. Many processes can append to it at the same time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._index = PackIndex(store, layout.FRAGMENT_INDEX, INDEX_ENTRY)

    def append(self, results: pa.Table) -> str:
        """Commit result rows by one conditional PUT, and return the fragment's name.

        The name is a hash of keys, statuses and errors. A second commit of the same outcome therefore finds the name
        taken and changes nothing, and a request that fails again for another reason gets a new fragment. If a tombstone
        has removed a row of the existing fragment, the outcome is new and gets the next name.
        """
        identifying = results.select(["key", "status", "error_kind", "error"]).sort_by("key")
        outcome = json.dumps([column.to_pylist() for column in identifying.columns])
        data = to_parquet(results, small=True)
        for repetition in itertools.count():
            hashed = outcome if not repetition else f"{outcome} {repetition}"
            name = layout.fragment_name(_digest(hashed.encode()))
            try:
                self.store.create(name, data)
            except ObjectExistsError:
                if name in self._tombstones():
                    continue
                log.info("fragment_found name=%s rows=%d", name, len(results))
            return name
        raise AssertionError  # unreachable: the count has no end

    def add_tombstones(self, keys: Keys, seen: Outcomes) -> None:
        """Remove every row of `keys` that is in the fragments of `seen`: these requests need regeneration.

        Rows of other fragments stay: their writers committed them after `seen` was read.
        """
        lost = KeySet.of(keys)
        if not len(lost):
            return
        rows = self._rows(seen.fragments)
        here = lost.contains(rows.keys)
        names = pa.array(seen.fragments, pa.string()).take(pa.array(rows.fragment[here]))
        table = pa.table([keys_to_hex(rows.keys[here]), names], schema=_TOMBSTONE)
        table = table.sort_by([("key", "ascending"), ("fragment", "ascending")])
        name = layout.tombstone_name(_digest(json.dumps(table.to_pydict(), sort_keys=True).encode()))
        try:
            self.store.create(name, to_parquet(table))
        except ObjectExistsError:
            log.info("tombstone_found name=%s rows=%d", name, len(table))

    def _tombstones(self) -> dict[str, KeySet]:
        """Read all tombstones: the removed keys, by the fragment that has them."""
        names = sorted(item.name for item in self.store.list(layout.TOMBSTONES) if item.name.endswith(".parquet"))
        if not names:
            return {}
        # Two tombstones may name the same row: one of a repair that was killed, and one of the repair that followed.
        rows = pa.concat_tables(self.read(names, _TOMBSTONE.names)).group_by(_TOMBSTONE.names).aggregate([])
        by_fragment = rows.group_by("fragment").aggregate([("key", "list")])
        return {
            fragment.as_py(): KeySet.of(keys_from_hex(keys.values))
            for fragment, keys in zip(by_fragment["fragment"], by_fragment["key_list"], strict=True)
        }

    def fragments(self) -> list[str]:
        """List the names of all fragments, sorted."""
        return sorted(item.name for item in self.store.list(layout.FRAGMENTS) if layout.is_fragment(item.name))

    def compact(self, at_least: int = 1) -> int:
        """Add the fragments that the index lacks to it, and return their number. Safe at any moment.

        Args:
            at_least: Minimum number of missing fragments; with fewer, nothing is done.

        Raises:
            StorageError: the store refused the request or did not answer, or a fragment is damaged.
        """
        names = self.fragments()
        head = self._index.head()
        new = self._not_indexed(names, head)
        if len(new) < at_least:
            return 0
        for entries in self._index_entries(new):
            head = self._index.extend(head, entries)
        log.info("journal_compacted fragments=%d of=%d", len(new), len(names))
        return len(new)

    def _not_indexed(self, names: list[str], head: Head) -> list[str]:
        indexed = pc.is_in(pa.array(names, pa.string()), value_set=self._index.entries(head))
        return [name for name, known in zip(names, indexed.to_pylist(), strict=True) if not known]

    def _index_entries(self, names: list[str]) -> Iterator[pa.Table]:
        """Read fragments, and yield their index entries in tables."""
        for start in range(0, len(names), FRAGMENTS_PER_STEP):
            some = names[start : start + FRAGMENTS_PER_STEP]
            tables = self.read(some, ENTRY_COLUMNS)
            entries = [index_entry(name, table) for name, table in zip(some, tables, strict=True)]
            yield pa.Table.from_pylist(entries, INDEX_ENTRY)

    def read(self, names: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read fragments in the order of `names`.

        Args:
            names: Names of the fragments.
            columns: Columns to read; None: all columns.

        Raises:
            StorageError: a fragment is damaged. It is never skipped: its requests would be generated again.
        """
        return self.store.each(lambda name: self._read(name, columns), names)

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            msg = f"journal fragment {self.store.uri_of(name)} was removed while it was read; start again"
            raise StorageError(msg) from None
        try:
            # Not pq.read_table, which takes three times as long for a fragment.
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            table = file.read(columns, use_threads=False)
            return table.select(columns) if columns else table
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as err:
            msg = f"journal fragment {self.store.uri_of(name)} is damaged: {err}; restore it, or delete it"
            raise StorageError(msg) from None

    def outcomes(self) -> Outcomes:
        """Return the outcome of every key; reads the index, and three columns of every fragment that it lacks."""
        names = self.fragments()
        tombstones = self._tombstones()
        rows = self._rows(names).without(tombstones, names)
        high, low = halves(rows.keys)
        order = sorted_order(high, low, ~rows.succeeded, rows.fragment)
        high, low = high[order], low[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        chosen = order[first]
        del high, low, order
        pa.default_memory_pool().release_unused()
        return Outcomes(
            rows.keys[chosen],
            rows.succeeded[chosen],
            rows.fragment[chosen],
            tuple(names),
            rows.kind[chosen],
            rows.kinds,
            _all_keys(tombstones.values()),
        )

    def _rows(self, names: Sequence[str]) -> Rows:
        """Return every row of these fragments; fragments that the index has are not read."""
        collector = RowCollector(names)
        for table in self._index.tables(self._index.head()):
            collector.add(table)
        for entries in self._index_entries(collector.missing):
            collector.add(entries)
        return collector.take_all()

    def winning_rows(self, outcomes: Outcomes) -> Iterator[pa.Table]:
        """Yield the one result row that counts for every key in `outcomes`, fragment by fragment, with all columns."""
        for rows in _by_fragment(outcomes.fragment):
            indices, starts = np.unique(outcomes.fragment[rows], return_index=True)
            names = [outcomes.fragments[index] for index in indices]
            groups = np.split(rows, starts)[1:]
            for table, group in zip(self.read(names), groups, strict=True):
                if len(table) == len(group):  # a fragment has a key only once, so all of it counts
                    yield table
                else:
                    counted = KeySet.of(outcomes.keys[group]).contains(keys_from_hex(table["key"]))
                    yield table.filter(pa.array(counted))


def _by_fragment(fragment: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield row numbers in the order of their fragments, about ROWS_PER_STEP at a time, with fragments kept whole."""
    ends = np.cumsum(np.bincount(fragment))
    starts = np.searchsorted(ends, np.arange(0, len(fragment), ROWS_PER_STEP), side="right")
    for first, end in itertools.pairwise([*np.unique(starts).tolist(), len(ends)]):
        rows = np.flatnonzero((fragment >= first) & (fragment < end))
        yield rows[np.argsort(fragment[rows], kind="stable")]


def digest_of(outcomes: Outcomes) -> str:
    """Hash keys, statuses and removed rows; 32 hexadecimal digits. Equal digests: there is nothing new to publish."""
    digest = hashlib.blake2b(digest_size=16)
    for chosen in (None, outcomes.succeeded):
        for half in (0, 1):
            for start in range(0, len(outcomes.keys), ROWS_PER_STEP):
                some = slice(start, start + ROWS_PER_STEP)
                keys = outcomes.keys[some] if chosen is None else outcomes.keys[some][chosen[some]]
                digest.update(halves(keys)[half].data)
        digest.update(b"|")
    digest.update(outcomes.removed.tobytes())  # a regenerated request has another row with the same outcome
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _all_keys(sets: Iterable[KeySet]) -> Keys:
    """Return the members of all sets, sorted; a member of several sets occurs as often."""
    halved = [np.stack([keys.high, keys.low], axis=1) for keys in sets]
    pairs = np.concatenate([np.empty((0, 2), np.uint64), *halved])
    pairs = np.ascontiguousarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(">u8"))
    return np.frombuffer(pairs.tobytes(), dtype=f"V{KEY_BYTES}")


def to_parquet(table: pa.Table, *, small: bool = False) -> bytes:
    """Return a Parquet file, its pages with checksums.

    Args:
        table: Rows of the file.
        small: True for tens of rows: writing and reading take a third of the time, and the file is not larger
            (measured), because zstd starts again for each of fifty columns.
    """
    sink = pa.BufferOutputStream()
    compression = "snappy" if small else "zstd"
    pq.write_table(table, sink, compression=compression, use_dictionary=not small, write_page_checksum=True)
    return bytes(sink.getvalue())


def to_json(value: dict[str, Any]) -> bytes:
    """Return a JSON object for people and programs: indented, sorted, UTF-8."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
