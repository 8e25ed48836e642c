"""Results that are published from a journal: one row for every request of a manifest, or nothing at all.

Apart from the keys, the memory that this needs does not grow with the number of requests. Rows are read fragment by
fragment, and what is compared with the listing of the animations is kept in a file on the local disk, sorted by folder.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import AccountingError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal, Outcomes, digest_of, to_json, to_parquet
from pia_batch.schema.columns import RESULT, SUCCEEDED, conformed
from pia_batch.schema.keys import KeySet, halves, keys_from_hex
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

PART_ROWS = 100_000
"""Number of rows of one published Parquet file."""

LIST_THREADS = 8
"""Folders of animations, of 256, that are listed at a time: ten million objects are 10,000 pages of a listing."""


@dataclass(frozen=True)
class PublishedResults:
    """Complete results of a run."""

    run_id: str
    num_requests: int
    num_succeeded: int
    num_failed: int
    uri: str


def publish(
    journal: Journal, outcomes: Outcomes, wanted: KeySet, carried: pa.Schema, run_id: str, about: dict[str, Any]
) -> PublishedResults:
    """Write `results/<run_id>/`: one row for every wanted key, then `_SUCCESS.json`; then point LATEST.json at it.

    Repeating it with the same run id writes the same files.

    Args:
        journal: Journal that has the rows.
        outcomes: Its current outcomes.
        wanted: Keys of the run's manifest.
        carried: Columns that are carried from the manifest; they follow those of RESULT.
        run_id: Name of the folder.
        about: Further fields of `_SUCCESS.json`, such as the manifest's URI.

    Raises:
        AccountingError: a request has no result, or the animation of a succeeded one is missing or has another size.
            Nothing is published then: there may be parts, but no `_SUCCESS.json`.
    """
    outcomes = outcomes.of(wanted)
    missing = len(wanted) - len(outcomes.keys)
    if missing:
        msg = f"{missing} of {len(wanted)} requests have no result yet; start the run again to finish them"
        raise AccountingError(msg)
    schema = pa.schema([*RESULT, *carried])
    counts = {"succeeded": 0, "failed": 0}
    parts = []
    written = _KeyChecksum()
    with tempfile.TemporaryFile() as disk:
        expected = _ExpectedAnimations(disk)
        for index, rows in enumerate(_parts(journal.winning_rows(outcomes), schema)):
            part = pa.Table.from_arrays(rows.columns, schema=schema)  # with the metadata of extension types
            expected.add(part)
            name = layout.results_part(run_id, index)
            journal.store.replace(name, to_parquet(part))
            parts.append({"name": name.rpartition("/")[2], "rows": len(part)})
            written.add(*halves(keys_from_hex(part["key"])))
            for status in counts:
                counts[status] += pc.sum(pc.equal(part["status"], status)).as_py() or 0
        expected.check(journal.store)
    if written != _KeyChecksum.of(wanted):
        msg = (
            f"the index {journal.store.uri_of(layout.FRAGMENT_INDEX)} does not match the rows of the fragments in "
            f"{journal.store.uri_of(layout.FRAGMENTS)}; delete the index and start the run again"
        )
        raise AccountingError(msg)
    state = {"run_id": run_id, "requests": len(wanted), **counts, "parts": parts, "digest": digest_of(outcomes)}
    state |= {"published_at": datetime.now(UTC).isoformat(timespec="seconds"), **about}
    journal.store.replace(layout.success_marker(run_id), to_json(state))
    journal.store.replace(layout.LATEST_RESULTS, to_json({"run_id": run_id, "digest": state["digest"]}))
    uri = journal.store.uri_of(layout.results_folder(run_id))
    return PublishedResults(run_id, len(wanted), counts["succeeded"], counts["failed"], uri)


def read_success_marker(store: Store, run_id: str) -> dict[str, Any] | None:
    """Return the content of a run's `_SUCCESS.json`, or None if the run has no complete results."""
    try:
        return dict(json.loads(store.read(layout.success_marker(run_id))))
    except FileNotFoundError:
        return None


def is_published(store: Store, run_id: str) -> bool:
    """Return whether the results of this run are complete; reads the store."""
    return read_success_marker(store, run_id) is not None


def read_latest(store: Store) -> dict[str, Any] | None:
    """Return the content of `results/LATEST.json`, or None before the first complete run."""
    try:
        return dict(json.loads(store.read(layout.LATEST_RESULTS)))
    except FileNotFoundError:
        return None


