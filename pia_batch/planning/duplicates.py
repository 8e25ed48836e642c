"""Duplicates and rejections: rows that share a request id, and the failed results of rows that cannot be animated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RequestIdFrom, RunConfig
from pia_batch.manifest.effective import hashes_of
from pia_batch.manifest.reader import Batch, Manifest
from pia_batch.planning.scan import Scan
from pia_batch.schema.columns import FAILED, as_text, carried_columns, named_texts, rejected_keys, results_table
from pia_batch.schema.keys import KEY_BYTES, Keys, keys_from_hex, keys_to_hex


@dataclass(frozen=True)
class Duplicates:
    """Rows of a manifest that share their request id with another row."""

    conflicting: npt.NDArray[np.int64]
    """Row numbers of the valid rows whose id also belongs to a row with other content."""
    repeated: Keys
    """Keys of the requests that the manifest repeats."""
    first_copies: npt.NDArray[np.int64]
    """Row number of the first copy of each repeated request, ascending."""


def find_duplicates(manifest: Manifest, scan: Scan, ids: RequestIdFrom) -> Duplicates:
    """Find the rows with an id that occurs more than once; reads the ids of those rows only.

    Args:
        manifest: The manifest.
        scan: Its scan.
        ids: Origin of request ids. Those made of the content need no reading: equal keys are equal ids.
    """
    hashes = np.sort(scan.id_hashes)
    by_content = ids == "content"
    bad_ids = pa.array([], pa.string())
    if not by_content:
        bad_ids = _request_ids(manifest, scan.rejected["row"].to_numpy()).drop_null()
    repeated_hashes = np.concatenate([hashes[1:][hashes[1:] == hashes[:-1]], hashes_of(bad_ids)])
    suspects = np.flatnonzero(_is_in(scan.id_hashes, repeated_hashes))
    if not len(suspects):
        return Duplicates(np.empty(0, np.int64), np.empty(0, f"V{KEY_BYTES}"), np.empty(0, np.int64))
    ordinals = scan.ordinals(suspects)
    keys = keys_to_hex(scan.keys[suspects])
    rows = pa.table(
        {
            "request_id": keys if by_content else _request_ids(manifest, ordinals),
            "key": keys,
            "ordinal": ordinals,
        }
    )
    counts = rows.group_by("request_id").aggregate([("key", "count_distinct")])
    ambiguous = counts.filter(pc.greater(counts["key_count_distinct"], 1))["request_id"]
    others = pa.concat_arrays([ambiguous.combine_chunks(), bad_ids])
    conflicting = pc.is_in(rows["request_id"], value_set=others)
    copies = rows.filter(pc.invert(conflicting)).group_by("key").aggregate([("ordinal", "min"), ("ordinal", "count")])
    repeated = copies.filter(pc.greater(copies["ordinal_count"], 1))
    return Duplicates(
        rows.filter(conflicting)["ordinal"].to_numpy(),
        keys_from_hex(repeated["key"]),
        np.sort(repeated["ordinal_min"].to_numpy()),
    )


def rejected_results(manifest: Manifest, scan: Scan, conflicting: npt.NDArray[np.int64], config: RunConfig) -> pa.Table:
    """Return a failed result for every row that is invalid by itself or shares its id with a different request."""
    conflict = (
        "column 'request_id': the same id is in this manifest with other content; "
        "allowed: one request per id, or identical copies"
    )
    reasons = pa.concat_tables(
        [
            scan.rejected,
            pa.table(
                {
                    "row": conflicting,
                    "error_kind": pa.repeat("duplicate_id", len(conflicting)),
                    "error": pa.repeat(conflict, len(conflicting)),
                },
                schema=scan.rejected.schema,
            ),
        ]
    ).sort_by("row")
    tables = [results_table({}, carried_columns(manifest.schema.empty_table()), 0)]
    for batch, rows in _batches_with(manifest, reasons["row"].to_numpy()):
        chosen = batch.table.take(pa.array(rows))
        here = reasons.filter(pc.is_in(reasons["row"], value_set=pa.array(rows + batch.ordinal)))
        tables.append(_failed(chosen, here, batch, rows, config))
    return pa.concat_tables(tables).combine_chunks()


def read_rows(manifest: Manifest, ordinals: npt.NDArray[np.int64]) -> pa.Table:
    """Read the rows with these row numbers, which are ascending, with all columns."""
    chosen = [batch.table.take(pa.array(rows)) for batch, rows in _batches_with(manifest, ordinals)]
    return pa.concat_tables([manifest.schema.empty_table(), *chosen])


def _failed(
    rows: pa.Table, reasons: pa.Table, batch: Batch, numbers: npt.NDArray[np.int64], config: RunConfig
) -> pa.Table:
    texts = named_texts(rows, config.model.name)
    where = pc.binary_join_element_wise(
        pa.scalar(f"{batch.file} row "), pa.array(numbers + batch.first_row).cast(pa.string()), ""
    )
    error = pc.binary_join_element_wise(where, reasons["error"].combine_chunks(), ": ")
    columns = texts | {
        "key": rejected_keys(texts["request_id"], error),
        "status": pa.scalar(FAILED),
        "error_kind": reasons["error_kind"].combine_chunks(),
        "error": error,
        "attempts": pa.scalar(0),
        "finished_at": pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")),
    }
    return results_table(columns, carried_columns(rows), len(rows))


def _is_in(values: npt.NDArray[np.uint64], few: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return the same as `np.isin`, which would sort all the values once more."""
    if not len(few):
        return np.zeros(len(values), dtype=bool)
    few = np.sort(few)
    found: npt.NDArray[np.bool_] = few[np.minimum(np.searchsorted(few, values), len(few) - 1)] == values
    return found


def _batches_with(
    manifest: Manifest, ordinals: npt.NDArray[np.int64], columns: list[str] | None = None
) -> Iterator[tuple[Batch, npt.NDArray[np.int64]]]:
    """Yield the batches that hold any of the ascending `ordinals`, with the row numbers inside each batch."""
    if not len(ordinals):
        return
    for batch in manifest.batches(columns, ordinals):
        low, high = np.searchsorted(ordinals, [batch.ordinal, batch.ordinal + len(batch.table)])
        if low < high:
            yield batch, ordinals[low:high] - batch.ordinal
        if high == len(ordinals):
            return


def _request_ids(manifest: Manifest, ordinals: npt.NDArray[np.int64]) -> pa.Array:
    """Read the request ids at `ordinals`, in that order."""
    order = np.argsort(ordinals, kind="stable")
    chosen = [
        as_text(batch.table["request_id"].take(pa.array(rows)))
        for batch, rows in _batches_with(manifest, ordinals[order], ["request_id"])
    ]
    return pa.concat_arrays([pa.array([], pa.string()), *chosen]).take(pa.array(np.argsort(order, kind="stable")))
