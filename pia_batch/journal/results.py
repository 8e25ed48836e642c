"""Results that are published from a journal: one row for every request of a manifest, or nothing at all.

Apart from the keys, the memory that this needs does not grow with the number of requests. Rows are read fragment by
fragment, and what is compared with the listing of the animations is kept in a file on the local disk, sorted by folder.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import AccountingError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal, Outcomes, digest_of, to_json, to_parquet
from pia_batch.journal.publication_checks import ExpectedAnimations, KeyChecksum
from pia_batch.journal.published_dataset import DatasetWriter, StoredDataset, find_difference
from pia_batch.schema.columns import RESULT, conformed
from pia_batch.schema.keys import KeySet, halves, keys_from_hex
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

PART_ROWS = 100_000
"""Number of rows of one published Parquet file."""

SETTLE_ROUNDS = 10
"""Attempts to have the dataset show the newest results, while other runs publish at the same moment."""


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

    Before `_SUCCESS.json`, the same results are written as a Hugging Face dataset: `metadata.parquet` and `README.md`.
    Repeating it with the same run id writes the same files.

    Args:
        journal: Journal that has the rows.
        outcomes: Its current outcomes.
        wanted: Keys of the run's manifest.
        carried: Columns that are carried from the manifest; they follow those of RESULT.
        run_id: Name of the folder.
        about: Further fields of `_SUCCESS.json`: the manifest's URI, and `models`, the weights of each model by its
            name in the config.

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
    digest = digest_of(outcomes)
    counts = {"succeeded": 0, "failed": 0}
    parts = []
    written = KeyChecksum()
    with tempfile.TemporaryFile() as disk, DatasetWriter(run_id, digest, schema) as dataset:
        expected = ExpectedAnimations(disk)
        for index, rows in enumerate(_parts(journal.winning_rows(outcomes), schema)):
            part = pa.Table.from_arrays(rows.columns, schema=schema)  # with the metadata of extension types
            expected.add(part)
            dataset.add(part)
            name = layout.results_part(run_id, index)
            journal.store.replace(name, to_parquet(part))
            parts.append({"name": name.rpartition("/")[2], "rows": len(part)})
            written.add(*halves(keys_from_hex(part["key"])))
            for status in counts:
                counts[status] += pc.sum(pc.equal(part["status"], status)).as_py() or 0
        expected.check(journal.store)
        if written != KeyChecksum.of(wanted):
            msg = (
                f"the index {journal.store.uri_of(layout.FRAGMENT_INDEX)} does not match the rows of the fragments in "
                f"{journal.store.uri_of(layout.FRAGMENTS)}; delete the index and start the run again"
            )
            raise AccountingError(msg)
        stored = dataset.write(journal.store, counts["failed"], about.get("models", {}))
    state = {"run_id": run_id, "requests": len(wanted), **counts, "parts": parts, "digest": digest}
    state |= {"published_at": datetime.now(UTC).isoformat(timespec="seconds"), **about}
    state |= {"dataset": {"media": stored.media, "rows": stored.num_rows}}
    journal.store.replace(layout.success_marker(run_id), to_json(state))
    journal.store.replace(layout.LATEST_RESULTS, to_json({"run_id": run_id, "digest": digest}))
    _settle_dataset(journal, stored)
    uri = journal.store.uri_of(layout.results_folder(run_id))
    return PublishedResults(run_id, len(wanted), counts["succeeded"], counts["failed"], uri)


def restore_dataset(journal: Journal) -> None:
    """Write the dataset of the newest complete results again; do nothing before the first.

    Raises:
        StorageError: The store refused the request or did not answer.
    """
    _settle_dataset(journal, None)


def find_dataset_difference(store: Store) -> str | None:
    """Return the difference between the dataset and the newest complete results in words, or None.

    Results of releases that wrote no dataset differ from nothing.

    Raises:
        StorageError: The store refused the request or did not answer.
    """
    newest = read_latest(store)
    state = newest and read_success_marker(store, newest["run_id"])
    return find_difference(store, state["run_id"]) if state and "dataset" in state else None


def _settle_dataset(journal: Journal, stored: StoredDataset | None) -> None:
    """Make the dataset show the newest complete results.

    Of two runs that publish at the same moment, each may have replaced a part of what the other wrote. Each therefore
    looks again after its last write, so that whoever writes last leaves results and dataset of one run.

    Args:
        journal: Journal of the output.
        stored: Dataset as this process wrote it; None: it wrote none.
    """
    for _ in range(SETTLE_ROUNDS):
        newest = read_latest(journal.store)
        if newest is None:
            return
        if stored is not None and stored.run_id == newest["run_id"] and stored.is_stored(journal.store):
            return
        state = read_success_marker(journal.store, newest["run_id"])
        if state is None:
            return
        names = [f"{layout.results_folder(state['run_id'])}/{part['name']}" for part in state["parts"]]
        parts = itertools.chain.from_iterable(journal.read([name]) for name in names)  # one in memory at a time
        first = next(parts)
        with DatasetWriter(state["run_id"], state["digest"], first.schema) as dataset:
            dataset.add(first)
            for part in parts:
                dataset.add(part)
            stored = dataset.write(journal.store, state["failed"], state.get("models", {}))
    log.warning(
        "dataset_unsettled uri=%s: other runs publish too; `pia-batch verify --repair` writes it", journal.store.uri
    )


def read_success_marker(store: Store, run_id: str) -> dict[str, Any] | None:
    """Return the content of a run's `_SUCCESS.json`, or None if the run has no complete results."""
    try:
        return store.read_json(layout.success_marker(run_id), ("parts",))
    except FileNotFoundError:
        return None


def is_published(store: Store, run_id: str) -> bool:
    """Return whether the results of this run are complete; reads the store."""
    return read_success_marker(store, run_id) is not None


def read_latest(store: Store) -> dict[str, Any] | None:
    """Return the content of `results/LATEST.json`, or None before the first complete run."""
    try:
        return store.read_json(layout.LATEST_RESULTS, ("run_id",))
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
