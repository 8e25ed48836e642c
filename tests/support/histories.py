"""Random histories of whole runs, started again until nothing is left to do, and the properties that must hold then."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import witness
from cases import Case
from simulated_runs import Driver
from simulation import FaultyStore, Luck, Process, Task, World

from pia_batch.config import RunConfig
from pia_batch.journal.garbage_collection import delete_garbage, find_garbage
from pia_batch.journal.log import Journal
from pia_batch.journal.verify import find_problems, repair
from pia_batch.media import posters, quality
from pia_batch.storage.object_store import Store

NUM_CASES = 12
MOST_STARTS = 60
"""Number of starts that the mishaps of a history can never need."""


@dataclass
class Report:
    """Result of one history."""

    seed: int
    problems: list[str]
    tallies: Counter[str]


@dataclass
class Torture:
    """One output, and all processes that work on it."""

    case: Case
    output: Path
    world: World
    keys: set[str]
    make_store: Callable[[str, Process], FaultyStore] = FaultyStore
    suspected: Counter[str] = field(default_factory=Counter)
    """Number of workers that died, or were taken for dead, while they held a key."""

    @property
    def config(self) -> RunConfig:
        return self.case.config.model_copy(update={"output": str(self.output)})

    @property
    def batches(self) -> int:
        return self.case.batches

    def store(self, process: Process) -> FaultyStore:
        return self.make_store(self.config.output, process)

    def start(self, count: int = 1, *, leased: bool = True, retry_failed: bool = False) -> bool:
        """Run drivers, all at once, to their ends; return true if one of them found that nothing is left to do."""
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
        """List errors that a reader of the published results could see at any time after the first publication."""
        rows, problems = witness.results(self.output)
        expected = Counter[str]()
        for (request_id, _, _), count in self.case.expected.items():
            expected[request_id] += count
        return problems + witness.missing_or_doubled(rows, expected) + witness.false_successes(rows, self.output)

    def wrong_with_outcomes(self) -> list[str]:
        """List results that differ from those of the manifest, although no worker died with them."""
        rows, problems = witness.results(self.output)
        if {row["key"] for row in rows} != self.keys:
            problems.append("the keys are not those of a run without faults")
        for row in rows:
            got = (row["request_id"], row["status"], row["error_kind"])
            of_a_death = row["error_kind"] in ("worker_crash", "timeout")
            # A request that raises in its batch, or whose neighbour does, is alone when its first worker dies.
            excused = of_a_death and self.suspected[row["key"]] >= self.config.limits.max_attempts - 1
            if got not in self.case.expected and not excused:
                problems.append(f"result {got} after {self.suspected[row['key']]} deaths")
        return problems

    def wrong_with_objects(self) -> list[str]:
        """List objects that were changed or removed, and animations without a result that no death explains."""
        now, rows = witness.objects(self.output), witness.results(self.output)[0]
        first = {name: sha for name, sha in self.world.first_sha256.items() if name.startswith(witness.IMMUTABLE)}
        problems = [f"{name} was changed or removed" for name, sha in first.items() if now.get(name) != sha]
        problems += [f"{name} came from nowhere" for name in now if name not in first]
        recorded = {row["key"] for row in rows if row["status"] == "succeeded"}
        excused = {row["key"] for row in rows if row["error_kind"] in ("worker_crash", "timeout")}
        orphans = witness.animated_keys(self.output) - recorded
        return problems + [f"orphan {key}" for key in orphans if not (key in excused and self.suspected[key])]

    def problems_now(self) -> list[str]:
        return self.wrong_with_results() + self.wrong_with_outcomes() + self.wrong_with_objects()


@functools.cache
def _keys_without_faults(number: int, folder: Path) -> set[str]:
    """Return the keys of the results of a case where nothing goes wrong."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        luck = Luck(0)
        luck.calm_down()
        torture = Torture(Case.make(number, folder), Path(output, "out"), World(luck), set())
        torture.start()
        return {row["key"] for row in witness.results(torture.output)[0]}


