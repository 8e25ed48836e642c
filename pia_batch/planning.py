"""What a run has to do: the manifest, checked and counted, less what the journal says is finished.

Needs neither Ray nor torch, and holds keys rather than rows: about 50 bytes a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch import weights
from pia_batch.config import ModelConfig, RunConfig
from pia_batch.errors import ConfigError, RequestError
from pia_batch.journal import Journal, Outcomes, digest_of, latest
from pia_batch.manifest import Batch, Manifest
from pia_batch.records import (
    FAILED,
    GROUPED,
    KEY_BYTES,
    REQUEST,
    Keys,
    KeySet,
    canonical_json,
    carried_columns,
    digest,
    keys_from_hex,
    keys_to_hex,
    results_table,
)
from pia_batch.storage import Store
from pia_batch.validation import check, hashes_of


@dataclass(frozen=True)
class Retry:
    """Which requests that failed before are drawn again; those that the manifest's own values rule out never are."""

    kinds: frozenset[str] | None = None
    """Their error kinds; None: all of them."""

    def check(self, outcomes: Outcomes) -> None:
        """Refuse a kind that is neither one of ours nor in the journal.

        Raises:
            ConfigError: it names the kinds that the journal has.
        """
        known = {kind.kind for kind in RequestError.__subclasses__()} | set(outcomes.failures)
        unknown = sorted((self.kinds or frozenset()) - known)
        if unknown:
            found = ", ".join(f"{kind} ({count})" for kind, count in outcomes.failures.most_common()) or "none"
            msg = f"no request failed with the kind {', '.join(unknown)}; the kinds of this output's journal: {found}"
            raise ConfigError(msg)


@dataclass(frozen=True)
class Plan:
    """A manifest against a journal, at one moment."""

    config: RunConfig
    engine_ids: dict[str, str]
    """The identity of each model's engine, by the name that the manifest's `model` column calls it."""
    manifest: Manifest
    outcomes: Outcomes = field(repr=False)
    """What the journal says of this manifest's requests."""
    wanted: KeySet = field(repr=False)
    """The key of every distinct request, rejected ones included: what the results will have rows for."""
    rejected: pa.Table = field(repr=False)
    """Result rows of the requests that cannot be animated, all columns."""
    repeats: pa.Table = field(repr=False)
    """One copy of each unfinished request that the manifest has more than once, as `validation.check` gives it."""
    settled: KeySet = field(repr=False)
    """What Ray has to drop while it reads the manifest: what is finished, and the repeated requests."""
    num_duplicates: int
    """Rows beyond the first of identical requests."""
    num_pending: int
    """Requests that an engine has to draw."""
    groups: pa.Table = field(repr=False)
    """GROUPED and `num_rows`: how many sound rows of the manifest can be drawn together, finished ones included."""

    @property
    def num_rejected(self) -> int:
        """Requests that the manifest's own values rule out."""
        return len(self.rejected)

    @property
    def models(self) -> list[str]:
        """The names of the models that the manifest asks for, the one with most rows first."""
        counts = self.groups.group_by("model").aggregate([("num_rows", "sum")])
        names: list[str] = counts.sort_by([("num_rows_sum", "descending")])["model"].to_pylist()
        return names

    @property
    def is_mixed(self) -> bool:
        """Whether there are requests that cannot be drawn together."""
        return len(self.groups) > 1 or bool(pc.any(pc.equal(self.groups["size"], "auto")).as_py())

    @property
    def carried(self) -> pa.Schema:
        """The manifest's own columns, which its results have too."""
        return carried_columns(self.manifest.schema.empty_table()).schema

    @property
    def published(self) -> bool:
        """Whether the newest results already say all that this run could."""
        newest = latest(Store(self.config.output))
        complete = len(self.outcomes.keys) == len(self.wanted)
        return complete and newest is not None and newest["digest"] == digest_of(self.outcomes)

    def rejections_to_commit(self, run_id: str) -> Iterator[pa.Table]:
        """The rejected requests that the journal does not know yet, in tables for one fragment each."""
        known = KeySet.of(self.outcomes.keys).contains(keys_from_hex(self.rejected["key"]))
        new = self.rejected.filter(pa.array(~known))
        new = new.set_column(new.column_names.index("run_id"), "run_id", pa.repeat(run_id, len(new)))
        for start in range(0, len(new), 10_000):
            yield new.slice(start, 10_000)


