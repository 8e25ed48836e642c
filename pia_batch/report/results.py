"""Results of a run, read once and part by part: counts over all of them, and a sample for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import StorageError
from pia_batch.journal.log import Journal
from pia_batch.schema.columns import FAILED, RESULT, SUCCEEDED, conformed
from pia_batch.storage.object_store import Store

_NOT_SHOWN = ("animation_uri", "sha256", "poster_uri", "poster_sha256")

COLUMNS = pa.schema([column for column in RESULT if column.name not in _NOT_SHOWN])
"""Columns of a result on the page. The names of its files follow from its key; carried columns may be secret."""

_FRAGMENTS = 1000
"""Number of journal fragments that are counted together; one by one, each would be compared with the whole sample."""


def read_part(store: Store, name: str) -> pa.Table:
    """Return one file of results with the columns COLUMNS; null for a column that an older file lacks.

    Raises:
        StorageError: The file is missing or damaged.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(store.read(name)), page_checksum_verification=True)
        present = file.schema_arrow.names
        return conformed(file.read([column.name for column in COLUMNS if column.name in present]), COLUMNS)
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError) as err:
        msg = f"results {store.uri_of(name)} are damaged: {err}; publish them again by `pia-batch run` with a new id"
        raise StorageError(msg) from None


@dataclass
class ResultCounts:
    """Counts over all results, whether or not the page shows them."""

    run_id: str
    examples: int = 5
    requests: int = 0
    succeeded: int = 0
    generated: int = 0
    """Number of requests that succeeded in this run."""
    reused: int = 0
    """Number of requests that earlier runs finished."""
    device_seconds: float = 0.0
    reused_device_seconds: float = 0.0
    num_bytes: int = 0
    devices: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """First few failed rows of every error kind, in the order of their ids."""

    @property
    def failed(self) -> int:
        """Number of requests without an animation."""
        return self.requests - self.succeeded

    def add(self, rows: pa.Table) -> None:
        """Count one part."""
        here = pc.equal(rows["run_id"], self.run_id)
        mine, earlier = rows.filter(here), rows.filter(pc.invert(here))
        good = pc.equal(rows["status"], SUCCEEDED)
        self.requests += len(rows)
        self.succeeded += _sum(good)
        self.generated += _sum(pc.equal(mine["status"], SUCCEEDED))
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


class ResultSample:
    """Up to a number of rows: those with the smallest keys. Keys are hashes, so this is a random sample."""

    def __init__(self, max_rows: int, further: Sequence[pa.Field] = ()) -> None:
        """Keep up to `max_rows` rows; failures get the places that successes leave, or up to half of all.

        Args:
            max_rows: Largest number of rows.
            further: Columns that the rows have besides COLUMNS.
        """
        schema = pa.schema([*COLUMNS, *further])
        self._max_rows = max_rows
        self._kept = {SUCCEEDED: schema.empty_table(), FAILED: schema.empty_table()}

    def add(self, rows: pa.Table) -> None:
        """Add one part, and drop the rows beyond the limit."""
        for status, kept in self._kept.items():
            both = pa.concat_tables([kept, rows.filter(pc.equal(rows["status"], status))])
            self._kept[status] = _smallest_keys(both, self._max_rows)

    def rows(self) -> pa.Table:
        """Return the sample, sorted by request."""
        good, bad = self._kept[SUCCEEDED], self._kept[FAILED]
        for_bad = min(len(bad), max(self._max_rows // 2, self._max_rows - len(good)))
        chosen = [_smallest_keys(good, self._max_rows - for_bad), _smallest_keys(bad, for_bad)]
        return pa.concat_tables(chosen).sort_by([("request_id", "ascending"), ("key", "ascending")])


@dataclass
class RunningResults:
    """Results that an unfinished run has committed so far. Reads each fragment of the journal once."""

    journal: Journal
    counts: ResultCounts
    sample: ResultSample
    _fragments: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)

    def read_on(self) -> None:
        """Add the results that were committed since the last call.

        Raises:
            StorageError: The store refused or did not answer, or a fragment is damaged.
        """
        new = [name for name in self.journal.fragments() if name not in self._fragments]
        for start in range(0, len(new), _FRAGMENTS):
            tables = [conformed(table, COLUMNS) for table in self.journal.read(new[start : start + _FRAGMENTS])]
            rows = pa.concat_tables(tables).combine_chunks()
            rows = rows.filter(pc.equal(rows["run_id"], self.counts.run_id))
            rows = rows.filter(pa.array([self._is_new(key) for key in rows["key"].to_pylist()], pa.bool_()))
            self.counts.add(rows)
            self.sample.add(rows)
        self._fragments.update(new)

    def _is_new(self, key: str) -> bool:
        """Return True for a key's first result: a worker that was taken for dead may commit a request again."""
        if key in self._keys:
            return False
        self._keys.add(key)
        return True


def weights(counts: ResultCounts, shown: pa.Table) -> dict[str, float]:
    """Return the number of results that one row of the page represents, by status."""
    here = _sum(pc.equal(shown["status"], SUCCEEDED))
    failed = len(shown) - here
    return {
        SUCCEEDED: counts.succeeded / here if here else 1.0,
        FAILED: counts.failed / failed if failed else 1.0,
    }


def _smallest_keys(rows: pa.Table, limit: int) -> pa.Table:
    return rows if len(rows) <= limit else rows.take(pc.select_k_unstable(rows, limit, [("key", "ascending")]))


def _sum(column: pa.ChunkedArray) -> Any:  # a number of the column's kind
    return pc.sum(column).as_py() or 0


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist() if item["values"] is not None
    }
