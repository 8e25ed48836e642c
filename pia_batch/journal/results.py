"""The results that are published from a journal: one row for every request of a manifest, or nothing at all.

What this needs of memory beside the keys does not grow with their number: rows are read fragment by fragment, and what
has to be compared with the listing of the animations waits in a file on the local disk, sorted by folder.
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
from pia_batch.schema.columns import RESULT, SUCCEEDED
from pia_batch.schema.keys import KeySet, halves, keys_from_hex
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

PART_ROWS = 100_000
"""Rows of one published Parquet file."""

LIST_THREADS = 8
"""Folders of animations, of which there are 256, that are listed at a time: ten million objects are 10,000 pages."""


@dataclass(frozen=True)
class Published:
    """A complete set of results."""

    run_id: str
    num_requests: int
    num_succeeded: int
    num_failed: int
    uri: str


def publish(
    journal: Journal, outcomes: Outcomes, wanted: KeySet, carried: pa.Schema, run_id: str, about: dict[str, Any]
) -> Published:
    """Write `results/<run_id>/`: one row for every wanted key, then `_SUCCESS.json`, then point LATEST.json at it.

    Doing it again with the same run id gives the same files.

    Args:
        journal: where the rows come from.
        outcomes: what the journal says now.
        wanted: the keys of the run's manifest.
        carried: the manifest's own columns, which follow those of RESULT.
        run_id: names the folder.
        about: what `_SUCCESS.json` tells besides, such as the manifest's URI.

    Raises:
        AccountingError: a request without a result, or a succeeded one whose animation is missing or has another size.
            Nothing is published then: there may be parts, and no `_SUCCESS.json`.
    """
    outcomes = outcomes.of(wanted)
    missing = len(wanted) - len(outcomes.keys)
    if missing:
        msg = f"{missing} of {len(wanted)} requests have no result yet; start the run again to finish them"
        raise AccountingError(msg)
    schema = pa.schema([*RESULT, *carried])
    counts = {"succeeded": 0, "failed": 0}
    parts = []
    written = _Tally()
    with tempfile.TemporaryFile() as disk:
        expected = _Expected(disk)
        for index, part in enumerate(_parts(journal.winning_rows(outcomes), schema)):
            expected.add(part)
            name = layout.results_part(run_id, index)
            journal.store.replace(name, to_parquet(part))
            parts.append({"name": name.rpartition("/")[2], "rows": len(part)})
            written.add(*halves(keys_from_hex(part["key"])))
            for status in counts:
                counts[status] += pc.sum(pc.equal(part["status"], status)).as_py() or 0
        expected.check(journal.store)
    if written != _Tally.of(wanted):
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
    return Published(run_id, len(wanted), counts["succeeded"], counts["failed"], uri)


def published(store: Store, run_id: str) -> dict[str, Any] | None:
    """What `_SUCCESS.json` says of this run, or None: it has no complete results."""
    try:
        return dict(json.loads(store.read(layout.success_marker(run_id))))
    except FileNotFoundError:
        return None


def is_published(store: Store, run_id: str) -> bool:
    """Whether the results of this run are complete."""
    return published(store, run_id) is not None


def latest(store: Store) -> dict[str, Any] | None:
    """What `results/LATEST.json` says, or None before the first complete run."""
    try:
        return dict(json.loads(store.read(layout.LATEST_RESULTS)))
    except FileNotFoundError:
        return None


def _parts(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of PART_ROWS, sorted by request within each."""
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
    """`table` in the columns of `schema`; an older fragment may lack carried columns, or have them in other types."""
    if table.schema.equals(schema):
        return table
    columns = []
    for wanted in schema:
        column = table[wanted.name] if wanted.name in table.column_names else pa.nulls(len(table), wanted.type)
        try:
            columns.append(column.cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            log.warning("carried_column_changed name=%s was=%s is=%s", wanted.name, column.type, wanted.type)
            columns.append(pa.nulls(len(table), wanted.type))
    return pa.table(columns, schema=schema)


def _sorted(table: pa.Table) -> pa.Table:
    table = table.combine_chunks()  # to take rows out of a thousand chunks is slow
    return table.sort_by([("request_id", "ascending"), ("key", "ascending")])


@dataclass
class _Tally:
    """How many keys there are, and sums over them: the same for the same keys in any order, and hardly for others."""

    num_keys: int = 0
    high: int = 0
    low: int = 0

    @classmethod
    def of(cls, keys: KeySet) -> _Tally:
        """Of all members."""
        tally = cls()
        tally.add(keys.high, keys.low)
        return tally

    def add(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> None:
        """Count these keys, given as `keys.halves` gives them."""
        self.num_keys += len(high)
        self.high = (self.high + int(high.sum())) % 2**64
        self.low = (self.low + int(low.sum())) % 2**64


class _Expected:
    """The animations that results tell of, in one file on the local disk, in chunks of one folder each."""

    _SCHEMA = pa.schema([("name", pa.string()), ("num_bytes", pa.int64()), ("request_id", pa.string())])

    def __init__(self, disk: BinaryIO) -> None:
        self._disk = disk
        self._chunks: dict[str, list[tuple[int, int]]] = {}
        """By folder: where its chunks begin and end."""

    def add(self, part: pa.Table) -> None:
        """Remember the succeeded rows."""
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
        """Compare with what is stored.

        Raises:
            AccountingError: the first animation that is missing or has another size.
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
                        f"animation {store.uri_of(name)} of request {request_id!r} {found}, its result says "
                        f"{num_bytes} bytes; `pia-batch verify --repair` finds all such, and the run after it draws "
                        "them again"
                    )
        return None


_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")
