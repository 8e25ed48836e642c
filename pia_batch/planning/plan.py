"""Plan of a run: the manifest, validated and counted, less the requests that the journal has finished.

It needs neither Ray nor torch, and holds keys rather than rows: about 50 bytes per request.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.config.model_limits import ModelLimits
from pia_batch.errors import ConfigError, RequestError
from pia_batch.journal.log import Journal, Outcomes, digest_of
from pia_batch.journal.results import read_latest, read_success_marker
from pia_batch.journal.row_locations import RowLocations
from pia_batch.manifest.blocklist import with_blocklist
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.effective import hashes_of
from pia_batch.manifest.reader import Manifest, refuse_output_inside
from pia_batch.manifest.validation import check
from pia_batch.planning.duplicates import find_duplicates, read_rows, rejected_results
from pia_batch.planning.model_limits import limits_of
from pia_batch.planning.scan import Scan, scan_manifest
from pia_batch.planning.scan_cache import Chunk, ScanCache
from pia_batch.planning.selection import check_priority, select
from pia_batch.planning.statistics import Statistics, WorkClasses
from pia_batch.schema.columns import REQUEST
from pia_batch.schema.keys import Keys, KeySet, keys_from_hex
from pia_batch.storage import filesystems
from pia_batch.storage.object_store import Store
from pia_batch.weights import safety_checker_files
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve
from pia_batch.weights.upscaler_files import with_upscaler

REJECTIONS_PER_FRAGMENT = 10_000


@dataclass(frozen=True)
class Retry:
    """Selection of failed requests to animate again. Requests that the manifest's own values rule out are excluded."""

    kinds: frozenset[str] | None = None
    """Error kinds of the requests to animate again; None: all kinds."""
    only: pa.Array | None = None
    """Ids of the requests to animate again, strings; None: all requests."""

    def check(self, outcomes: Outcomes) -> None:
        """Refuse a kind that this package does not know and the journal does not have.

        Raises:
            ConfigError: a kind does not exist; the message names the kinds that the journal has.
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
    """A manifest compared with a journal, at one moment."""

    config: RunConfig
    engine_ids: dict[str, str]
    """Identity of each model's engine, by the model's name in the manifest's `model` column."""
    model_limits: dict[str, ModelLimits]
    """Limits of each model that its files decide, by the same names."""
    manifest: Manifest
    outcomes: Outcomes = field(repr=False)
    """Outcomes that the journal has for this manifest's requests."""
    wanted: KeySet = field(repr=False)
    """Key of every distinct request, including rejected ones: the results will have one row for each."""
    rejected: pa.Table = field(repr=False)
    """Result rows of the requests that cannot be animated, with all columns."""
    repeats: pa.Table = field(repr=False)
    """One copy of each unfinished request that the manifest repeats, as `validation.check` returns it."""
    skipped: KeySet = field(repr=False)
    """Keys that Ray drops while it reads the manifest: finished and repeated requests."""
    num_duplicates: int
    """Number of rows beyond the first of identical requests."""
    num_pending: int
    """Number of requests that still need an animation."""
    selected: KeySet | None = field(repr=False)
    """Keys of the pending requests that this run animates within its budget; None: all of them."""
    num_failed: int
    """Number of requests that failed or were rejected, and are not animated again."""
    groups: pa.Table = field(repr=False)
    """Table of GROUPED and `num_rows`: the number of valid rows, finished ones included, that can share a batch."""
    scan_cache: ScanCache = field(repr=False)
    new_chunks: tuple[Chunk, ...] = field(repr=False)
    """Chunks of the manifest that were read because `scan_cache` lacks them."""

    @property
    def num_selected(self) -> int:
        """Number of requests that this run animates, unless it is stopped."""
        return self.num_pending if self.selected is None else len(self.selected)

    @property
    def num_rejected(self) -> int:
        """Number of requests that the manifest's own values rule out."""
        return len(self.rejected)

    @property
    def models(self) -> list[str]:
        """Names of the models that the manifest uses, the one with most rows first."""
        counts = self.groups.group_by("model").aggregate([("num_rows", "sum")])
        names: list[str] = counts.sort_by([("num_rows_sum", "descending")])["model"].to_pylist()
        return names

    @property
    def is_mixed(self) -> bool:
        """True if some requests cannot share a batch."""
        return len(self.groups) > 1 or bool(pc.any(pc.equal(self.groups["size"], "auto")).as_py())

    @property
    def carried(self) -> pa.Schema:
        """Columns of the manifest that are carried into its results."""
        return pa.schema([item for item in self.manifest.published if item.name not in REQUEST.names])

    def record_locations(self) -> None:
        """Record the manifest's files, if ids are locations in them, before anything about their rows is committed."""
        if self.config.request_id_from == "location":
            RowLocations(Store(self.config.output), self.manifest.uri).record(self.manifest.versions)

    def save_scan(self) -> None:
        """Write the new chunks to the scan cache, so that the next plan reads only files that are new or changed."""
        self.scan_cache.save(self.manifest, self.new_chunks)

    def rejections_to_commit(self, run_id: str) -> Iterator[pa.Table]:
        """Yield the rejected requests that the journal lacks, in tables of one fragment each."""
        known = KeySet.of(self.outcomes.keys).contains(keys_from_hex(self.rejected["key"]))
        new = self.rejected.filter(pa.array(~known))
        new = new.set_column(new.column_names.index("run_id"), "run_id", pa.repeat(run_id, len(new)))
        for start in range(0, len(new), REJECTIONS_PER_FRAGMENT):
            yield new.slice(start, REJECTIONS_PER_FRAGMENT)


