"""The run: one Ray Data chain from manifest to journal, and what stands around it.

    read_parquet → Validate → DropFinished → Arrange → FetchImages → Animate (commits inside)

Neighbours ask for different resources, or Ray would fuse them and fetch images on the GPU's worker.
"""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pia_batch import animate, cluster, journal, planning, report, stages
from pia_batch.animate import OUTCOME
from pia_batch.cluster import RemoteControl
from pia_batch.config import RunConfig
from pia_batch.errors import (
    ConfigError,
    DeviceMemoryError,
    EngineError,
    InterruptedRunError,
    LeaseHeldError,
    PiaBatchError,
    RequestTimeoutError,
    StorageError,
    WorkerCrashError,
)
from pia_batch.journal import Journal
from pia_batch.lease import Lease
from pia_batch.manifest import Manifest
from pia_batch.planning import Plan, Retry
from pia_batch.records import SUCCEEDED
from pia_batch.storage import Store
from pia_batch.summary import Progress, RunSummary, about, summarise

log = logging.getLogger(__name__)

VALIDATE_CPUS, DROP_CPUS, ARRANGE_CPUS = 0.5, 0.4, 0.3
"""Different from each other and from the reader's 1, see above."""

WINDOW, SMALL_WINDOW = 1024, 64
"""Requests that are put in order together; fewer where each brings its image along."""

_WORKERS_FAULTS = frozenset(
    error.kind for error in (WorkerCrashError, RequestTimeoutError, EngineError, DeviceMemoryError)
)
"""Of requests that failed for their worker's sake: where all do, it is not the requests."""

_TELL_S = 30.0
"""Seconds without an outcome after which a run looks whether it has engines at all."""

IN_FLIGHT = 4
"""Batches at or queued before one engine: two are worked on, two wait, so that the device never does."""

LoadEngines = Callable[[], animate.Engines]


def run(
    config: RunConfig,
    *,
    run_id: str | None = None,
    retry: Retry | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
    load_engines: LoadEngines | None = None,
) -> RunSummary:
    """Do what is left to do of `config.manifest`, then publish its results. Where nothing is left, nothing is written.

    Args:
        config: what to do.
        run_id: names the results; None: made from the time.
        retry: what to draw again of what failed before; None: nothing.
        on_progress: called about twice a second.
        stop: set it to stop: batches in flight are committed, then InterruptedRunError is raised.
        load_engines: what gives each worker its engines; None: those of the config's models.

    Raises:
        ConfigError: and ManifestError and StorageError, before Ray starts: the operator has to act.
        LeaseHeldError: another run works on this output.
        InterruptedRunError: `stop` was set, or the store went away; start again to resume.
        AccountingError: a request has no result although Ray has finished; start again.
    """
    started = time.monotonic()
    plan = planning.make(config, retry=retry)
    store = Store(config.output)
    if not plan.num_pending and plan.published:
        newest = journal.latest(store) or {}
        return summarise(plan, plan.outcomes, str(newest.get("run_id")), computed=0, started=started)
    run_id = _name_of(run_id, store)
    store.check()
    with Lease(store, run_id, config.limits.lease_ttl_s) as lease:
        record = Journal(store)
        told = about(plan, run_id)
        store.replace(f"_runs/{run_id}/run.json", journal.to_json(told))
        for rejected in plan.rejections_to_commit(run_id):
            record.append(rejected)
        computed = 0
        log.info(
            "planned run_id=%s requests=%d pending=%d rejected=%d duplicates=%d",
            *(run_id, len(plan.wanted), plan.num_pending, plan.num_rejected, plan.num_duplicates),
        )
        if plan.num_pending:
            progress = Progress(total=len(plan.wanted), done_before=len(plan.wanted) - plan.num_pending)
            with cluster.connect(config.placement):
                _animate(plan, run_id, progress, _Watch(on_progress, stop or threading.Event(), lease), load_engines)
            computed = progress.succeeded + progress.failed
        outcomes = record.outcomes().of(plan.wanted)
        journal.publish(record, outcomes, plan.wanted, plan.carried, run_id, {"manifest": told["manifest"]})
        summary = summarise(plan, outcomes, run_id, computed, started)
        store.replace(f"_runs/{run_id}/run.json", journal.to_json(told | {"summary": asdict(summary)}))
    _report(store, run_id)
    return summary


