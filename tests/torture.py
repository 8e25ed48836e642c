"""Random histories of whole runs: workers and drivers die, freeze and come back, the store fails, requests are poison.

A history is the real plan, stages, commit, journal, lease and publication over a simulated cluster and store, started
again until nothing is left to do; then `witness` looks at what lies there. `make torture RUNS=1000 SEED=1` runs this.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import witness
from conftest import png
from fakes import FakeClip, FakeEngine, FakeShelf
from simulation import FaultyStore, Luck, Mutex, Process, Task, World

from pia_batch import garbage, planning, publication, quality, stages, verification
from pia_batch.config import RunConfig
from pia_batch.errors import InterruptedRunError, LeaseHeldError, NonFiniteError
from pia_batch.journal import Journal
from pia_batch.lease import Lease
from pia_batch.ledger import Cause, Ledger, Turn
from pia_batch.planning import Plan
from pia_batch.records import Row
from pia_batch.storage import Store
from pia_batch.worker import Animate

NUM_CASES = 12
MOST_STARTS = 60
"""More than the mishaps of a history can ask for."""

POISON = {
    "raises": "engine_error",
    "hungers": "out_of_memory",
    "kills": "worker_crash",
    "hangs": "timeout",
    "not finite": NonFiniteError.kind,
}
"""What a prompt does to its engine, and the `error_kind` that it comes to."""

LEASE_S, GRACE_S = 60.0, 150.0
"""In the world's seconds, one of which is one step of one process."""


# --- what is asked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A manifest, and what must become of it, known without the code under test."""

    config: RunConfig
    due: Counter[tuple[str, str, str | None]]
    """How many results there must be of each request id, status and error kind."""

    @classmethod
    @functools.cache
    def make(cls, number: int, folder: Path) -> Case:
        """The same for the same number: 2 to 7 rows of 16 x 16 pixels and 2 or 3 frames, some of them bad."""
        random = Random(number)
        rows, due = [], Counter[tuple[str, str, str | None]]()
        mixed = random.random() < 0.3
        for index in range(random.randint(2, 7)):
            fate = random.choices(("good", "poison", "no image", "bad seed"), (12, 3, 1, 1))[0]
            poison = random.choice(list(POISON)) if fate == "poison" else None
            row = {
                "request_id": f"r{index}",
                "image": "absent.png" if fate == "no image" else f"{index % 2}.png",
                "prompt": poison or "a red circle",
                "seed": -1 if fate == "bad seed" else index,
                "num_frames": random.choice((2, 3)) if mixed else 2,
                "format": random.choice(("png_zip", "png_zip", "png_zip", "gif")),
            }
            kind = {"no image": "image_unavailable", "bad seed": "out_of_range"}.get(fate, POISON.get(poison or ""))
            rows.append(row)
            match random.choices(("once", "twice", "contradicted"), (12, 2, 1))[0] if fate != "bad seed" else "once":
                case "twice":
                    rows.append(row)
                case "contradicted":
                    rows.append(row | {"prompt": "a blue square"})
                    due[row["request_id"], "failed", "duplicate_id"] = 2
                    continue
            due[row["request_id"], "failed" if kind else "succeeded", kind] = 1
        manifest = folder / f"case-{number}"
        manifest.mkdir(exist_ok=True)
        for index in range(2):
            (manifest / f"{index}.png").write_bytes(png(index, 16, 16))
        pq.write_table(pa.Table.from_pylist(rows), manifest / "requests.parquet")
        settings = {
            "manifest": str(manifest),
            "output": str(folder / "nowhere"),
            "defaults.width": 16,
            "defaults.height": 16,
            "images.threads": 1,
            "placement.batch_size": random.randint(1, 4),
            "placement.max_actors": random.randint(1, 3),
            "limits.max_attempts": random.randint(2, 3),
        }
        return cls(RunConfig.load(None, settings), due)


# --- a cluster ------------------------------------------------------------------------------------------------------


class Engine(FakeEngine):
    """Does what a prompt says, and draws no request twice with the same pixels, as no two batches do on a GPU."""

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
        world.tallies["drawn"] += len(shots)
        clips = super().animate(shots)
        for clip in clips:
            if clip.error is None:
                clip.drawn = clip.drawn + (world.tallies["drawn"] % 251)
        return clips