def history(seed: int, folder: Path, make_store: Callable[[str, Process], FaultyStore] = FaultyStore) -> Report:
    """Run one output through its faults until nothing is left to do, and check all properties that must hold then."""
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
    problems = [f"when it was finished: {problem}" for problem in torture.problems_now()]
    luck.calm_down()
    torture.world.run()  # zombies wake and write their results
    problems += [f"after the zombies: {problem}" for problem in torture.wrong_with_results()]
    problems += _wrong_with_reruns(torture) or torture.problems_now()
    problems = problems or _wrong_with_a_retry(torture)
    if problems or luck.coin():
        return problems
    return _wrong_with_a_repair(torture, luck) or _wrong_with_gc(torture)


def _wrong_with_reruns(torture: Torture) -> list[str]:
    """Check that a run with nothing to do does nothing. Zombies may have left results for the first one to publish."""
    tallies = torture.world.tallies
    for _ in range(3):
        before = (tallies["attempts to write"], tallies["generated"])
        idle = torture.start()
        after = (tallies["attempts to write"], tallies["generated"])
        if idle:
            return [] if after == before else [f"a run with nothing to do wrote and generated: {before} -> {after}"]
        if after[1] != before[1]:
            return [f"a run generated finished requests: {before} -> {after}"]
    return ["not finished without faults"]


def _wrong_with_a_retry(torture: Torture) -> list[str]:
    """Check that requests that failed only by a death succeed without faults, and every animation has its result."""
    torture.start(retry_failed=True)
    rows, problems = witness.results(torture.output)
    got = Counter((row["request_id"], row["status"]) for row in rows)
    expected = Counter[tuple[str, str]]()
    for (request_id, status, _), count in torture.case.expected.items():
        expected[request_id, status] += count
    if got != expected:
        problems.append(f"after --retry-failed: {got - expected} instead of {expected - got}")
    recorded = {row["key"] for row in rows if row["status"] == "succeeded"}
    if recorded != witness.animated_keys(torture.output):
        problems.append("after --retry-failed: animations and succeeded results are not the same")
    return problems + torture.wrong_with_results()


def _wrong_with_a_repair(torture: Torture, luck: Luck) -> list[str]:
    """Check that `verify` names damaged animations only, and that runs that die again generate them again."""
    damages = itertools.cycle((Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), _flip_a_bit))
    animations = sorted(path for path in (torture.output / "animations").rglob("*") if path.is_file())
    damaged = {path.stem: path for path in animations if luck.coin()}
    for path, damage in zip(damaged.values(), damages, strict=False):
        damage(path)
    record = Journal(Store(torture.config.output))
    outcomes = record.outcomes()
    found = list(find_problems(record, outcomes, quality.check_animation, posters.check_poster))
    if {problem.key for problem in found} != set(damaged):
        return [f"verify found {found} where {set(damaged)} were damaged"]
    repair(record, outcomes, found, lambda: None)
    for path in damaged.values():
        del torture.world.first_sha256[str(path.relative_to(torture.output))]
    luck.worsen()
    if not any(torture.start(leased=luck.coin()) for _ in range(MOST_STARTS)):
        return ["not finished after a repair"]
    luck.calm_down()
    torture.world.run()
    problems = _wrong_with_reruns(torture) or torture.problems_now()
    return [f"after a repair: {problem}" for problem in problems]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _wrong_with_gc(torture: Torture) -> list[str]:
    """Check that `gc --delete`, when no run works, removes every orphan and nothing that a result needs."""
    record = Journal(Store(torture.config.output))
    list(delete_garbage(record.store, find_garbage(record, time.time() + 3600), lambda: None))
    problems = torture.wrong_with_results() + torture.wrong_with_outcomes() + witness.orphans(torture.output)
    return [f"after gc: {problem}" for problem in problems or _wrong_with_reruns(torture)]
