"""What is finished: the commit log of an output.

A *fragment* is one immutable Parquet file of result rows, named by its content and created by one conditional PUT after
the animations it speaks of are stored. A request is finished when a fragment says so, and not before. Nothing here is
renamed or deleted; two fragments may speak of the same key (a retry, a zombie), and then a success beats a failure, and
the smaller fragment name wins among equals.

A *withdrawal* takes rows back whose animation turned out to be lost or damaged. It names each by key and fragment, as
an observed-remove set does, and so it needs no clock: a row counts unless a withdrawal names it, in whatever order the
two are read, and what is committed of the key later is in another fragment and counts. A key of which every row is
withdrawn is unknown to the journal again, so the next run draws it.
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
from pia_batch.journal.pack_index import Head, Index
from pia_batch.journal.rows import INDEXED, NO_KEYS, READ, Rows, RowsOf, entry
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, halves, keys_from_hex, keys_to_hex, sorted_order
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 500_000
"""Rows whose keys are looked at together where what is done needs memory for each."""

COMPACTED_AT_ONCE = 10_000
"""Fragments that are read before they are written to the index: what compaction needs of memory, and can lose."""

_WITHDRAWAL = pa.schema([("key", pa.string()), ("fragment", pa.string())])


@dataclass(frozen=True)
class Outcomes:
    """The journal's verdict on every key it knows, one row per key, sorted by key."""

    keys: Keys
    succeeded: npt.NDArray[np.bool_]
    fragment: npt.NDArray[np.int32]
    """Index into `fragments` of the row that counts."""
    fragments: tuple[str, ...]
    kind: npt.NDArray[np.int16]
    """Index into `kinds` of the row's `error_kind`."""
    kinds: tuple[str | None, ...]
    """The first one is None, that of a success."""
    withdrawn: Keys = field(default_factory=lambda: NO_KEYS)
    """The key of every row that was taken back, sorted; a key stands there once for each of its rows."""

    def of(self, wanted: KeySet) -> Outcomes:
        """The part that speaks of `wanted`."""
        mine, taken_back = wanted.contains(self.keys), wanted.contains(self.withdrawn)
        if mine.all() and taken_back.all():
            return self
        return Outcomes(
            self.keys[mine],
            self.succeeded[mine],
            self.fragment[mine],
            self.fragments,
            self.kind[mine],
            self.kinds,
            self.withdrawn[taken_back],
        )

    def failed(self, kinds: frozenset[str] | None = None) -> npt.NDArray[np.bool_]:
        """Which of `keys` only failed, with one of these error kinds; None: with any. Bool, shape (n,)."""
        chosen = np.array([kinds is None or kind in kinds for kind in self.kinds], dtype=bool)
        failed: npt.NDArray[np.bool_] = ~self.succeeded & chosen[self.kind]
        return failed

    @property
    def due_again(self) -> int:
        """How many keys have nothing but rows that were taken back."""
        lost = KeySet.of(self.withdrawn)
        return len(lost) - int(lost.contains(self.keys).sum())

    @property
    def succeeded_keys(self) -> KeySet:
        """The keys with an animation."""
        return KeySet.of(self.keys[self.succeeded])

    @property
    def failures(self) -> Counter[str | None]:
        """How many keys only failed, by `error_kind`."""
        counts = np.bincount(self.kind[~self.succeeded], minlength=len(self.kinds)).tolist()
        return Counter({kind: count for kind, count in zip(self.kinds, counts, strict=True) if count})