def make_plan(config: RunConfig, *, retry: Retry | None = None, statistics: Statistics | None = None) -> Plan:
    """Read the manifest and the journal, and compute what is left to do. Writes nothing.

    Args:
        config: The run's config.
        retry: Failed requests to animate again; None: none of them.
        statistics: Empty statistics, to which this adds every row of the manifest; None: nothing is counted.

    Raises:
        ManifestError: the manifest cannot be read, is empty, or lacks a column.
        ConfigError: a model or the upscaler cannot be found, the output is inside the manifest's folder, `retry` names
            a kind that does not exist, or the blocklist cannot be read.
        StorageError: the output cannot be read.
    """
    config = with_upscaler(with_blocklist(config))
    engine_ids = engine_ids_of(config)
    safety_checker_files.resolve(config.safety)  # else each worker would find that it is missing
    store = Store(config.output)
    outcomes = Journal(store).outcomes()  # before the scans are read, which need as much memory
    cache = ScanCache(store, config, engine_ids)
    found = Manifest.open(config.manifest, cache.contents, ColumnMap.of(config))
    refuse_output_inside(found, config.output)
    if config.request_id_from == "location":
        RowLocations(store, found.uri).check(found.versions)
    filesystems.check_access(config.images.allow)  # else it would be the same error of every row, on the workers
    if retry is not None:
        retry.check(outcomes)

    limits = limits_of(config)
    scan = scan_manifest(found, config, engine_ids, cache, limits)
    pa.default_memory_pool().release_unused()
    duplicates = find_duplicates(found, scan, config.request_id_from)
    rejected = rejected_results(found, scan, duplicates.conflicting, config)

    valid = np.ones(len(scan.keys), dtype=bool)
    valid[scan.indices(duplicates.conflicting)] = False
    good = KeySet.of(scan.keys if valid.all() else scan.keys[valid])
    done = _done(outcomes, retry, scan)  # not earlier: it takes as much memory as the manifest's keys
    finished = done.contains_members(good)
    unfinished = good.filter(~finished)
    if statistics is not None:
        _count(statistics, scan, valid, done)
    selected = _select(config, found, scan, unfinished)
    repeats = check(read_rows(found, duplicates.first_copies), config, engine_ids, limits).requests
    copied = keys_from_hex(repeats["key"])
    repeats = repeats.filter(pa.array((unfinished if selected is None else selected).contains(copied)))
    wanted = good | KeySet.of(keys_from_hex(rejected["key"]))
    skipped = good.filter(finished) | KeySet.of(np.concatenate([duplicates.repeated, scan.keys[~valid]]))
    new_chunks, groups = scan.new_chunks, scan.groups
    del scan  # as large as what follows
    outcomes = outcomes.of(wanted)
    return Plan(
        config=config,
        engine_ids=engine_ids,
        model_limits=limits,
        manifest=found,
        outcomes=outcomes,
        wanted=wanted,
        rejected=rejected,
        repeats=repeats,
        skipped=skipped,
        num_duplicates=int(valid.sum()) - len(good),
        num_pending=len(unfinished),
        selected=selected,
        num_failed=_num_failed(outcomes, done, rejected),
        groups=groups,
        scan_cache=cache,
        new_chunks=new_chunks,
    )


