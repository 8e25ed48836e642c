"""The run: one Ray Data chain from manifest to journal, and what stands around it.

    reading → Validate → DropFinished → Arrange → FetchImages → Animate (commits inside)

Ray makes one operator of neighbours that ask for the same resources: of the first three, for what the driver spends on
a batch grows with the operators. The others ask for different ones, or images would be fetched on the GPU's worker.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch import __version__, report
from pia_batch.config import RunConfig
from pia_batch.driver import notifications, ray_cluster
from pia_batch.driver.budget import Budget, Pulse, Stopped, not_chosen
from pia_batch.driver.monitor import Watch, draw
from pia_batch.driver.progress import Progress
from pia_batch.driver.run_record import Record, RunSummary
from pia_batch.errors import ConfigError, PiaBatchError
from pia_batch.journal import results
from pia_batch.journal.compaction import Compactor
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.pipeline import animate, datasource, stages, worker_errors
from pia_batch.pipeline import engine_loader as engines
from pia_batch.pipeline.attempts import Control
from pia_batch.pipeline.metrics import RayMeter
from pia_batch.planning import plan as planning
from pia_batch.planning.capacity import READ_CPUS
from pia_batch.planning.plan import Plan, Retry
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

VALIDATE_CPUS, RANK_CPUS, ARRANGE_CPUS = 0.5, 0.35, 0.3
"""They differ from READ_CPUS and from each other, see above."""

WINDOW, SMALL_WINDOW = 1024, 64
"""Requests that are put in order together; fewer where each brings its image along."""

IN_FLIGHT = 4
"""Tasks at or queued before one engine: two are worked on, two wait, so that the device never does."""

TASKS_PER_ENGINE = 256
"""A task has several batches where each engine has more tasks than these all the same, as the driver's time and memory
grow with the tasks. Engines that find none left while others end theirs lose less than a hundredth of the run."""

TASK_ROWS, TASK_BYTES = 64, 32 * 2**20
"""Requests in a task of several batches, and the bytes of their pixels, as far as the config's defaults tell."""

LoadEngines = Callable[[], engines.Engines]


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
    store.check()
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
    ledger = ray_cluster.start_ledger(plan.config.limits.max_attempts)
    chained = chain(plan, run_id, ledger, load_engines)
    outcomes = chained.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    watch.progress.enter("drawing")
    try:
        told = watch.also(record.show).also(RayMeter().show)
        return draw(outcomes, ledger, ray.cluster_resources, told)
    finally:
        ray_cluster.end_execution(chained)
        with suppress(ray.exceptions.RayError):
            work = ledger.work()
            watch.progress.hear(work)
            record.engines(ledger.engines(), work.seconds)


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


def chain(plan: Plan, run_id: str, control: Control, load_engines: LoadEngines | None = None) -> ray.data.Dataset:
    """The whole job as a lazy Dataset of `worker.OUTCOME` rows, one for each request that is left to do."""
    config = plan.config
    _own_the_settings()
    requests = (
        datasource.dataset(plan.manifest)
        .map_batches(stages.Validate(config, plan.engine_ids), **blocks(READ_CPUS))
        .map_batches(stages.DropFinished(plan.settled, plan.chosen), **blocks(READ_CPUS))
    )
    if len(plan.repeats):
        requests = requests.union(ray.data.from_arrow(plan.repeats))
    if config.budget.priority is not None:
        ranked = requests.map_batches(stages.Rank(config.budget.priority), **blocks(RANK_CPUS))
        requests = ranked.sort(stages.RANK, descending=True).drop_columns([stages.RANK])
    if plan.is_mixed:
        window = SMALL_WINDOW if "image_bytes" in plan.manifest.schema.names else WINDOW
        requests = requests.repartition(target_num_rows_per_block=window, strict=True).map_batches(
            stages.Arrange(config.images, plan.manifest.folder), **blocks(ARRANGE_CPUS)
        )
    drawn = {name: plan.engine_ids[name] for name in plan.models}
    loader = load_engines or engine_loader(config)
    stage = {"load_engines": loader, "engine_ids": drawn, "config": config, "run_id": run_id, "control": control}
    fetch = stages.FetchImages(config.images, plan.manifest.folder)
    return draw_in_pool(requests, config, fetch, Animate, stage, batches_per_task(config, plan.num_chosen))


