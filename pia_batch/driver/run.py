"""A run: what stands around the chain, from the lease to the page of its results."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray

from pia_batch import report
from pia_batch.config import RunConfig
from pia_batch.driver import notifications, ray_cluster
from pia_batch.driver.budget import Budget, Stopped, not_chosen
from pia_batch.driver.monitor import Watch, draw
from pia_batch.driver.progress import Gauges, Progress
from pia_batch.driver.run_record import Record, RunSummary
from pia_batch.errors import ConfigError, PiaBatchError
from pia_batch.journal import layout, results
from pia_batch.journal.compaction import Compactor
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.pipeline.attempts_actor import start_attempt_tracker
from pia_batch.pipeline.chain import chain
from pia_batch.pipeline.engine_loader import LoadEngines
from pia_batch.planning import plan as planning
from pia_batch.planning.plan import Plan, Retry
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    *,
    retry: Retry | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_end: Callable[[dict[str, Any]], None] = lambda _: None,
    stop: threading.Event | None = None,
    load_engines: LoadEngines | None = None,
) -> RunSummary:
    """Do what is left to do of `config.manifest`, then publish its results. Where nothing is left, nothing is written.

    Args:
        config: what to do; its templates are filled in here.
        retry: what to draw again of what failed before; None: nothing.
        on_progress: called about twice a second.
        on_end: called once, also where the run ends by an error, with what run.json then says, without the config.
        stop: set it to stop: batches in flight are committed, then InterruptedRunError is raised.
        load_engines: what gives each worker its engines; None: those of the config's models.

    Raises:
        ConfigError: and ManifestError and StorageError, before Ray starts: the operator has to act.
        LeaseHeldError: another run works on this output.
        InterruptedRunError: `stop` was set, or the store went away; start again to resume.
        AccountingError: a request has no result although Ray has finished; start again.
    """
    record = Record(config)
    try:
        filled = config.filled()
        record = Record(filled)
        tools = _Tools(on_progress, stop or threading.Event(), load_engines)
        summary = _run(filled, record, retry, tools)
    except Exception as err:
        record.fail(err)
        _tell(config, record, on_end)
        raise
    _tell(config, record, on_end)
    return summary


@dataclass(frozen=True)
class _Tools:
    """What the caller of a run gives besides its config."""

    on_progress: Callable[[Progress], None]
    stop: threading.Event
    load_engines: LoadEngines | None


def _tell(config: RunConfig, record: Record, on_end: Callable[[dict[str, Any]], None]) -> None:
    on_end(record.told)
    notifications.tell(config.on_finish, record.told)


def _run(config: RunConfig, record: Record, retry: Retry | None, tools: _Tools) -> RunSummary:
    budget, store = Budget(config), Store(config.output)
    plan, newest = _planned(config, record, retry)
    if newest is not None:
        return record.finish(plan.outcomes, newest)
    run_id = _name_of(config, store)
    store.check(layout.CREATE_ONLY_PROBE)
    patience = min(config.limits.lease_wait_s, budget.seconds_left)
    lease = Lease(store, run_id, config.limits.lease_ttl_s, wait_s=patience, stop=tools.stop)
    with ExitStack() as held:
        with record.phase("waiting"):
            held.enter_context(lease)
        if lease.has_waited:  # and what it waited for may have done all of it
            plan, newest = _planned(config, record, retry)
            if newest is not None:
                return record.finish(plan.outcomes, newest)
            run_id = _name_of(config, store)
        before = len(plan.wanted) - plan.num_pending
        progress = Progress(config, run_id, total=before + plan.num_chosen, done_before=before)
        watch = Watch(config, progress, tools.on_progress, tools.stop, lease, budget, plan.num_failed)
        summary = _work(plan, run_id, record, watch, tools.load_engines)
    _report(store, summary)
    return summary


def _planned(config: RunConfig, record: Record, retry: Retry | None) -> tuple[Plan, str | None]:
    """The plan, and the run that has published all of it already, if there is one."""
    with record.phase("planning"):
        plan = planning.make(config, retry=retry)
        record.planned(plan)
        return plan, None if plan.num_pending else plan.published


def _work(plan: Plan, run_id: str, record: Record, watch: Watch, load_engines: LoadEngines | None) -> RunSummary:
    """What a run does while it holds the lease: commit, draw, commit, and publish if nothing is left."""
    store, progress = Store(plan.config.output), watch.progress
    commits = Journal(store)
    record.planned(plan, run_id)
    record.begin(store, progress)
    plan.save_scan()
    for rejected in plan.rejections_to_commit(run_id):
        commits.append(rejected)
    log.info(
        "planned run_id=%s requests=%d pending=%d chosen=%d rejected=%d duplicates=%d",
        *(run_id, len(plan.wanted), plan.num_pending, plan.num_chosen, plan.num_rejected, plan.num_duplicates),
    )
    compactor = Compactor(Journal(store), plan.config.placement.batch_size)
    stopped = watch.spent() if plan.num_pending else None
    if plan.num_chosen and stopped is None:
        watch.on_progress(progress)
        with record.phase("drawing"), ray_cluster.connect(plan.config.placement):
            stopped = _draw(
                plan, run_id, record, watch.also(lambda progress: compactor.see(progress.computed)), load_engines
            )
    stopped = stopped or not_chosen(plan)
    with record.phase("publishing"):
        progress.enter("publishing")
        watch.on_progress(progress)
        compactor.finish()
        outcomes = commits.outcomes().of(plan.wanted)
        left = max(plan.num_pending - progress.computed, len(plan.wanted) - len(outcomes.keys)) if stopped else 0
        if not left:
            about = {"manifest": record.told["manifest"]}
            results.publish(commits, outcomes, plan.wanted, plan.carried, run_id, about)
    progress.enter("stopped" if left else "finished")
    watch.on_progress(progress)
    return record.finish(outcomes, run_id, stopped if left else None, left)


def _draw(plan: Plan, run_id: str, record: Record, watch: Watch, load_engines: LoadEngines | None) -> Stopped | None:
    """Run the chain; the limit that ended it, if one did."""
    tracker = start_attempt_tracker(plan.config.limits.max_attempts)
    chained = chain(plan, run_id, tracker, load_engines)
    outcomes = chained.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    watch.progress.enter("drawing")
    try:
        told = watch.also(record.show).also(Gauges().show)
        return draw(outcomes, tracker, ray.cluster_resources, told)
    finally:
        ray_cluster.end_execution(chained)
        with suppress(ray.exceptions.RayError):
            activity = tracker.activity()
            watch.progress.hear(activity)
            record.engines(tracker.engine_summary(), activity.engine_seconds)


def _report(store: Store, summary: RunSummary) -> None:
    """Write the run's page. Everything is committed: that there is no page of it must not fail the run."""
    write = report.write if summary.results_uri else report.write_so_far
    if not summary.results_uri and summary.requests - summary.left > report.MAX_RESULTS:
        return
    try:
        write(store, summary.run_id)
    except PiaBatchError as err:
        log.warning("no_report run_id=%s: %s", summary.run_id, err)


def _name_of(config: RunConfig, store: Store) -> str:
    """A run id made from the time, or the one that was asked for if it can name a folder of results.

    The first run of a date has the date's name; what late rows ask for later gets a number.
    """
    run_id = config.run_id
    if run_id is None:
        return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        msg = f"run_id {run_id!r}: up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise ConfigError(msg)
    if config.run_date is not None:
        return next(name for name in planning.names_of(run_id) if not results.is_published(store, name))
    if results.is_published(store, run_id):
        msg = f"run_id {run_id} has complete results already, and there is more to do now; choose another"
        raise ConfigError(msg)
    return run_id
