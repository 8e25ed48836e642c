"""The results of a run, read once and part by part: what is counted of all of them, and which the page holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import StorageError
from pia_batch.journal.log import Journal
from pia_batch.schema.columns import FAILED, RESULT, SUCCEEDED
from pia_batch.storage.object_store import Store

COLUMNS = pa.schema([column for column in RESULT if column.name not in ("animation_uri", "sha256")])
"""What a page holds of a result: the animation's name follows from its key, and the carried columns may be secret."""

_FRAGMENTS = 1000
"""Of the journal, counted together: one by one, each would go through all that is kept already."""


def read_part(store: Store, name: str) -> pa.Table:
    """One file of results, as COLUMNS; null where an older file lacks one.

    Raises:
        StorageError: it is missing or damaged.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(store.read(name)), page_checksum_verification=True)
        present = file.schema_arrow.names
        return _as_columns(file.read([column.name for column in COLUMNS if column.name in present]))
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError) as err:
        msg = f"results {store.uri_of(name)} are damaged: {err}; publish them again by `pia-batch run` with a new id"
        raise StorageError(msg) from None


def _as_columns(table: pa.Table) -> pa.Table:
    arrays = [
        table[column.name].cast(column.type) if column.name in table.column_names else pa.nulls(len(table), column.type)
        for column in COLUMNS
    ]
    return pa.table(arrays, schema=COLUMNS)


@dataclass
class Tally:
    """Counts over all results, whatever the page has room for."""

    run_id: str
    examples: int = 5
    requests: int = 0
    succeeded: int = 0
    drawn: int = 0
    """Succeeded in this very run."""
    reused: int = 0
    """Finished by earlier runs."""
    device_seconds: float = 0.0
    reused_device_seconds: float = 0.0
    num_bytes: int = 0
    devices: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The first few failed rows of every kind, in the order of their ids."""

    @property
    def failed(self) -> int:
        """Requests without an animation."""
        return self.requests - self.succeeded

    def add(self, rows: pa.Table) -> None:
        """Count one part."""
        here = pc.equal(rows["run_id"], self.run_id)
        mine, earlier = rows.filter(here), rows.filter(pc.invert(here))
        good = pc.equal(rows["status"], SUCCEEDED)
        self.requests += len(rows)
        self.succeeded += _sum(good)
        self.drawn += _sum(pc.equal(mine["status"], SUCCEEDED))
        self.reused += len(earlier)
        self.device_seconds += _sum(mine["gpu_seconds"])
        self.reused_device_seconds += _sum(earlier["gpu_seconds"])
        self.num_bytes += _sum(rows["num_bytes"])
        self.devices.update(_counts(mine["device"]))
        bad = rows.filter(pc.invert(good))
        for kind, count in _counts(bad["error_kind"]).items():
            self.kinds[kind] += count
            found = self.failures.setdefault(kind, [])
            if len(found) < self.examples:
                same = bad.filter(pc.equal(bad["error_kind"], kind)).slice(0, self.examples - len(found))
                found += same.select(["request_id", "key", "error", "attempts"]).to_pylist()


class Sample:
    """All rows, or as many as there is room for: those with the smallest keys, which are hashes, so a fair sample."""

    def __init__(self, room: int) -> None:
        """Keep up to `room` rows; failures take what successes leave, or up to half of it."""
        self._room = room
        self._kept = {SUCCEEDED: COLUMNS.empty_table(), FAILED: COLUMNS.empty_table()}

    def add(self, rows: pa.Table) -> None:
        """Consider one part."""
        for status, kept in self._kept.items():
            both = pa.concat_tables([kept, rows.filter(pc.equal(rows["status"], status))])
            self._kept[status] = _smallest_keys(both, self._room)

    def rows(self) -> pa.Table:
        """What is kept, sorted by request."""
        good, bad = self._kept[SUCCEEDED], self._kept[FAILED]
        for_bad = min(len(bad), max(self._room // 2, self._room - len(good)))
        chosen = [_smallest_keys(good, self._room - for_bad), _smallest_keys(bad, for_bad)]
        return pa.concat_tables(chosen).sort_by([("request_id", "ascending"), ("key", "ascending")])


@dataclass
class SoFar:
    """What a run that goes on has committed up to now. Reads each fragment of the journal once."""

    journal: Journal
    tally: Tally
    sample: Sample
    _fragments: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)

    def read_on(self) -> None:
        """Count what was committed since the last call.

        Raises:
            StorageError: the store refused or did not answer, or a fragment is damaged.
        """
        new = [name for name in self.journal.fragments() if name not in self._fragments]
        for start in range(0, len(new), _FRAGMENTS):
            tables = [_as_columns(table) for table in self.journal.read(new[start : start + _FRAGMENTS])]
            rows = pa.concat_tables(tables).combine_chunks()
            rows = rows.filter(pc.equal(rows["run_id"], self.tally.run_id))
            rows = rows.filter(pa.array([self._is_new(key) for key in rows["key"].to_pylist()], pa.bool_()))
            self.tally.add(rows)
            self.sample.add(rows)
        self._fragments.update(new)

    def _is_new(self, key: str) -> bool:
        """Whether it comes for the first time: a worker taken for dead may commit a request once more."""
        if key in self._keys:
            return False
        self._keys.add(key)
        return True


def weights(tally: Tally, shown: pa.Table) -> dict[str, float]:
    """How many results one row of the page stands for, by status."""
    here = _sum(pc.equal(shown["status"], SUCCEEDED))
    failed = len(shown) - here
    return {
        SUCCEEDED: tally.succeeded / here if here else 1.0,
        FAILED: tally.failed / failed if failed else 1.0,
    }


def _smallest_keys(rows: pa.Table, room: int) -> pa.Table:
    return rows if len(rows) <= room else rows.take(pc.select_k_unstable(rows, room, [("key", "ascending")]))


def _sum(column: pa.ChunkedArray) -> Any:  # a number of the column's kind
    return pc.sum(column).as_py() or 0


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist() if item["values"] is not None
    }