class Journal:
    """The commit log below an output. Safe to append to from many processes at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._index = Index(store, layout.FRAGMENT_INDEX, INDEXED)

    def append(self, results: pa.Table) -> str:
        """Commit result rows by one conditional PUT, and return the fragment's name.

        The name is a hash of keys, statuses and errors, so a second commit of the same outcome finds it taken and is
        done, and a request that fails anew for another reason has its say; unless a row of it was taken back meanwhile,
        for then the same outcome is news and gets the next name.
        """
        told = results.select(["key", "status", "error_kind", "error"]).sort_by("key")
        outcome = json.dumps([column.to_pylist() for column in told.columns])
        data = to_parquet(results, small=True)
        for again in itertools.count():
            said = outcome if not again else f"{outcome} {again}"
            name = layout.fragment_name(hashlib.blake2b(said.encode(), digest_size=16).hexdigest())
            try:
                self.store.create(name, data)
            except ObjectExistsError:
                if name in self._withdrawn():
                    continue
                log.info("fragment_exists name=%s rows=%d", name, len(results))
            return name
        raise AssertionError  # unreachable: the count has no end

    def withdraw(self, keys: Keys, seen: Outcomes) -> None:
        """Take back every row of `keys` that the fragments of `seen` have: these requests are due again.

        What other fragments say stays: whoever wrote it knows more than `seen` did.
        """
        lost = KeySet.of(keys)
        if not len(lost):
            return
        rows = self._rows(seen.fragments)
        here = lost.contains(rows.keys)
        names = pa.array(seen.fragments, pa.string()).take(pa.array(rows.fragment[here]))
        table = pa.table([keys_to_hex(rows.keys[here]), names], schema=_WITHDRAWAL)
        table = table.sort_by([("key", "ascending"), ("fragment", "ascending")])
        said = json.dumps(table.to_pydict(), sort_keys=True).encode()
        name = layout.tombstone_name(hashlib.blake2b(said, digest_size=16).hexdigest())
        try:
            self.store.create(name, to_parquet(table))
        except ObjectExistsError:
            log.info("withdrawal_exists name=%s rows=%d", name, len(table))

    def _withdrawn(self) -> dict[str, KeySet]:
        """What was taken back: keys by the fragment that had them."""
        names = sorted(item.name for item in self.store.list(layout.TOMBSTONES) if item.name.endswith(".parquet"))
        if not names:
            return {}
        # The same row may be named by two withdrawals, by a repair that was killed and one that followed.
        rows = pa.concat_tables(self.read(names, _WITHDRAWAL.names)).group_by(_WITHDRAWAL.names).aggregate([])
        by_fragment = rows.group_by("fragment").aggregate([("key", "list")])
        return {
            fragment.as_py(): KeySet.of(keys_from_hex(keys.values))
            for fragment, keys in zip(by_fragment["fragment"], by_fragment["key_list"], strict=True)
        }

    def fragments(self) -> list[str]:
        """The names of all fragments, sorted."""
        return sorted(item.name for item in self.store.list(layout.FRAGMENTS) if layout.is_fragment(item.name))

    def compact(self, at_least: int = 1) -> int:
        """Put the fragments into the index that it lacks, and return how many these were. Safe at any moment.

        Args:
            at_least: where it lacks fewer, nothing is done.

        Raises:
            StorageError: the store refused or did not answer, or a fragment is damaged.
        """
        names = self.fragments()
        head = self._index.head()
        new = self._not_indexed(names, head)
        if len(new) < at_least:
            return 0
        for start in range(0, len(new), COMPACTED_AT_ONCE):
            some = new[start : start + COMPACTED_AT_ONCE]
            entries = [entry(name, table) for name, table in zip(some, self.read(some, READ), strict=True)]
            head = self._index.extend(head, pa.Table.from_pylist(entries, INDEXED))
        log.info("journal_compacted fragments=%d of=%d", len(new), len(names))
        return len(new)

    def _not_indexed(self, names: list[str], head: Head) -> list[str]:
        indexed = pc.is_in(pa.array(names, pa.string()), value_set=self._index.entries(head))
        return [name for name, known in zip(names, indexed.to_pylist(), strict=True) if not known]

    def read(self, names: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Fragments in the order of `names`, `columns` only.

        Raises:
            StorageError: a fragment is damaged. It is never skipped: what it says would be computed again.
        """
        return self.store.each(lambda name: self._read(name, columns), names)

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        data = self.store.read(name)
        try:
            # Not pq.read_table, which takes three times as long for a fragment.
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            table = file.read(columns, use_threads=False)
            return table.select(columns) if columns else table
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as err:
            msg = f"journal fragment {self.store.uri_of(name)} is damaged: {err}; restore it, or delete it"
            raise StorageError(msg) from None

    def outcomes(self) -> Outcomes:
        """What is finished, and how: reads the index, and three columns of every fragment that it lacks."""
        names = self.fragments()
        withdrawn = self._withdrawn()
        rows = self._rows(names).without(withdrawn, names)
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
            _all_keys(withdrawn.values()),
        )

    def _rows(self, names: Sequence[str]) -> Rows:
        """Every row of these fragments, by the index as far as it goes."""
        rows = RowsOf(names)
        for table in self._index.tables(self._index.head()):
            rows.add(table)
        left = rows.left
        for start in range(0, len(left), COMPACTED_AT_ONCE):
            some = left[start : start + COMPACTED_AT_ONCE]
            entries = [entry(name, table) for name, table in zip(some, self.read(some, READ), strict=True)]
            rows.add(pa.Table.from_pylist(entries, INDEXED))
        return rows.all()

    def winning_rows(self, outcomes: Outcomes) -> Iterator[pa.Table]:
        """The one result row that counts of every key in `outcomes`, fragment by fragment, all columns."""
        for rows in _by_fragment(outcomes.fragment):
            indices, starts = np.unique(outcomes.fragment[rows], return_index=True)
            names = [outcomes.fragments[index] for index in indices]
            groups = np.split(rows, starts)[1:]
            for table, group in zip(self.read(names), groups, strict=True):
                if len(table) == len(group):  # a fragment has a key once, so all of it counts
                    yield table
                else:
                    counted = KeySet.of(outcomes.keys[group]).contains(keys_from_hex(table["key"]))
                    yield table.filter(pa.array(counted))


