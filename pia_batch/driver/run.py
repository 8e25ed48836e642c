"""Run: plans, takes the lease, generates, publishes and reports one manifest."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime

import ray

from pia_batch import report
from pia_batch.config import RunConfig
from pia_batch.driver import monitor, notifications, ray_cluster
from pia_batch.driver.budget import Budget, LimitReached, selection_limit
from pia_batch.driver.monitor import RunControls
from pia_batch.driver.own_ray_node import check_processes
from pia_batch.driver.progress import Gauges, Progress
from pia_batch.driver.run_record import RunRecordWriter
from pia_batch.errors import ConfigError, InterruptedRunError, PiaBatchError, StorageError
from pia_batch.journal import layout
from pia_batch.journal.compaction import Compactor
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import is_published, publish
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.attempts_actor import start_attempt_tracker
from pia_batch.pipeline.chain import chain
from pia_batch.pipeline.engine_loader import LoadEngines
from pia_batch.planning.plan import Plan, Retry, find_published_run, make_plan, run_ids_of
from pia_batch.schema.run_record import RunRecord, RunSummary
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    *,
    retry: Retry | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_end: Callable[[RunRecord], None] = lambda _: None,
    stop: threading.Event | None = None,
    load_engines: LoadEngines | None = None,
) -> RunSummary:
    """Process the pending requests of `config.manifest`, then publish the results. Write nothing if none is pending.

    Args:
        config: Config of the run; its templates are filled in here.
        retry: Failed requests to try again, or None for none of them.
        on_progress: Called about twice a second.
        on_end: Called once with the run record, also where the run ends by an error.
        stop: Event that stops the run when it is set: batches in flight are committed, then InterruptedRunError is
            raised.
        load_engines: Function that gives each worker its engines; None: the engines of the config's models.

    Raises:
        ConfigError: The operator has to act; raised before Ray starts, as are ManifestError and StorageError.
        LeaseHeldError: Another run works on this output.
        InterruptedRunError: `stop` was set, or the store went away; start again to resume.
        AccountingError: A request has no result although Ray has finished; start again.
    """
    writer = RunRecordWriter(config)
    try:
        filled = config.filled()
        writer = RunRecordWriter(filled)
        summary = Run(filled, writer, retry, on_progress, stop or threading.Event(), load_engines).execute()
    except Exception as err:
        writer.fail(err)
        _notify(config, writer.record, on_end)
        raise
    _notify(config, writer.record, on_end)
    return summary


def _notify(config: RunConfig, record: RunRecord, on_end: Callable[[RunRecord], None]) -> None:
    on_end(record)
    notifications.notify(config.on_finish, record)


class Run:
    """One run of a config whose templates are filled in.

    Args:
        config: Config of the run.
        writer: Writer of the run record.
        retry: Failed requests to try again, or None for none of them.
        on_progress: Called about twice a second.
        stop: Event that stops the run when it is set.
        load_engines: Function that gives each worker its engines; None: the engines of the config's models.
    """

    _plan: Plan
    _run_id: str
    _progress: Progress
    _controls: RunControls
    _journal: Journal
    _compactor: Compactor

    def __init__(
        self,
        config: RunConfig,
        writer: RunRecordWriter,
        retry: Retry | None,
        on_progress: Callable[[Progress], None],
        stop: threading.Event,
        load_engines: LoadEngines | None,
    ) -> None:
        self._config, self._writer, self._retry = config, writer, retry
        self._on_progress, self._stop, self._load_engines = on_progress, stop, load_engines
        self._budget, self._store = Budget(config), Store(config.output)
        self._has_begun = False

    def execute(self) -> RunSummary:
        """Execute the run from its plan to its report page, and return its summary."""
        if published := self._make_plan():
            return self._writer.finish(self._plan.outcomes, published)
        with self._leased() as lease, self._interruptible():
            if lease.has_waited and (published := self._make_plan()):  # the other run may have done all of it
                return self._writer.finish(self._plan.outcomes, published)
            self._begin(lease)
            self._commit_rejections()
            limit = self._generate() or selection_limit(self._plan)
            summary = self._publish(limit)
        self._write_report(summary)
        return summary

    def _make_plan(self) -> str | None:
        """Plan the run; return the id of the run that has published all of it already, or None."""
        with self._writer.phase("planning"):
            self._plan = make_plan(self._config, retry=self._retry)
            self._writer.set_plan(self._plan)
            published = None if self._plan.num_pending else find_published_run(self._plan)
        if published is None:
            self._run_id = _run_id_of(self._config, self._store)
        return published

    @contextmanager
    def _leased(self) -> Iterator[Lease]:
        """Hold the lease of the output; wait for it as long as config and budget allow."""
        self._store.check(layout.CREATE_ONLY_PROBE)
        wait_s = min(self._config.limits.lease_wait_s, self._budget.seconds_left)
        lease = Lease(self._store, self._run_id, self._config.limits.lease_ttl_s, wait_s=wait_s, stop=self._stop)
        with ExitStack() as stack:
            with self._writer.phase("waiting"):
                stack.enter_context(lease)
            yield lease

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Interrupt the run where the store or this machine fails under way: started again, it continues.

        Before its first record is written, the error stays what it is: nothing was started. What the run still writes
        of its end then has one attempt, so that a full disk is waited for once only.

        Raises:
            InterruptedRunError: They failed.
        """
        try:
            yield
        except Exception as err:
            interruption = worker_errors.interruption_by(err)
            if interruption is not None or isinstance(err.__cause__, StorageError):
                self._store.stop_retrying()
            if interruption is not None and self._has_begun:
                raise interruption from err
            raise

    def _begin(self, lease: Lease) -> None:
        """Write run.json and the scan, now that this run is the only one that works on the output."""
        plan = self._plan
        done_before = len(plan.wanted) - plan.num_pending
        self._progress = Progress(
            self._config, self._run_id, total=done_before + plan.num_selected, done_before=done_before
        )
        self._controls = RunControls(
            self._config, self._progress, self._on_progress, self._stop, lease, self._budget, plan.num_failed
        )
        self._journal = Journal(self._store)
        self._compactor = Compactor(Journal(self._store), self._config.placement.batch_size)
        self._writer.set_plan(plan, self._run_id)
        self._writer.begin(self._store, self._progress)
        plan.record_locations()
        plan.save_scan()
        self._has_begun = True

    def _commit_rejections(self) -> None:
        """Commit a failed result for each request that the manifest's own values rule out."""
        plan = self._plan
        for rejected in plan.rejections_to_commit(self._run_id):
            self._journal.append(rejected)
        log.info(
            "run_planned run_id=%s requests=%d pending=%d selected=%d rejected=%d duplicates=%d",
            *(self._run_id, len(plan.wanted), plan.num_pending, plan.num_selected, plan.num_rejected),
            plan.num_duplicates,
        )

    def _generate(self) -> LimitReached | None:
        """Generate and commit the selected requests; return the limit that ended the run early, or None."""
        plan = self._plan
        limit = self._controls.limit_reached() if plan.num_pending else None
        if limit is not None or not plan.num_selected:
            return limit
        self._on_progress(self._progress)
        with self._writer.phase("generating"), ray_cluster.connect(self._config.placement):
            return self._consume_chain()

    def _consume_chain(self) -> LimitReached | None:
        tracker = start_attempt_tracker(self._config.limits.max_attempts, check_ray=check_processes)
        dataset = chain(self._plan, self._run_id, tracker, self._load_engines)
        outcomes = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        self._progress.enter("generating")
        observers: tuple[Callable[[Progress], None], ...] = (
            lambda progress: self._compactor.record_committed(progress.computed),
            self._writer.write_progress,
            Gauges().set,
        )
        controls = self._controls
        for observe in observers:
            controls = controls.with_observer(observe)
        try:
            return monitor.consume(outcomes, tracker, ray.cluster_resources, controls)
        finally:
            ray_cluster.end_execution(dataset)
            with suppress(ray.exceptions.RayError, InterruptedRunError):
                activity = tracker.activity()
                self._progress.update(activity)
                self._writer.set_engines(tracker.engine_summary(), activity.engine_seconds)

    def _publish(self, limit: LimitReached | None) -> RunSummary:
        """Publish the results if no request is left, and complete the run record."""
        plan, progress = self._plan, self._progress
        with self._writer.phase("publishing"):
            progress.enter("publishing")
            self._on_progress(progress)
            self._compactor.finish()
            outcomes = self._journal.outcomes().of(plan.wanted)
            left = 0
            if limit is not None:
                left = max(plan.num_pending - progress.computed, len(plan.wanted) - len(outcomes.keys))
            if not left:
                facts = {"manifest": self._writer.record.manifest, "models": _weights_of(self._config)}
                publish(self._journal, outcomes, plan.wanted, plan.carried, self._run_id, facts)
        progress.enter("stopped" if left else "finished")
        self._on_progress(progress)
        return self._writer.finish(outcomes, self._run_id, limit if left else None, left)

    def _write_report(self, summary: RunSummary) -> None:
        """Write the run's page. Everything is committed by now: a page that cannot be written must not fail the run."""
        write = report.write if summary.results_uri else report.write_so_far
        if not summary.results_uri and summary.requests - summary.left > report.MAX_RESULTS:
            return
        try:
            write(self._store, summary.run_id)
        except PiaBatchError as err:
            log.warning("report_failed run_id=%s: %s", summary.run_id, err)


def _weights_of(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the weights of each model by its name, for the dataset card; URIs without credentials."""
    keys = ("base", "revision", "motion_adapter")
    models = {name: model.model_dump(include=set(keys), exclude_none=True) for name, model in config.all_models.items()}
    return {name: {key: redacted_uri(model[key]) for key in keys if key in model} for name, model in models.items()}


def _run_id_of(config: RunConfig, store: Store) -> str:
    """Return the run id that the config asks for, or one made from the time.

    The first run of a date has the date's name; further runs, for rows that came late, get a number.

    Raises:
        ConfigError: The id cannot name a folder of results, or has complete results already.
    """
    run_id = config.run_id
    if run_id is None:
        return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        msg = (
            f"run_id: invalid value (got {run_id!r}, expected up to 128 letters, digits, '.', '_' and '-', the first a "
            "letter or a digit)"
        )
        raise ConfigError(msg)
    if config.run_date is not None:
        return next(name for name in run_ids_of(run_id) if not is_published(store, name))
    if is_published(store, run_id):
        msg = f"run_id: {run_id} has complete results already, and requests are pending now; choose another id"
        raise ConfigError(msg)
    return run_id