def make(config: RunConfig, *, retry: Retry | None = None) -> Plan:
    """Read the manifest and the journal, and find out what is left to do. Writes nothing.

    Args:
        config: the run's config.
        retry: what to draw again of what failed before; None: nothing.

    Raises:
        ManifestError: the manifest cannot be read, is empty, or lacks a column.
        ConfigError: the model cannot be found, or `retry` names a kind that does not exist.
        StorageError: the output cannot be read.
    """
    found = Manifest.open(config.manifest)
    on_gpu = config.placement.num_gpus > 0
    engine_ids = {name: _engine_id(model, on_gpu=on_gpu) for name, model in config.all_models.items()}
    outcomes = Journal(Store(config.output)).outcomes()
    if retry is not None:
        retry.check(outcomes)

    scan = _Scan.of(found, config, engine_ids)
    conflicting, repeated, first_copies = _duplicates(found, scan)
    rejected = _rejected_results(found, scan, conflicting, config)

    sound = ~np.isin(scan.ordinals, conflicting)
    wanted_keys = scan.keys[sound]
    done = KeySet.of(outcomes.keys if retry is None else outcomes.keys[~outcomes.failed(retry.kinds)])
    unfinished = KeySet.of(wanted_keys[~done.contains(wanted_keys)])
    repeats = _take(found, first_copies)
    repeats = check(repeats, config, engine_ids).requests
    repeats = repeats.filter(pa.array(~done.contains(keys_from_hex(repeats["key"]))))
    wanted = KeySet.of(np.concatenate([wanted_keys, keys_from_hex(rejected["key"])]))
    return Plan(
        config=config,
        engine_ids=engine_ids,
        manifest=found,
        outcomes=outcomes.of(wanted),
        wanted=wanted,
        rejected=rejected,
        repeats=repeats,
        settled=KeySet.of(np.concatenate([wanted_keys[done.contains(wanted_keys)], repeated, scan.keys[~sound]])),
        num_duplicates=int(sound.sum()) - len(KeySet.of(wanted_keys)),
        num_pending=len(unfinished),
        groups=scan.groups,
    )


def _engine_id(model: ModelConfig, *, on_gpu: bool) -> str:
    return weights.engine_id(model, weights.resolve(model), weights.resolved_dtype(model, on_gpu=on_gpu))


@dataclass(frozen=True)
class _Scan:
    """One pass over the manifest: what identifies the good rows, and what is wrong with the others."""

    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    ordinals: npt.NDArray[np.int64]
    rejected: pa.Table
    """`row` (the ordinal), `error_kind`, `error`."""
    groups: pa.Table

    @classmethod
    def of(cls, manifest: Manifest, config: RunConfig, engine_ids: Mapping[str, str]) -> _Scan:
        keys, hashes, ordinals, rejected, groups = [], [], [], [], []
        for batch in manifest.batches(REQUEST.names):
            checked = check(batch.table, config, engine_ids)
            keys.append(checked.keys)
            hashes.append(checked.id_hashes)
            ordinals.append(checked.rows + batch.ordinal)
            rejected.append(checked.rejected.set_column(0, "row", pc.add(checked.rejected["row"], batch.ordinal)))
            groups.append(checked.requests.group_by(list(GROUPED)).aggregate([([], "count_all")]))
        counts = pa.concat_tables(groups).group_by(list(GROUPED)).aggregate([("count_all", "sum")])
        return cls(
            np.concatenate(keys),
            np.concatenate(hashes),
            np.concatenate(ordinals),
            pa.concat_tables(rejected),
            counts.rename_columns([*GROUPED, "num_rows"]),
        )