class Worker(Process):
    """Holds an engine, and draws up to two batches at a time, as Ray has it."""

    def __init__(self, world: World, name: str, cluster: Cluster) -> None:
        super().__init__(world, name)
        self.cluster, self.batches = cluster, list[pa.Table]()
        self.animator: Animate | None = None
        self.engine: Engine | None = None
        self.mishaps = [self.freeze, self.sicken, partial(cluster.give_up, self)]

    def sicken(self) -> None:
        if self.engine is not None:
            self.engine.sick = True

    def hang(self, seeds: list[int]) -> None:
        """Do as the watchdog does when the deadline of these requests is over."""
        rows = [row for batch in self.batches for row in batch.select(["key", "seed"]).to_pylist()]
        self.animator._watchdog.give_up([row["key"] for row in rows if row["seed"] in seeds], "timeout")

    def call(self, batch: pa.Table) -> None:
        """Draw and commit a batch, as Ray calls an actor."""
        self.pause()
        if self.animator is None:
            self.animator = self.cluster.animator(self)
        self.animator(batch)
        self.pause()
        self.cluster.returned(self, batch)


class Line:
    """`ledger.Control` from a worker to the ledger beside its driver."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def begin(self, keys: list[str]) -> list[int] | None:
        return self._ledger("begin").begin(keys)

    def begin_alone(self, key: str) -> Turn | None:
        return self._ledger("begin_alone").begin_alone(key)

    def start(self, worker: str) -> int:  # noqa: ARG002 - as ledger.Control has it
        """No worker of this world dies while it starts."""
        return 1

    def ready(self, worker: str, seconds: float) -> None:
        """Nobody here asks how long that took."""

    def give_up(self, keys: list[str], cause: Cause) -> None:
        self._ledger("give_up").give_up(keys, cause)

    def end(self, outcomes: list[Row]) -> None:
        self._ledger("end").end(outcomes)

    def _ledger(self, verb: str) -> Ledger:
        self._worker.pause(verb)
        if self._worker.cluster.ledger is None:
            raise ConnectionError("the ledger has gone with its driver")
        return self._worker.cluster.ledger


class Cluster:
    """What Ray does for a driver: gives every batch to one worker after the other until a call returns."""

    def __init__(self, driver: Driver, plan: Plan, batches: list[pa.Table]) -> None:
        self.driver, self.plan = driver, plan
        self.ledger: Ledger | None = None
        self.workers: list[Worker] = []
        self.error: Exception | None = None
        self.waiting = list(batches)
        self.done: list[pa.Table] = []
        self._num_batches = len(self.waiting)
        self._names = itertools.count()
        self.forget()

    def forget(self) -> None:
        """The ledger's process died; another one takes its place and knows nothing."""
        self.ledger = Ledger(self.plan.config.limits.max_attempts)

    def animator(self, worker: Worker) -> Animate:
        worker.engine = Engine(self.plan.engine_ids["default"], worker)
        animator = Animate(
            lambda: FakeShelf(worker.engine),
            self.plan.engine_ids,
            self.plan.config,
            self.driver.run_id,
            Line(worker),
            die=worker.die,
        )
        animator._store = self.driver.torture.store(worker)
        animator._journal = Journal(animator._store)
        animator._device, animator._encoder = Mutex(worker), Mutex(worker)
        return animator

    def dispatch(self) -> None:
        """Give waiting batches to workers that have time for them."""
        place = self.plan.config.placement
        while self.waiting and not self.error:
            free = [worker for worker in self.workers if len(worker.batches) < 2]
            if not free and len(self.workers) >= place.max_actors:
                return
            worker = free[0] if free else self.hire()
            batch = self.waiting.pop(0)
            worker.batches.append(batch)
            worker.world.start(worker, partial(self._watched_call, worker, batch))

    def _watched_call(self, worker: Worker, batch: pa.Table) -> None:
        try:
            worker.call(batch)
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
        """Take a worker for dead. If it is not, it goes on by itself: nobody listens to it, but the store."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.waiting += worker.batches
        self.driver.world.tallies["zombies"] += worker.alive
        for batch in worker.batches:
            self.driver.torture.suspected.update(batch["key"].to_pylist())

    def returned(self, worker: Worker, batch: pa.Table) -> None:
        if worker in self.workers:
            worker.batches = [other for other in worker.batches if other is not batch]
            self.done.append(batch)

    @property
    def is_finished(self) -> bool:
        return len(self.done) == self._num_batches

    def again(self) -> None:
        """Ray lost what a call returned, and makes the call again."""
        if self.done:
            self.waiting.append(self.done.pop())

    def shut_down(self) -> None:
        """The run has ended, and its workers with it; one whose node has lost touch only hears of it much later."""
        self.ledger = None
        for worker in list(self.workers):
            self.give_up(worker)
            if not (worker.batches and worker.world.chooser.coin()):
                worker.world.kill(worker)


def batches_of(plan: Plan) -> Iterator[pa.Table]:
    """What Animate is given: the chain of `pipeline.chain` without Ray."""
    config, folder = plan.config, plan.manifest.folder
    validate = stages.Validate(config, plan.engine_ids)
    requests = [stages.DropFinished(plan.settled)(validate(batch.table)) for batch in plan.manifest.batches()]
    table = pa.concat_tables([*requests, plan.repeats] if len(plan.repeats) else requests)
    if plan.is_mixed:
        table = stages.Arrange(config.images, folder)(table)
    if len(table):
        table = stages.FetchImages(config.images, folder)(table)
    for start in range(0, len(table), config.placement.batch_size):
        yield table.slice(start, config.placement.batch_size)


# --- a driver -------------------------------------------------------------------------------------------------------


class Driver(Process):
    """`pipeline.run` over a simulated cluster: the same calls in the same order."""

    def __init__(self, torture: Torture, name: str, run_id: str, *, leased: bool, retry_failed: bool = False) -> None:
        super().__init__(torture.world, name)
        self.torture, self.run_id, self.leased, self.retry_failed = torture, run_id, leased, retry_failed
        self.cluster: Cluster | None = None
        self.asked_to_stop = False
        self.idle = False
        self.compacts = False
        self.mishaps = [self.freeze, partial(self.freeze, 2 * LEASE_S), self.stop, self._lose_ledger, self._repeat]

    def stop(self) -> None:
        self.asked_to_stop = True

    def _lose_ledger(self) -> None:
        if self.cluster is not None and self.cluster.ledger is not None:
            self.cluster.forget()

    def _repeat(self) -> None:
        if self.cluster is not None:
            self.cluster.again()

    def work(self) -> None:
        self.pause()
        plan = planning.make(self.torture.config, retry=planning.Retry() if self.retry_failed else None)
        if not plan.num_pending and plan.published:
            self.idle = True
        else:
            self.carry_out(plan)

    def carry_out(self, plan: Plan) -> None:
        store = self.torture.store(self)
        store.check()
        with ExitStack() as stack:
            lease = Lease(store, self.run_id, LEASE_S, clock=lambda: self.world.now, sleep=self.sleep)
            if self.leased:
                stack.enter_context(lease)
            record = Journal(store)
            store.replace(f"_runs/{self.run_id}/run.json", b"{}\n")
            for rejected in plan.rejections_to_commit(self.run_id):
                record.append(rejected)
            if plan.num_pending:
                self._animate(plan, lease)
            if self.compacts:
                record.compact()
            outcomes = record.outcomes().of(plan.wanted)
            publication.publish(record, outcomes, plan.wanted, plan.carried, self.run_id, {})

    def _animate(self, plan: Plan, lease: Lease) -> None:
        self.cluster = cluster = Cluster(self, plan, list(batches_of(plan)))
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
        cluster.ledger.stop()
        while cluster.ledger.in_flight() and self.world.now < until:
            self.pause("drains")
            cluster.dispatch()
        if cluster.ledger.in_flight() and not any(worker.batches for worker in cluster.workers):
            self.world.bugs.append("a stopping run waited for requests that nobody works on")


# --- a history ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of one history."""

    seed: int
    problems: list[str]
    tallies: Counter[str]


