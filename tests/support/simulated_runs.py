"""Runs in the simulated world: drivers, their clusters and workers, around the real stages, commits and publication."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
from fakes import FakeClip, FakeEngine, FakeShelf
from simulation import FaultyStore, Mutex, Process, World

from pia_batch.config import RunConfig
from pia_batch.errors import InterruptedRunError, LeaseHeldError
from pia_batch.journal import layout
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.pipeline import stages
from pia_batch.pipeline.animate import Animate, WorkerProcess
from pia_batch.pipeline.attempts import AttemptTracker, ExitCause, SoloAttempt
from pia_batch.pipeline.request_rows import with_row_error
from pia_batch.planning.plan import Plan, Retry, find_published_run, make_plan
from pia_batch.schema.columns import Row

LEASE_S, GRACE_S = 60.0, 150.0
"""Seconds of the world; one of them is one step of one process."""


class Surroundings(Protocol):
    """Environment of a run: its config, the batches of a task, the store as each process sees it, and the suspected."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def world(self) -> World: ...

    @property
    def batches(self) -> int: ...

    @property
    def suspected(self) -> Counter[str]: ...

    def store(self, process: Process) -> FaultyStore: ...


class Engine(FakeEngine):
    """An engine that follows its prompts, and never generates the same pixels twice, as no two batches do on a GPU."""

    def __init__(self, engine_id: str, worker: Worker) -> None:
        super().__init__(engine_id=engine_id)
        self._worker = worker
        self.sick = False

    def check(self) -> None:
        if self.sick:
            raise RuntimeError("the device is gone")

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        world = self._worker.world
        for shot in shots:
            if "raises" in shot.prompt or self.sick:
                raise RuntimeError("poison")
            if "hungers" in shot.prompt:
                raise MemoryError
            if "kills" in shot.prompt:
                self._worker.die()
            if "hangs" in shot.prompt:
                self._worker.hang([shot.seed for shot in shots])
        world.tallies["generated"] += len(shots)
        clips = super().animate(shots)
        for clip in clips:
            if clip.error is None:
                clip.generated = clip.generated + (world.tallies["generated"] % 251)
        return clips


class Worker(Process):
    """A process that holds an engine and works on up to two tasks at a time, as with Ray."""

    def __init__(self, world: World, name: str, cluster: Cluster) -> None:
        super().__init__(world, name)
        self.cluster, self.tasks = cluster, list[pa.Table]()
        self.animator: Animate | None = None
        self.engine: Engine | None = None
        self.mishaps = [self.freeze, self.sicken, partial(cluster.give_up, self)]

    def sicken(self) -> None:
        if self.engine is not None:
            self.engine.sick = True

    def hang(self, seeds: list[int]) -> None:
        """Act as the watchdog does when the deadline of these requests is over."""
        rows = [row for task in self.tasks for row in task.select(["key", "seed"]).to_pylist()]
        self.animator.guard.watchdog.give_up([row["key"] for row in rows if row["seed"] in seeds], "timeout")

    def call(self, task: pa.Table) -> None:
        """Generate and commit a task, batch by batch, as Ray calls an actor."""
        self.pause()
        if self.animator is None:
            self.animator = self.cluster.animator(self)
        size = self.cluster.plan.config.placement.batch_size
        for start in range(0, len(task), size):
            self.animator(task.slice(start, size))
        self.pause()
        self.cluster.returned(self, task)


class Line:
    """`attempts.AttemptControl` from a worker to the tracker next to its driver."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def begin(self, keys: list[str]) -> list[int] | None:
        return self._tracker("begin").begin(keys)

    def begin_alone(self, key: str) -> SoloAttempt | None:
        return self._tracker("begin_alone").begin_alone(key)

    def start(self, worker: str) -> int:  # noqa: ARG002 - the signature of attempts.AttemptControl
        """Return 1: no worker of this world dies while it starts."""
        return 1

    def ready(self, worker: str, seconds: float) -> None:
        """Ignore the time: no test reads it."""

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        self._tracker("give_up").give_up(keys, cause)

    def end(self, outcomes: list[Row]) -> None:
        self._tracker("end").end(outcomes)

    def _tracker(self, verb: str) -> AttemptTracker:
        self._worker.pause(verb)
        if self._worker.cluster.tracker is None:
            raise ConnectionError("the tracker has gone with its driver")
        return self._worker.cluster.tracker


class Cluster:
    """The part of Ray: gives every task to one worker after the other until a call returns."""

    def __init__(self, driver: Driver, plan: Plan, tasks: list[pa.Table]) -> None:
        self.driver, self.plan = driver, plan
        self.tracker: AttemptTracker | None = None
        self.workers: list[Worker] = []
        self.error: Exception | None = None
        self.waiting = list(tasks)
        self.done: list[pa.Table] = []
        self._num_tasks = len(self.waiting)
        self._names = itertools.count()
        self.forget()

    def forget(self) -> None:
        """Replace the tracker, whose process died, by one that knows nothing."""
        self.tracker = AttemptTracker(self.plan.config.limits.max_attempts)

    def animator(self, worker: Worker) -> Animate:
        worker.engine = Engine(self.plan.engine_ids["default"], worker)
        store = self.driver.around.store(worker)
        return Animate(
            lambda: FakeShelf(worker.engine),
            self.plan.engine_ids,
            self.plan.config,
            self.driver.run_id,
            Line(worker),
            store,
            Journal(store),
            WorkerProcess(exit=worker.die, new_lock=lambda: Mutex(worker)),
        )

    def dispatch(self) -> None:
        """Give waiting tasks to free workers."""
        place = self.plan.config.placement
        while self.waiting and not self.error:
            free = [worker for worker in self.workers if len(worker.tasks) < 2]
            if not free and len(self.workers) >= place.max_engines:
                return
            worker = free[0] if free else self.hire()
            task = self.waiting.pop(0)
            worker.tasks.append(task)
            worker.world.start(worker, partial(self._watched_call, worker, task))

    def _watched_call(self, worker: Worker, task: pa.Table) -> None:
        try:
            worker.call(task)
        except Exception as err:
            if worker in self.workers:
                self.error = err
            raise

    def hire(self) -> Worker:
        worker = Worker(self.driver.world, f"{self.driver.name} worker {next(self._names)}", self)
        worker.when_dead = partial(self.give_up, worker)
        self.workers.append(worker)
        return worker

    def give_up(self, worker: Worker) -> None:
        """Take a worker for dead. If it is alive, it continues by itself: only the store still accepts its calls."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.waiting += worker.tasks
        self.driver.world.tallies["zombies"] += worker.alive
        for task in worker.tasks:
            keys = task["key"].to_pylist()
            self.driver.around.suspected.update(
                key for key in keys if self.tracker is None or key in self.tracker._begun
            )

    def returned(self, worker: Worker, task: pa.Table) -> None:
        if worker in self.workers:
            worker.tasks = [other for other in worker.tasks if other is not task]
            self.done.append(task)

    @property
    def is_finished(self) -> bool:
        return len(self.done) == self._num_tasks

    def again(self) -> None:
        """Make a call again whose result Ray lost."""
        if self.done:
            self.waiting.append(self.done.pop())

    def shut_down(self) -> None:
        """End the workers with the run; one whose node has lost its connection ends much later."""
        self.tracker = None
        for worker in list(self.workers):
            self.give_up(worker)
            if not (worker.tasks and worker.world.chooser.coin()):
                worker.world.kill(worker)