def _duplicates(manifest: Manifest, scan: _Scan) -> tuple[npt.NDArray[np.int64], Keys, npt.NDArray[np.int64]]:
    """Rows whose id stands there with other content; keys that stand there more than once; the first row of each."""
    order = np.argsort(scan.id_hashes, kind="stable")
    hashes = scan.id_hashes[order]
    same = np.zeros(len(order), dtype=bool)
    same[1:] = hashes[1:] == hashes[:-1]
    same[:-1] |= same[1:]
    bad_ids = _request_ids(manifest, scan.rejected["row"].to_numpy()).drop_null()
    same |= np.isin(hashes, hashes_of(bad_ids))
    suspects = np.sort(order[same])
    if not len(suspects):
        return np.empty(0, np.int64), np.empty(0, f"V{KEY_BYTES}"), np.empty(0, np.int64)
    rows = pa.table(
        {
            "request_id": _request_ids(manifest, scan.ordinals[suspects]),
            "key": keys_to_hex(scan.keys[suspects]),
            "ordinal": scan.ordinals[suspects],
        }
    )
    counts = rows.group_by("request_id").aggregate([("key", "count_distinct")])
    ambiguous = counts.filter(pc.greater(counts["key_count_distinct"], 1))["request_id"]
    others = pa.concat_arrays([ambiguous.combine_chunks(), bad_ids])
    conflicting = pc.is_in(rows["request_id"], value_set=others)
    copies = rows.filter(pc.invert(conflicting)).group_by("key").aggregate([("ordinal", "min"), ("ordinal", "count")])
    repeated = copies.filter(pc.greater(copies["ordinal_count"], 1))
    return (
        rows.filter(conflicting)["ordinal"].to_numpy(),
        keys_from_hex(repeated["key"]),
        np.sort(repeated["ordinal_min"].to_numpy()),
    )


def _rejected_results(
    manifest: Manifest, scan: _Scan, conflicting: npt.NDArray[np.int64], config: RunConfig
) -> pa.Table:
    """A failed result for every row that is bad by itself or shares its id with a different request."""
    clash = (
        "column 'request_id': the same id stands in this manifest with other content; "
        "allowed: one request per id, or identical copies"
    )
    reasons = pa.concat_tables(
        [
            scan.rejected,
            pa.table(
                {
                    "row": conflicting,
                    "error_kind": pa.repeat("duplicate_id", len(conflicting)),
                    "error": pa.repeat(clash, len(conflicting)),
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


def _failed(
    rows: pa.Table, reasons: pa.Table, batch: Batch, numbers: npt.NDArray[np.int64], config: RunConfig
) -> pa.Table:
    named = ("request_id", "image", "prompt", "model", "ip_adapter_image")
    checked = {name: _text(rows[name]) for name in named if name in rows.column_names}
    if "model" in checked:
        checked["model"] = pc.fill_null(checked["model"], config.model.name)
    where = pc.binary_join_element_wise(
        pa.scalar(f"{batch.file} row "), pa.array(numbers + batch.first_row).cast(pa.string()), ""
    )
    error = pc.binary_join_element_wise(where, reasons["error"].combine_chunks(), ": ")
    columns = (
        {"model": pa.scalar(config.model.name)}
        | checked
        | {
            "key": keys_to_hex(digest(canonical_json({"rejected": error, "request_id": checked["request_id"]}))),
            "status": pa.scalar(FAILED),
            "error_kind": reasons["error_kind"].combine_chunks(),
            "error": error,
            "attempts": pa.scalar(0),
            "finished_at": pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")),
        }
    )
    return results_table(columns, carried_columns(rows), len(rows))


def _batches_with(
    manifest: Manifest, ordinals: npt.NDArray[np.int64], columns: list[str] | None = None
) -> Iterator[tuple[Batch, npt.NDArray[np.int64]]]:
    """The batches that hold any of the sorted `ordinals`, with the row numbers inside each."""
    if not len(ordinals):
        return
    for batch in manifest.batches(columns):
        low, high = np.searchsorted(ordinals, [batch.ordinal, batch.ordinal + len(batch.table)])
        if low < high:
            yield batch, ordinals[low:high] - batch.ordinal
        if high == len(ordinals):
            return


def _take(manifest: Manifest, ordinals: npt.NDArray[np.int64]) -> pa.Table:
    """The rows at the sorted `ordinals`, all columns."""
    chosen = [batch.table.take(pa.array(rows)) for batch, rows in _batches_with(manifest, ordinals)]
    return pa.concat_tables([manifest.schema.empty_table(), *chosen])


def _request_ids(manifest: Manifest, ordinals: npt.NDArray[np.int64]) -> pa.Array:
    """The request ids at `ordinals`, in their order."""
    order = np.argsort(ordinals, kind="stable")
    chosen = [
        _text(batch.table["request_id"].take(pa.array(rows)))
        for batch, rows in _batches_with(manifest, ordinals[order], ["request_id"])
    ]
    return pa.concat_arrays([pa.array([], pa.string()), *chosen]).take(pa.array(np.argsort(order, kind="stable")))


def _text(column: pa.ChunkedArray) -> pa.Array:
    """A column as strings, null where it holds something else."""
    array = column.combine_chunks()
    try:
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(array), pa.string())