@dataclass
class Torture:
    """One output, and everything that works on it."""

    case: Case
    output: Path
    world: World
    keys: set[str]
    make_store: Callable[[str, Process], FaultyStore] = FaultyStore
    suspected: Counter[str] = field(default_factory=Counter)
    """How many workers died or were taken for dead while they held a key."""

    @property
    def config(self) -> RunConfig:
        return self.case.config.model_copy(update={"output": str(self.output)})

    def store(self, process: Process) -> FaultyStore:
        return self.make_store(self.config.output, process)

    def start(self, count: int = 1, *, leased: bool = True, retry_failed: bool = False) -> bool:
        """Run drivers, all at once, to their ends. Whether one of them found that nothing is left to do."""
        self.world.tallies["starts"] += count
        number = self.world.tallies["starts"]
        drivers = [
            Driver(self, f"driver {number - k}", f"run-{number - k}", leased=leased, retry_failed=retry_failed)
            for k in range(count)
        ]
        for driver in drivers[number % 2 :: 2]:
            driver.compacts = True
        tasks: list[Task] = [self.world.start(driver, driver.work) for driver in drivers]
        self.world.run(until=lambda: all(task.done for task in tasks))
        return any(driver.idle for driver in drivers)

    def wrong_with_results(self) -> list[str]:
        """What a reader of the published results could complain of at any time after the first publication."""
        rows, problems = witness.results(self.output)
        due = Counter[str]()
        for (request_id, _, _), count in self.case.due.items():
            due[request_id] += count
        return problems + witness.missing_or_doubled(rows, due) + witness.false_successes(rows, self.output)

    def wrong_with_outcomes(self) -> list[str]:
        """Results that are not what the manifest deserves, though their workers were not to blame."""
        rows, problems = witness.results(self.output)
        if {row["key"] for row in rows} != self.keys:
            problems.append("the keys are not those of a run without faults")
        for row in rows:
            got = (row["request_id"], row["status"], row["error_kind"])
            of_a_death = row["error_kind"] in ("worker_crash", "timeout")
            # What raises in its batch, or stands beside what does, is alone already when its first worker dies.
            excused = of_a_death and self.suspected[row["key"]] >= self.config.limits.max_attempts - 1
            if got not in self.case.due and not excused:
                problems.append(f"result {got} after {self.suspected[row['key']]} deaths")
        return problems

    def wrong_with_objects(self) -> list[str]:
        """What was created and is not as it was then, and animations that no result tells of, and no death explains."""
        now, rows = witness.objects(self.output), witness.results(self.output)[0]
        first = {name: sha for name, sha in self.world.first_sha256.items() if name.startswith(witness.IMMUTABLE)}
        problems = [f"{name} was changed or removed" for name, sha in first.items() if now.get(name) != sha]
        problems += [f"{name} came from nowhere" for name in now if name not in first]
        told = {row["key"] for row in rows if row["status"] == "succeeded"}
        excused = {row["key"] for row in rows if row["error_kind"] in ("worker_crash", "timeout")}
        orphans = witness.animated_keys(self.output) - told
        return problems + [f"orphan {key}" for key in orphans if not (key in excused and self.suspected[key])]

    def judge(self) -> list[str]:
        return self.wrong_with_results() + self.wrong_with_outcomes() + self.wrong_with_objects()