def _report(store: Store, run_id: str) -> None:
    """Write the run's page. The results are published: that there is no page of them must not fail the run."""
    try:
        report.write(store, run_id)
    except PiaBatchError as err:
        log.warning("no_report run_id=%s: %s", run_id, err)


def _name_of(run_id: str | None, store: Store) -> str:
    """A run id made from the time, or the one that was asked for if it can name a folder of results."""
    if run_id is None:
        return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        msg = f"--run-id {run_id!r}: up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise ConfigError(msg)
    if journal.is_published(store, run_id):
        msg = f"--run-id {run_id} has complete results already, and there is more to do now; choose another"
        raise ConfigError(msg)
    return run_id


def chain(
    plan: Plan, run_id: str, control: animate.Control, load_engines: LoadEngines | None = None
) -> ray.data.Dataset:
    """The whole job as a lazy Dataset of `animate.OUTCOME` rows, one for each request that is left to do."""
    config, place = plan.config, plan.config.placement
    _own_the_settings()
    requests = (
        _read(plan.manifest)
        .map_batches(stages.Validate(config, plan.engine_ids, plan.manifest.schema), **_blocks(VALIDATE_CPUS))
        .map_batches(stages.DropFinished(plan.settled), **_blocks(DROP_CPUS))
    )
    if len(plan.repeats):
        requests = requests.union(ray.data.from_arrow(plan.repeats))
    if plan.is_mixed:
        window = SMALL_WINDOW if "image_bytes" in plan.manifest.schema.names else WINDOW
        requests = requests.repartition(target_num_rows_per_block=window, strict=True).map_batches(
            stages.Arrange(config.images, plan.manifest.folder), **_blocks(ARRANGE_CPUS)
        )
    drawn = {name: plan.engine_ids[name] for name in plan.models}
    device = "cuda" if place.num_gpus else "cpu"
    return (
        requests.repartition(target_num_rows_per_block=place.batch_size, strict=True)
        .map_batches(stages.FetchImages(config.images, plan.manifest.folder), **_blocks(place.fetch_num_cpus))
        .map_batches(
            Animate,
            fn_constructor_kwargs={
                "load_engines": load_engines or animate.EngineLoader(config.all_models, device, place.max_models),
                "engine_ids": drawn,
                "config": config,
                "run_id": run_id,
                "control": control,
            },
            batch_size=place.batch_size,
            batch_format="pyarrow",
            num_gpus=place.num_gpus,
            num_cpus=place.num_cpus,
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
    """`animate.Animate` as Ray wants it: what an operator has to mend comes as the error of a call, whole.

    From a constructor Ray would try it three times more, and then hand on its text only.
    """

    def __init__(self, **arguments: Any) -> None:
        self._mistake: PiaBatchError | None = None
        try:
            super().__init__(**arguments)
        except PiaBatchError as err:
            self._mistake = err

    def __call__(self, requests: pa.Table) -> pa.Table:
        """As `animate.Animate`, or the error that its constructor met."""
        if self._mistake is not None:
            raise self._mistake
        return super().__call__(requests)


def _read(manifest: Manifest) -> ray.data.Dataset:
    if manifest.format == "parquet":
        return ray.data.read_parquet(list(manifest.files), filesystem=manifest.filesystem, file_extensions=None)
    return ray.data.from_arrow([batch.table for batch in manifest.batches()])


def _blocks(num_cpus: float) -> dict[str, Any]:
    return {"batch_format": "pyarrow", "batch_size": None, "num_cpus": num_cpus}


def _own_the_settings() -> None:
    """Ray Data's own defaults would lose rows, or start too little again."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0  # anything else reports lost blocks as success
    context.actor_init_retry_on_errors = True
    context.max_consecutive_actor_init_deaths = 5  # the default, 0, ends the run at one bad node
    context.execution_no_progress_timeout_s = -1  # _Watchman knows a run that waits from one that is stuck
    context.raise_original_map_exception = True  # or only the text of our own errors would reach the driver
    context.enable_progress_bars = False  # blocks of an operator; ours count requests
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is raised, and told once


# --- around the chain -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watch:
    """Who is told of a running chain, and who may stop it."""

    on_progress: Callable[[Progress], None]
    stop: threading.Event
    lease: Lease

    @property
    def must_stop(self) -> bool:
        return self.stop.is_set() or self.lease.lost.is_set()


class _Watchman:
    """Ends a run whose workers fail request after request, or that is given no worker at all."""

    def __init__(self, config: RunConfig, in_flight: Callable[[], int]) -> None:
        self._place, self._max_crashes, self._in_flight = config.placement, config.limits.max_crashes, in_flight
        self._crashes = 0
        self._moved_at = self._told_at = time.monotonic()

    def see(self, outcomes: pa.Table) -> None:
        """Look at the outcomes since the last call, none of them included.

        Raises:
            InterruptedRunError: enough requests in a row failed for their worker's sake, or the run waited enough.
        """
        for row in outcomes.select(["error_kind", "error"]).to_pylist():
            self._crashes = self._crashes + 1 if row["error_kind"] in _WORKERS_FAULTS else 0
            if self._crashes >= self._max_crashes:
                msg = (
                    f"{self._crashes} requests in a row failed for their worker's sake (limits.max_crashes), the last "
                    f"one because {row['error']}; look at the workers' logs and devices. What was finished is "
                    "committed. Start again to go on, with --retry-failed to try these again"
                )
                raise InterruptedRunError(msg)
        now = time.monotonic()
        if len(outcomes):
            self._moved_at = self._told_at = now
        if now - self._told_at < min(_TELL_S, self._place.wait_s):
            return
        self._told_at = now
        if self._in_flight():
            self._moved_at = now
            return
        waited = now - self._moved_at
        have = ray.cluster_resources()
        state = (
            f"one engine needs {self._place.num_gpus:g} GPUs and {self._place.num_cpus:g} CPUs, and the cluster has "
            f"{have.get('GPU', 0):g} and {have.get('CPU', 0):g}"
        )
        log.warning("waiting_for_engines seconds=%.0f: %s", waited, state)
        if waited > self._place.wait_s:
            msg = f"no engine could work for {waited:.0f} s (placement.wait_s): {state}. Start again to go on"
            raise InterruptedRunError(msg)


def _animate(plan: Plan, run_id: str, progress: Progress, watch: _Watch, load_engines: LoadEngines | None) -> None:
    """Run the chain to its end, or until `watch` says stop. Every outcome counted here is committed."""
    ledger = cluster.start_ledger(plan.config.limits.max_attempts)
    watchman = _Watchman(plan.config, ledger.in_flight)
    dataset = chain(plan, run_id, ledger, load_engines)
    blocks: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    enough = threading.Event()
    threading.Thread(target=_consume, args=(dataset, blocks, enough), name="outcomes", daemon=True).start()
    watch.on_progress(progress)
    try:
        while not watch.must_stop:
            try:
                block = blocks.get(timeout=0.5)
            except queue.Empty:
                block = OUTCOME.empty_table()
            if block is None:
                return
            if isinstance(block, BaseException):
                raise _for_the_operator(block)
            _count(progress, block)
            watch.on_progress(progress)
            watchman.see(block)
        _drain(ledger, plan.config.limits.stop_grace_s)
    finally:
        enough.set()
    if watch.lease.lost.is_set():
        msg = f"another run has taken over {plan.config.output}"
        raise LeaseHeldError(msg)
    msg = "stopped; what was finished is committed. Start again to resume"
    raise InterruptedRunError(msg)


def _consume(
    dataset: ray.data.Dataset, blocks: queue.Queue[pa.Table | BaseException | None], enough: threading.Event
) -> None:
    """Pull outcomes until there are none, or until they are `enough`: leaving earlier would end the engines at once."""
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            blocks.put(block)
            if enough.is_set():
                return
        blocks.put(None)
    except BaseException as err:  # noqa: BLE001 - handed to the thread that runs the run
        blocks.put(err)


def _count(progress: Progress, outcomes: pa.Table) -> None:
    succeeded = pc.sum(pc.equal(outcomes["status"], SUCCEEDED)).as_py() or 0
    progress.succeeded += succeeded
    progress.failed += len(outcomes) - succeeded


def _drain(ledger: RemoteControl, grace_s: float) -> None:
    """Let no batch begin, and wait for those in flight to be committed."""
    ledger.stop()
    deadline = time.monotonic() + grace_s
    while (left := ledger.in_flight()) and time.monotonic() < deadline:
        log.info("stopping requests_in_flight=%d", left)
        time.sleep(0.3)


def _for_the_operator(err: BaseException) -> BaseException:
    """What a worker raised, out of the wrappers that Ray puts around it."""
    inner: BaseException | None = err
    while inner is not None:
        if isinstance(inner, StorageError):
            return InterruptedRunError(f"{inner}; what was finished is committed. Start again to resume")
        if isinstance(inner, PiaBatchError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return err