def find_published_run(plan: Plan) -> str | None:
    """Return the id of a run whose published results are those that this plan's run would publish, or None.

    Only the newest results are compared; for a run with a date also earlier ones of the same name, because runs of
    other dates may have followed.

    Raises:
        StorageError: the store refused the request or did not answer.
    """
    if len(plan.outcomes.keys) != len(plan.wanted):
        return None
    store, digest = Store(plan.config.output), digest_of(plan.outcomes)
    newest = read_latest(store)
    if newest is not None and newest["digest"] == digest:
        return str(newest["run_id"])
    if plan.config.run_date is None or plan.config.run_id is None:
        return None
    for run_id in run_ids_of(plan.config.run_id):
        marker = read_success_marker(store, run_id)
        if marker is None or marker["digest"] == digest:
            return run_id if marker else None
    raise AssertionError  # unreachable: run ids never end


def run_ids_of(run_id: str) -> Iterator[str]:
    """Yield the ids of the runs of one date, in order: rows that arrive late need another run of a finished date."""
    yield run_id
    for number in itertools.count(2):
        yield f"{run_id}-{number}"


def engine_ids_of(config: RunConfig) -> dict[str, str]:
    """Return the identity of each model's engine, by the model's name in the manifest's `model` column.

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


def _done(outcomes: Outcomes, retry: Retry | None, scan: Scan) -> KeySet:
    """Return the keys that are not animated again.

    Raises:
        ConfigError: `retry` names requests, and the manifest has none of them.
    """
    if retry is None:
        return KeySet.of(outcomes.keys)
    again = outcomes.failed(retry.kinds)
    if retry.only is not None:
        named = np.isin(scan.id_hashes, hashes_of(retry.only))
        if not named.any():
            msg = f"--only: the manifest has none of the {len(retry.only)} requests of that table; check its ids"
            raise ConfigError(msg)
        again &= KeySet.of(scan.keys[named]).contains(outcomes.keys)
    return KeySet.of(outcomes.keys[~again])


def _count(statistics: Statistics, scan: Scan, valid: npt.NDArray[np.bool_], done: KeySet) -> None:
    """Add all rows to the statistics; those that are `valid` and not `done` are pending."""
    start = 0
    for packed in scan.work_classes:
        part = WorkClasses.unpacked(packed)
        rows = slice(start, start + len(part.class_of))
        statistics.add(part, scan.id_hashes[rows], valid[rows] & ~done.contains(scan.keys[rows]))
        start = rows.stop


def _num_failed(outcomes: Outcomes, done: KeySet, rejected: pa.Table) -> int:
    failed: Keys = outcomes.keys[~outcomes.succeeded]
    return len(KeySet.of(np.concatenate([failed[done.contains(failed)], keys_from_hex(rejected["key"])])))


def _select(config: RunConfig, manifest: Manifest, scan: Scan, unfinished: KeySet) -> KeySet | None:
    check_priority(config, manifest.schema)
    if config.budget.sample is None and config.budget.limit is None:
        return None
    pending = np.flatnonzero(unfinished.contains(scan.keys))
    return select(config, manifest, scan.keys[pending], scan.id_hashes[pending], scan.ordinals(pending))