@functools.cache
def _keys_without_faults(number: int, folder: Path) -> set[str]:
    """The keys that the results of a case have where nothing goes wrong."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        luck = Luck(0)
        luck.calm_down()
        torture = Torture(Case.make(number, folder), Path(output, "out"), World(luck), set())
        torture.start()
        return {row["key"] for row in witness.results(torture.output)[0]}


def history(seed: int, folder: Path, make_store: Callable[[str, Process], FaultyStore] = FaultyStore) -> Report:
    """One run and its faults, from the first start until nothing is left to do, and all that must hold then."""
    luck = Luck(seed)
    case = Case.make(seed % NUM_CASES, folder)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        keys = _keys_without_faults(seed % NUM_CASES, folder)
        torture = Torture(case, Path(output, "out"), World(luck), keys, make_store)
        problems = _live(torture, luck)
    return Report(seed, problems + torture.world.bugs, torture.world.tallies)


def _live(torture: Torture, luck: Luck) -> list[str]:
    for _ in range(MOST_STARTS):
        two, leased = luck.coin() and luck.coin(), luck.coin()
        if torture.start(1 + two, leased=leased):
            break
        if (torture.output / "results" / "LATEST.json").exists() and (problems := torture.wrong_with_results()):
            return [f"while the run went on: {problem}" for problem in problems]
    else:
        return [f"not finished after {MOST_STARTS} starts"]
    problems = [f"when it was finished: {problem}" for problem in torture.judge()]
    luck.calm_down()
    torture.world.run()  # zombies wake, and write what they have
    problems += [f"after the zombies: {problem}" for problem in torture.wrong_with_results()]
    problems += _wrong_with_reruns(torture) or torture.judge()
    problems = problems or _wrong_with_a_retry(torture)
    if problems or luck.coin():
        return problems
    return _wrong_with_a_repair(torture, luck) or _wrong_with_gc(torture)


def _wrong_with_reruns(torture: Torture) -> list[str]:
    """A run that has nothing to do must do nothing. Zombies may have left the first one something to publish."""
    tallies = torture.world.tallies
    for _ in range(3):
        before = (tallies["attempts to write"], tallies["drawn"])
        idle = torture.start()
        after = (tallies["attempts to write"], tallies["drawn"])
        if idle:
            return [] if after == before else [f"a run with nothing to do wrote and drew: {before} -> {after}"]
        if after[1] != before[1]:
            return [f"a run drew what was finished: {before} -> {after}"]
    return ["not finished without faults"]


def _wrong_with_a_retry(torture: Torture) -> list[str]:
    """Without faults, what only a death could fail succeeds, and every animation there is has its result."""
    torture.start(retry_failed=True)
    rows, problems = witness.results(torture.output)
    got = Counter((row["request_id"], row["status"]) for row in rows)
    due = Counter[tuple[str, str]]()
    for (request_id, status, _), count in torture.case.due.items():
        due[request_id, status] += count
    if got != due:
        problems.append(f"after --retry-failed: {got - due} instead of {due - got}")
    told = {row["key"] for row in rows if row["status"] == "succeeded"}
    if told != witness.animated_keys(torture.output):
        problems.append("after --retry-failed: animations and succeeded results are not the same")
    return problems + torture.wrong_with_results()


def _wrong_with_a_repair(torture: Torture, luck: Luck) -> list[str]:
    """`verify` names what was damaged and nothing else; what it takes back is drawn again by runs that die anew."""
    damages = itertools.cycle((Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), _flip_a_bit))
    animations = sorted(path for path in (torture.output / "animations").rglob("*") if path.is_file())
    damaged = {path.stem: path for path in animations if luck.coin()}
    for path, damage in zip(damaged.values(), damages, strict=False):
        damage(path)
    record = Journal(Store(torture.config.output))
    outcomes = record.outcomes()
    found = list(verification.verify(record, outcomes, quality.check_animation))
    if {problem.key for problem in found} != set(damaged):
        return [f"verify found {found} where {set(damaged)} were damaged"]
    verification.repair(record, outcomes, found, lambda: None)
    for path in damaged.values():
        del torture.world.first_sha256[str(path.relative_to(torture.output))]
    luck.worsen()
    if not any(torture.start(leased=luck.coin()) for _ in range(MOST_STARTS)):
        return ["not finished after a repair"]
    luck.calm_down()
    torture.world.run()
    problems = _wrong_with_reruns(torture) or torture.judge()
    return [f"after a repair: {problem}" for problem in problems]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _wrong_with_gc(torture: Torture) -> list[str]:
    """When nobody works any more `gc --delete` removes every orphan, and nothing that a result needs."""
    record = Journal(Store(torture.config.output))
    list(garbage.delete(record.store, garbage.find(record, time.time() + 3600), lambda: None))
    problems = torture.wrong_with_results() + torture.wrong_with_outcomes() + witness.orphans(torture.output)
    return [f"after gc: {problem}" for problem in problems or _wrong_with_reruns(torture)]


# --- a program ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if anything was violated; `--seed` of it with `--runs 1` or `--stack 1` shows it again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="histories in this process")
    parser.add_argument("--stack", type=int, default=0, help="schedules over real processes, Ray and an S3 server")
    parser.add_argument("--seed", type=int, default=1, help="of the first of each")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        num_bad = _histories(options.seed, options.runs, Path(folder)) if options.runs else 0
        num_bad += _schedules(options.seed, options.stack, Path(folder)) if options.stack else 0
    return 1 if num_bad else 0


def _histories(first: int, count: int, folder: Path) -> int:
    """Run and print them; how many had violations."""
    pa.set_cpu_count(1)
    started, tallies, num_bad = time.monotonic(), Counter[str](), 0
    for seed in range(first, first + count):
        report = history(seed, folder)
        tallies += report.tallies
        num_bad += bool(report.problems)
        if report.problems:
            print(f"seed {seed}:", *report.problems, sep="\n  ", flush=True)  # noqa: T201 - a program
    counted = ", ".join(f"{tallies[name]} {name}" for name in ("deaths", "zombies", "store faults", "starts"))
    seconds = time.monotonic() - started
    print(f"{count} histories, {num_bad} with violations: {counted}, {seconds:.0f} s", flush=True)  # noqa: T201
    return num_bad


def _schedules(first: int, count: int, folder: Path) -> int:
    """Run and print them; how many had violations."""
    import faults  # noqa: PLC0415 - starts Ray, which histories need not
    import schedules  # noqa: PLC0415

    started, tallies, num_bad = time.monotonic(), Counter[str](), 0
    with faults.stack(folder) as stack:
        cases: dict[int, faults.Case] = {}
        for seed in range(first, first + count):
            report = schedules.run(seed, stack, cases)
            tallies += report.tallies
            num_bad += bool(report.problems)
            told = ", ".join(f"{count} {name}" for name, count in report.tallies.items())
            verdict = "violated" if report.problems else "sound"
            print(f"schedule {seed}: {verdict}: {told}", *report.problems, sep="\n  ", flush=True)  # noqa: T201
    counted = ", ".join(f"{number} {name}" for name, number in sorted(tallies.items()))
    seconds = time.monotonic() - started
    print(f"{count} schedules, {num_bad} with violations: {counted}, {seconds:.0f} s", flush=True)  # noqa: T201
    return num_bad


if __name__ == "__main__":
    sys.exit(main())