def batches_per_task(config: RunConfig, num_requests: int) -> int:
    """How many batches an engine is given at a time: one, unless there are very many requests for each engine.

    With priorities it is always one, for what is in a task goes before all that comes after it.
    """
    place, defaults = config.placement, config.defaults
    if config.budget.priority is not None:
        return 1
    row_bytes = 3 * (defaults.width * defaults.height if defaults.size == "fixed" else defaults.long_side**2)
    rows = min(TASK_ROWS, TASK_BYTES // row_bytes, num_requests // (TASKS_PER_ENGINE * place.max_actors))
    return max(1, rows // place.batch_size)


def engine_loader(config: RunConfig) -> engines.EngineLoader:
    """What gives each worker the engines of the config's models."""
    device = "cuda" if config.placement.num_gpus else "cpu"
    return engines.EngineLoader(config.all_models, device, config.placement.max_models)


def draw_in_pool(
    requests: ray.data.Dataset,
    config: RunConfig,
    fetch: Callable[[pa.Table], pa.Table],
    stage: type[Animate],
    arguments: Mapping[str, Any],
    batches: int = 1,
) -> ray.data.Dataset:
    """Requests in batches, their images fetched, through a pool of actors as `placement` has it.

    Args:
        requests: as `stages.Validate` gives them.
        config: the run's config.
        fetch: gives a block of them its images, as `stages.FetchImages` does.
        stage: what each actor holds.
        arguments: of its constructor, by name.
        batches: how many of them an actor is given at a time.
    """
    place = config.placement
    task = together = place.batch_size * batches
    if config.budget.priority is None:  # what is fetched at once; with priorities no more, as tasks overtake each other
        together *= max(1, config.images.threads // task)
    return (
        requests.repartition(target_num_rows_per_block=together, strict=True)
        .map_batches(fetch, **blocks(place.fetch_num_cpus))
        .repartition(target_num_rows_per_block=task, strict=True)
        .map_batches(
            stage,
            fn_constructor_kwargs={**arguments, "version": __version__, "count": RayMeter().count},
            batch_size=place.batch_size,
            batch_format="pyarrow",
            num_gpus=place.num_gpus,
            num_cpus=place.num_cpus,
            memory=None if place.memory_mb is None else place.memory_mb * 2**20,
            compute=ray.data.ActorPoolStrategy(
                min_size=place.min_actors,
                max_size=place.max_actors,
                max_tasks_in_flight_per_actor=IN_FLIGHT,
                # One batch is encoded and committed while the next is on the device; Animate sees to the order.
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
        )
    )


class Animate(animate.Animate):
    """`worker.Animate` as Ray wants it: what goes wrong in its start comes as the error of a call, whole.

    From a constructor Ray would try it again, and then hand on its text only.
    """

    def __init__(self, version: str, **arguments: Any) -> None:
        self._mistake: Exception | None = None
        try:
            worker_errors.show_log()
            worker_errors.check_version(version)
            Pulse(arguments["control"], lambda: self.drawn_seconds)
            super().__init__(worker=ray.get_runtime_context().get_actor_id() or "", **arguments)
        except Exception as err:  # noqa: BLE001 - every library has its own classes for a device that it cannot use
            self._mistake = worker_errors.explain(err)

    def __call__(self, requests: pa.Table) -> pa.Table:
        """As `worker.Animate`, or the error that its constructor met."""
        if self._mistake is not None:
            raise self._mistake
        return super().__call__(requests)


def blocks(num_cpus: float) -> dict[str, Any]:
    """How `map_batches` gives a stage whole blocks as Arrow tables, in tasks that take so many CPUs."""
    return {"batch_format": "pyarrow", "batch_size": None, "num_cpus": num_cpus}


def _own_the_settings() -> None:
    """Ray Data's own defaults would lose rows, or start too little again."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0  # anything else reports lost blocks as success
    context.max_consecutive_actor_init_deaths = 1  # of actors that Ray cannot even make; the ledger counts the others
    context.execution_no_progress_timeout_s = -1  # _Watchman knows a run that waits from one that is stuck
    context.raise_original_map_exception = True  # or only the text of our own errors would reach the driver
    context.enable_progress_bars = False  # blocks of an operator; ours count requests
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is raised, and told once