def tasks_of(plan: Plan, batches: int) -> Iterator[pa.Table]:
    """Yield the tasks of Animate, with that many batches each: the chain of `pipeline.chain` without Ray."""
    config, folder = plan.config, plan.manifest.folder
    validate = stages.Validate(config, plan.engine_ids, keep_rejected=False)
    requests = [stages.DropFinished(plan.skipped)(validate(batch.table)) for batch in plan.manifest.batches()]
    table = pa.concat_tables([*requests, with_row_error(plan.repeats)] if len(plan.repeats) else requests)
    if plan.is_mixed:
        table = stages.Arrange(config.images, folder)(table)
    if len(table):
        table = stages.FetchImages(config.images, folder)(table)
    size = config.placement.batch_size * batches
    for start in range(0, len(table), size):
        yield table.slice(start, size)


class Driver(Process):
    """`pipeline.run` over a simulated cluster: the same calls in the same order."""

    def __init__(
        self, around: Surroundings, name: str, run_id: str, *, leased: bool, retry_failed: bool = False
    ) -> None:
        super().__init__(around.world, name)
        self.around, self.run_id, self.leased, self.retry_failed = around, run_id, leased, retry_failed
        self.cluster: Cluster | None = None
        self.asked_to_stop = False
        self.idle = False
        self.compacts = False
        self.mishaps = [self.freeze, partial(self.freeze, 2 * LEASE_S), self.stop, self._lose_tracker, self._repeat]

    def stop(self) -> None:
        self.asked_to_stop = True

    def _lose_tracker(self) -> None:
        if self.cluster is not None and self.cluster.tracker is not None:
            self.cluster.forget()

    def _repeat(self) -> None:
        if self.cluster is not None:
            self.cluster.again()

    def work(self) -> None:
        self.pause()
        plan = make_plan(self.around.config, retry=Retry() if self.retry_failed else None)
        if not plan.num_pending and find_published_run(plan):
            self.idle = True
        else:
            self.carry_out(plan)

    def carry_out(self, plan: Plan) -> None:
        store = self.around.store(self)
        store.check(layout.CREATE_ONLY_PROBE)
        with ExitStack() as stack:
            lease = Lease(store, self.run_id, LEASE_S, clock=lambda: self.world.now, sleep=self.sleep)
            if self.leased:
                stack.enter_context(lease)
            record = Journal(store)
            store.replace(layout.run_record_name(self.run_id), b"{}\n")
            for rejected in plan.rejections_to_commit(self.run_id):
                record.append(rejected)
            if plan.num_pending:
                self._animate(plan, lease)
            if self.compacts:
                record.compact()
            outcomes = record.outcomes().of(plan.wanted)
            publish(record, outcomes, plan.wanted, plan.carried, self.run_id, {})

    def _animate(self, plan: Plan, lease: Lease) -> None:
        self.cluster = cluster = Cluster(self, plan, list(tasks_of(plan, self.around.batches)))
        renewed_at = self.world.now
        try:
            while not cluster.is_finished:
                self.pause("looks")
                if self.leased and self.world.now - renewed_at > LEASE_S / 3:
                    lease.renew()
                    renewed_at = self.world.now
                if self.asked_to_stop or lease.lost.is_set():
                    self._drain(cluster)
                    raise LeaseHeldError if lease.lost.is_set() else InterruptedRunError
                if cluster.error is not None:
                    raise cluster.error
                cluster.dispatch()
        finally:
            cluster.shut_down()

    def _drain(self, cluster: Cluster) -> None:
        until = self.world.now + GRACE_S
        cluster.tracker.stop()
        while cluster.tracker.in_flight() and self.world.now < until:
            self.pause("drains")
            cluster.dispatch()
        if cluster.tracker.in_flight() and not any(worker.tasks for worker in cluster.workers):
            self.world.bugs.append("a stopping run waited for requests that no worker has")
