"""The run: one Ray Data chain from manifest to journal, and what stands around it. The only module that knows Ray.

    read_parquet → Validate → DropFinished → repartition → FetchImages → Animate (commits inside)

Neighbours ask for different resources, or Ray would fuse them and fetch images on the GPU's worker.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pia_batch import journal, planning, stages
from pia_batch.config import PlacementConfig, RunConfig
from pia_batch.errors import ConfigError, InterruptedRunError, LeaseHeldError, PiaBatchError, StorageError
from pia_batch.journal import Journal
from pia_batch.lease import Lease
from pia_batch.manifest import Manifest
from pia_batch.planning import Plan
from pia_batch.records import SUCCEEDED
from pia_batch.storage import Store
from pia_batch.summary import Progress, RunSummary, about, summarise

log = logging.getLogger(__name__)

VALIDATE_CPUS, DROP_CPUS = 0.5, 0.4
"""Different from each other and from the reader's 1, see above."""

IN_FLIGHT = 4
"""Batches at or queued before one engine: two are worked on, two wait, so that the device never does."""

LoadEngine = Callable[[], stages.Engine]


def run(
    config: RunConfig,
    *,
    run_id: str | None = None,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
    load_engine: LoadEngine | None = None,
) -> RunSummary:
    """Do what is left to do of `config.manifest`, then publish its results. Where nothing is left, nothing is written.

    Args:
        config: what to do.
        run_id: names the results; None: made from the time.
        retry_failed: draw again what failed before.
        on_progress: called about twice a second.
        stop: set it to stop: batches in flight are committed, then InterruptedRunError is raised.
        load_engine: what gives each worker its engine; None: `PiaEngine.load` of the config's model.

    Raises:
        ConfigError: and ManifestError and StorageError, before Ray starts: the operator has to act.
        LeaseHeldError: another run works on this output.
        InterruptedRunError: `stop` was set, or the store went away; start again to resume.
        AccountingError: a request has no result although Ray has finished; start again.
    """
    started = time.monotonic()
    plan = planning.make(config, retry_failed=retry_failed)
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
            with _ray(config.placement):
                _animate(plan, run_id, progress, _Watch(on_progress, stop or threading.Event(), lease), load_engine)
            computed = progress.succeeded + progress.failed
        outcomes = record.outcomes().of(plan.wanted)
        journal.publish(record, outcomes, plan.wanted, plan.carried, run_id, {"manifest": told["manifest"]})
        summary = summarise(plan, outcomes, run_id, computed, started)
        store.replace(f"_runs/{run_id}/run.json", journal.to_json(told | {"summary": asdict(summary)}))
    return summary


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