def _parts(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the same rows in tables of PART_ROWS, each sorted by request."""
    waiting: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        waiting.append(_conform(table, schema))
        num_rows += len(table)
        while num_rows >= PART_ROWS:
            whole = pa.concat_tables(waiting)
            yield _sorted(whole.slice(0, PART_ROWS))
            waiting = [whole.slice(PART_ROWS)]
            num_rows -= PART_ROWS
    if num_rows:
        yield _sorted(pa.concat_tables(waiting))


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with the columns of `schema`; an older fragment may lack carried columns or have other types."""
    return table if table.schema.equals(schema) else conformed(table, schema, _cast_or_null)


def _cast_or_null(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        log.warning("carried_column_changed name=%s old=%s new=%s", field.name, column.type, field.type)
        return pa.nulls(len(column), field.type)


def _sorted(table: pa.Table) -> pa.Table:
    table = table.combine_chunks()  # taking rows from a thousand chunks is slow
    return table.sort_by([("request_id", "ascending"), ("key", "ascending")])


@dataclass
class _KeyChecksum:
    """Number of keys and sums over them: equal for the same keys in any order, and practically never for others."""

    num_keys: int = 0
    high: int = 0
    low: int = 0

    @classmethod
    def of(cls, keys: KeySet) -> _KeyChecksum:
        """Return the checksum of all members."""
        checksum = cls()
        checksum.add(keys.high, keys.low)
        return checksum

    def add(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> None:
        """Add these keys, given as `keys.halves` returns them."""
        self.num_keys += len(high)
        self.high = (self.high + int(high.sum())) % 2**64
        self.low = (self.low + int(low.sum())) % 2**64


class _ExpectedAnimations:
    """Animations that results name, in one file on the local disk, in chunks of one folder each."""

    _SCHEMA = pa.schema([("name", pa.string()), ("num_bytes", pa.int64()), ("request_id", pa.string())])

    def __init__(self, disk: BinaryIO) -> None:
        self._disk = disk
        self._chunks: dict[str, list[tuple[int, int]]] = {}
        """Start and end offsets of the chunks in the file, by folder."""

    def add(self, part: pa.Table) -> None:
        """Add the succeeded rows."""
        rows = part.filter(pc.equal(part["status"], SUCCEEDED))
        names = pa.array(map(layout.animation_name_in, rows["animation_uri"].to_pylist()), pa.string())
        table = pa.table([names, rows["num_bytes"], rows["request_id"]], schema=self._SCHEMA).sort_by("name")
        folders = pc.replace_substring_regex(table["name"], "[^/]*$", "").combine_chunks().dictionary_encode()
        bounds = np.searchsorted(folders.indices.to_numpy(), np.arange(len(folders.dictionary) + 1))
        for folder, (start, end) in zip(folders.dictionary.to_pylist(), pairwise(bounds.tolist()), strict=True):
            begin = self._disk.tell()
            with pa.ipc.new_stream(self._disk, self._SCHEMA, options=_COMPRESSED) as stream:
                stream.write_table(table.slice(start, end - start))
            self._chunks.setdefault(folder, []).append((begin, self._disk.tell()))

    def check(self, store: Store) -> None:
        """Compare with the stored objects.

        Raises:
            AccountingError: an animation is missing or has another size; the first one is reported.
        """
        self._disk.flush()
        for problem in store.each(lambda folder: self._problem(store, folder), sorted(self._chunks), LIST_THREADS):
            if problem:
                raise AccountingError(problem)

    def _problem(self, store: Store, folder: str) -> str | None:
        stored = {item.name: item.num_bytes for item in store.list(folder)}
        for start, end in self._chunks[folder]:
            chunk = os.pread(self._disk.fileno(), end - start, start)
            table = pa.ipc.open_stream(chunk).read_all()
            for name, num_bytes, request_id in zip(*(column.to_pylist() for column in table.columns), strict=True):
                size = stored.get(name)
                if size != num_bytes:
                    found = "is missing" if size is None else f"has {size} bytes"
                    return (
                        f"animation {store.uri_of(name)} of request {request_id!r} {found}, its result states "
                        f"{num_bytes} bytes; `pia-batch verify --repair` finds all such animations, and the next run "
                        "generates them again"
                    )
        return None


_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")