def _by_fragment(fragment: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int64]]:
    """The row numbers in the order of their fragments, about ROWS_AT_ONCE at a time, each fragment's together."""
    ends = np.cumsum(np.bincount(fragment))
    starts = np.searchsorted(ends, np.arange(0, len(fragment), ROWS_AT_ONCE), side="right")
    for first, end in itertools.pairwise([*np.unique(starts).tolist(), len(ends)]):
        rows = np.flatnonzero((fragment >= first) & (fragment < end))
        yield rows[np.argsort(fragment[rows], kind="stable")]


def digest_of(outcomes: Outcomes) -> str:
    """32 hex digits over keys, statuses and what was taken back: where they are equal, nothing is new to publish."""
    digest = hashlib.blake2b(digest_size=16)
    for chosen in (None, outcomes.succeeded):
        for half in (0, 1):
            for start in range(0, len(outcomes.keys), ROWS_AT_ONCE):
                some = slice(start, start + ROWS_AT_ONCE)
                keys = outcomes.keys[some] if chosen is None else outcomes.keys[some][chosen[some]]
                digest.update(halves(keys)[half].data)
        digest.update(b"|")
    digest.update(outcomes.withdrawn.tobytes())  # what was drawn once more has another row, with the same outcome
    return digest.hexdigest()


def _all_keys(sets: Iterable[KeySet]) -> Keys:
    """The members of all sets, sorted; one that several have comes as often."""
    halved = [np.stack([keys.high, keys.low], axis=1) for keys in sets]
    pairs = np.concatenate([np.empty((0, 2), np.uint64), *halved])
    pairs = np.ascontiguousarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(">u8"))
    return np.frombuffer(pairs.tobytes(), dtype=f"V{KEY_BYTES}")


def to_parquet(table: pa.Table, *, small: bool = False) -> bytes:
    """A Parquet file in memory, its pages with checksums.

    Args:
        table: its rows.
        small: for tens of rows: a third of the time to write and to read again, and no larger (measured). zstd begins
            anew for each of fifty columns.
    """
    sink = pa.BufferOutputStream()
    compression = "snappy" if small else "zstd"
    pq.write_table(table, sink, compression=compression, use_dictionary=not small, write_page_checksum=True)
    return bytes(sink.getvalue())


def to_json(value: dict[str, Any]) -> bytes:
    """A JSON object for people and programs: indented, sorted, UTF-8."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
