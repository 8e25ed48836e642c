"""What a run has to do: the manifest, checked and counted, less what the journal says is finished.

Needs neither Ray nor torch, and holds keys rather than rows: about 50 bytes a request.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.errors import ConfigError, RequestError
from pia_batch.journal.log import Journal, Outcomes, digest_of
from pia_batch.journal.results import latest, published
from pia_batch.manifest.reader import Batch, Manifest, refuse_output_inside
from pia_batch.manifest.validation import check, hashes_of
from pia_batch.planning import scan as scanning
from pia_batch.planning import selection
from pia_batch.planning.scan import Scan
from pia_batch.planning.scan_cache import Chunk, ScanCache
from pia_batch.planning.statistics import Survey
from pia_batch.planning.work_classes import Traits
from pia_batch.schema.columns import FAILED, as_text, carried_columns, named_texts, rejected_keys, results_table
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, keys_from_hex, keys_to_hex
from pia_batch.storage.object_store import Store
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve


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
        known = {kind.kind for kind in RequestError.__subclasses__()} | {kind for kind in outcomes.failures if kind}
        unknown = sorted((self.kinds or frozenset()) - known)
        if unknown:
            found = ", ".join(f"{kind} ({count})" for kind, count in outcomes.failures.most_common()) or "none"
            near = [match for kind in unknown for match in difflib.get_close_matches(kind, known, n=1)]
            meant = f"; did you mean {' and '.join(near)}?" if near else ""
            msg = f"no request failed with the kind {', '.join(unknown)}{meant}; this output's journal has: {found}"
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
    chosen: KeySet | None = field(repr=False)
    """Those that this run draws, by its budget; None: all that are pending."""
    num_failed: int
    """Requests that have failed, or were rejected, and are not drawn again."""
    groups: pa.Table = field(repr=False)
    """GROUPED and `num_rows`: how many sound rows of the manifest can be drawn together, finished ones included."""
    cache: ScanCache = field(repr=False)
    fresh: tuple[Chunk, ...] = field(repr=False)
    """What was read of the manifest that `cache` lacks."""

    @property
    def num_chosen(self) -> int:
        """How many requests this run draws, if nothing stops it."""
        return self.num_pending if self.chosen is None else len(self.chosen)

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
    def published(self) -> str | None:
        """The id of the run whose results already say all that this one could; None: there is none.

        It is the newest run; of a dated run, also an earlier one of the same name, for other dates may have followed.
        """
        if len(self.outcomes.keys) != len(self.wanted):
            return None
        store, digest = Store(self.config.output), digest_of(self.outcomes)
        newest = latest(store)
        if newest is not None and newest["digest"] == digest:
            return str(newest["run_id"])
        if self.config.run_date is None or self.config.run_id is None:
            return None
        for name in names_of(self.config.run_id):
            told = published(store, name)
            if told is None or told["digest"] == digest:
                return name if told else None
        raise AssertionError  # unreachable: there is no end of names

    def save_scan(self) -> None:
        """Keep what was read of the manifest, so that the next plan reads only what changes or is new by then."""
        self.cache.save(self.manifest, self.fresh)

    def rejections_to_commit(self, run_id: str) -> Iterator[pa.Table]:
        """The rejected requests that the journal does not know yet, in tables for one fragment each."""
        known = KeySet.of(self.outcomes.keys).contains(keys_from_hex(self.rejected["key"]))
        new = self.rejected.filter(pa.array(~known))
        new = new.set_column(new.column_names.index("run_id"), "run_id", pa.repeat(run_id, len(new)))
        for start in range(0, len(new), 10_000):
            yield new.slice(start, 10_000)


def make(config: RunConfig, *, retry: Retry | None = None, survey: Survey | None = None) -> Plan:
    """Read the manifest and the journal, and find out what is left to do. Writes nothing.

    Args:
        config: the run's config.
        retry: what to draw again of what failed before; None: nothing.
        survey: has seen nothing; here it sees the manifest, and which of its requests are to be drawn.

    Raises:
        ManifestError: the manifest cannot be read, is empty, or lacks a column.
        ConfigError: the model cannot be found, the output lies inside the manifest's folder, or `retry` names a kind
            that does not exist.
        StorageError: the output cannot be read.
    """
    engine_ids = engine_ids_of(config)
    store = Store(config.output)
    outcomes = Journal(store).outcomes()  # before the scans are read: it needs as much memory for itself
    cache = ScanCache(store, config, engine_ids)
    found = Manifest.open(config.manifest, cache.contents)
    refuse_output_inside(found, config.output)
    if retry is not None:
        retry.check(outcomes)

    scan = scanning.scan(found, config, engine_ids, cache)
    pa.default_memory_pool().release_unused()
    conflicting, repeated, first_copies = _duplicates(found, scan)
    rejected = _rejected_results(found, scan, conflicting, config)

    sound = np.ones(len(scan.keys), dtype=bool)
    sound[scan.indices(conflicting)] = False
    good = KeySet.of(scan.keys if sound.all() else scan.keys[sound])
    done = _done(outcomes, retry)  # not before: as much memory as the manifest's keys
    finished = done.has(good)
    unfinished = good.take(~finished)
    if survey is not None:
        _show(survey, scan, sound, done)
    chosen = _choose(config, found, scan, unfinished)
    repeats = _take(found, first_copies)
    repeats = check(repeats, config, engine_ids).requests
    copied = keys_from_hex(repeats["key"])
    repeats = repeats.filter(pa.array((unfinished if chosen is None else chosen).contains(copied)))
    wanted = good | KeySet.of(keys_from_hex(rejected["key"]))
    settled = good.take(finished) | KeySet.of(np.concatenate([repeated, scan.keys[~sound]]))
    fresh, groups = scan.fresh, scan.groups
    del scan  # as large as what comes next
    outcomes = outcomes.of(wanted)
    return Plan(
        config=config,
        engine_ids=engine_ids,
        manifest=found,
        outcomes=outcomes,
        wanted=wanted,
        rejected=rejected,
        repeats=repeats,
        settled=settled,
        num_duplicates=int(sound.sum()) - len(good),
        num_pending=len(unfinished),
        chosen=chosen,
        num_failed=_num_failed(outcomes, done, rejected),
        groups=groups,
        cache=cache,
        fresh=fresh,
    )


def _done(outcomes: Outcomes, retry: Retry | None) -> KeySet:
    """What is not drawn again."""
    return KeySet.of(outcomes.keys if retry is None else outcomes.keys[~outcomes.failed(retry.kinds)])


def _show(survey: Survey, scan: Scan, sound: npt.NDArray[np.bool_], done: KeySet) -> None:
    """Let the survey see all rows, of which those that are `sound` and not `done` are to be drawn."""
    start = 0
    for packed in scan.traits:
        traits = Traits.unpacked(packed)
        rows = slice(start, start + len(traits.class_of))
        survey.add(traits, scan.id_hashes[rows], sound[rows] & ~done.contains(scan.keys[rows]))
        start = rows.stop


def names_of(run_id: str) -> Iterator[str]:
    """What the runs of one date are called, one after the other: late rows make another run of a finished date."""
    yield run_id
    for number in itertools.count(2):
        yield f"{run_id}-{number}"


def _num_failed(outcomes: Outcomes, done: KeySet, rejected: pa.Table) -> int:
    failed = outcomes.keys[~outcomes.succeeded]
    return len(KeySet.of(np.concatenate([failed[done.contains(failed)], keys_from_hex(rejected["key"])])))


def _choose(config: RunConfig, manifest: Manifest, scan: Scan, unfinished: KeySet) -> KeySet | None:
    selection.check_priority(config, manifest.schema)
    if config.budget.sample is None and config.budget.limit is None:
        return None
    due = np.flatnonzero(unfinished.contains(scan.keys))
    return selection.choose(config, manifest, scan.keys[due], scan.id_hashes[due], scan.ordinals(due))


def engine_ids_of(config: RunConfig) -> dict[str, str]:
    """The identity of each model's engine, by the name that the manifest's `model` column calls it.

    Raises:
        ConfigError: a model cannot be found.
    """
    return {name: _engine_id(config, name, model) for name, model in config.all_models.items()}


def _engine_id(config: RunConfig, name: str, model: ModelConfig) -> str:
    try:
        found = resolve(model)
    except ConfigError as err:
        if model is config.model:
            raise
        msg = f"models.{name}: {err}"
        raise ConfigError(msg) from None
    return engine_id(model, found, resolved_dtype(model, on_gpu=config.placement.num_gpus > 0))


def _duplicates(manifest: Manifest, scan: Scan) -> tuple[npt.NDArray[np.int64], Keys, npt.NDArray[np.int64]]:
    """Rows whose id stands there with other content; keys that stand there more than once; the first row of each."""
    hashes = np.sort(scan.id_hashes)
    bad_ids = _request_ids(manifest, scan.rejected["row"].to_numpy()).drop_null()
    repeated_hashes = np.concatenate([hashes[1:][hashes[1:] == hashes[:-1]], hashes_of(bad_ids)])
    suspects = np.flatnonzero(_is_in(scan.id_hashes, repeated_hashes))
    if not len(suspects):
        return np.empty(0, np.int64), np.empty(0, f"V{KEY_BYTES}"), np.empty(0, np.int64)
    ordinals = scan.ordinals(suspects)
    rows = pa.table(
        {
            "request_id": _request_ids(manifest, ordinals),
            "key": keys_to_hex(scan.keys[suspects]),
            "ordinal": ordinals,
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
    manifest: Manifest, scan: Scan, conflicting: npt.NDArray[np.int64], config: RunConfig
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
    """As `np.isin`, which would sort all the values once more."""
    if not len(few):
        return np.zeros(len(values), dtype=bool)
    few = np.sort(few)
    found: npt.NDArray[np.bool_] = few[np.minimum(np.searchsorted(few, values), len(few) - 1)] == values
    return found


def _batches_with(
    manifest: Manifest, ordinals: npt.NDArray[np.int64], columns: list[str] | None = None
) -> Iterator[tuple[Batch, npt.NDArray[np.int64]]]:
    """The batches that hold any of the sorted `ordinals`, with the row numbers inside each."""
    if not len(ordinals):
        return
    for batch in manifest.batches(columns, ordinals):
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
        as_text(batch.table["request_id"].take(pa.array(rows)))
        for batch, rows in _batches_with(manifest, ordinals[order], ["request_id"])
    ]
    return pa.concat_arrays([pa.array([], pa.string()), *chosen]).take(pa.array(np.argsort(order, kind="stable")))