def chain(plan: Plan, run_id: str, control: stages.Control, load_engine: LoadEngine | None = None) -> ray.data.Dataset:
    """The whole job as a lazy Dataset of `stages.OUTCOME` rows, one for each request that is left to do."""
    config, place = plan.config, plan.config.placement
    _own_the_settings()
    requests = (
        _read(plan.manifest)
        .map_batches(stages.Validate(config, plan.engine_id, plan.manifest.schema), **_blocks(VALIDATE_CPUS))
        .map_batches(stages.DropFinished(plan.settled), **_blocks(DROP_CPUS))
    )
    if len(plan.repeats):
        requests = requests.union(ray.data.from_arrow(plan.repeats))
    return (
        requests.repartition(target_num_rows_per_block=place.batch_size, strict=True)
        .map_batches(stages.FetchImages(config.images, plan.manifest.folder), **_blocks(place.fetch_num_cpus))
        .map_batches(
            Animate,
            fn_constructor_kwargs={
                "load_engine": load_engine or stages.EngineLoader(config.model, "cuda" if place.num_gpus else "cpu"),
                "engine_id": plan.engine_id,
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
            # The default, -1, would give a request that kills its worker to worker after worker for ever.
            max_restarts=place.max_restarts,
            max_task_retries=place.max_restarts,
        )
    )


class Animate(stages.Animate):
    """`stages.Animate` as Ray wants it: what an operator has to mend comes as the error of a call, whole.

    From a constructor Ray would try it three times more, and then hand on its text only.
    """

    def __init__(self, **arguments: Any) -> None:
        self._mistake: PiaBatchError | None = None
        try:
            super().__init__(**arguments)
        except PiaBatchError as err:
            self._mistake = err

    def __call__(self, requests: pa.Table) -> pa.Table:
        """As `stages.Animate`, or the error that its constructor met."""
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
    context.raise_original_map_exception = True  # or only the text of our own errors would reach the driver
    context.enable_progress_bars = False  # blocks of an operator; ours count requests
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is raised, and told once
    # The message of every run that `max_restarts` moves to a named argument in Ray 2.64; pyproject.toml ends below it.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated", category=RayDeprecationWarning)


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


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Ledger:
    """Which requests are being worked on, and how often each was begun. One for a run; state dies with it."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._stopping = False

    def begin(self, keys: list[str]) -> list[int] | None:
        if self._stopping:
            return None
        for key in keys:
            self._begun[key] = self._begun.get(key, 0) + 1
        return [self._begun[key] for key in keys]

    def end(self, keys: list[str]) -> None:
        for key in keys:
            self._begun.pop(key, None)

    def stop(self) -> None:
        self._stopping = True

    def in_flight(self) -> int:
        return len(self._begun)


class _RemoteControl:
    """`stages.Control` over the ledger."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def begin(self, keys: list[str]) -> list[int] | None:
        attempts: list[int] | None = ray.get(self._ledger.begin.remote(keys))
        return attempts

    def end(self, keys: list[str]) -> None:
        ray.get(self._ledger.end.remote(keys))


def _animate(plan: Plan, run_id: str, progress: Progress, watch: _Watch, load_engine: LoadEngine | None) -> None:
    """Run the chain to its end, or until `watch` says stop. Every outcome counted here is committed."""
    ledger = _Ledger.remote()  # type: ignore[attr-defined] # added by ray.remote
    dataset = chain(plan, run_id, _RemoteControl(ledger), load_engine)
    blocks: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    enough = threading.Event()
    threading.Thread(target=_consume, args=(dataset, blocks, enough), name="outcomes", daemon=True).start()
    watch.on_progress(progress)
    try:
        while not watch.must_stop:
            try:
                block = blocks.get(timeout=0.5)
            except queue.Empty:
                block = stages.OUTCOME.empty_table()
            if block is None:
                return
            if isinstance(block, BaseException):
                raise _for_the_operator(block)
            _count(progress, block)
            watch.on_progress(progress)
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


def _drain(ledger: Any, grace_s: float) -> None:
    """Let no batch begin, and wait for those in flight to be committed."""
    ray.get(ledger.stop.remote())
    deadline = time.monotonic() + grace_s
    while (left := ray.get(ledger.in_flight.remote())) and time.monotonic() < deadline:
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


@contextmanager
def _ray(place: PlacementConfig) -> Iterator[None]:
    """A connection to Ray: the one that exists, else the cluster's, else a Ray of our own that ends with the run."""
    if ray.is_initialized():
        yield
        return
    address = place.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what it will do one day
        # What its workers print is in Ray's session folder; what a request failed of is in its result.
        options |= {"include_dashboard": False, "log_to_driver": False, "num_cpus": max(2, os.cpu_count() or 2)}
        if place.object_store_mb is not None:
            options["object_store_memory"] = place.object_store_mb * 2**20
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as err:
        msg = f"cannot reach Ray at {address}: {err}; see placement.ray_address and RAY_ADDRESS"
        raise ConfigError(msg) from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's own would end the process with nothing committed
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if address == "local" and gpus < place.num_gpus:
            msg = f"placement.num_gpus is {place.num_gpus:g} and this machine has {gpus:g}; 0 runs on the CPU"
            raise ConfigError(msg)
        yield
    finally:
        ray.shutdown()
