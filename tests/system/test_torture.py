"""Whole runs under faults: some histories by chance, and every history of the few steps on which all depends."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import witness
from cases import Case
from histories import NUM_CASES, Torture, history
from inputs import png
from places import ROOT, SUPPORT
from simulated_runs import Cluster, Driver, tasks_of
from simulation import FaultyStore, Luck, Process, Pruned, Search, World

from pia_batch.config import RunConfig
from pia_batch.errors import LeaseHeldError, ObjectExistsError, StorageError
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import find_dataset_difference, restore_dataset
from pia_batch.planning.plan import find_published_run, make_plan
from pia_batch.storage.object_store import Store

# --- by chance ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_random_histories_lose_double_and_overwrite_nothing(tmp_path: Path) -> None:
    tallies = Counter[str]()
    for seed in range(NUM_CASES):
        report = history(seed, tmp_path)
        assert report.problems == [], f"make torture RUNS=1 SEED={seed}"
        tallies += report.tallies
    assert min(tallies["deaths"], tallies["zombies"], tallies["store faults"]) > 0


def test_a_seed_is_a_history(tmp_path: Path) -> None:
    assert history(7, tmp_path).tallies == history(7, tmp_path).tallies


class Overwriting(FaultyStore):
    """Ignores `If-None-Match`, except where `Store.check` would notice."""

    def _put(self, path: Path, data: bytes, *, overwrite: bool) -> bool:
        return super()._put(path, data, overwrite=overwrite or path.name != "create-only")


class Forgetful(FaultyStore):
    """A store that loses every second animation that it has acknowledged."""

    def _put(self, path: Path, data: bytes, *, overwrite: bool) -> bool:
        if "animations" in path.parts and int(path.stem, 16) % 2:
            return True
        return super()._put(path, data, overwrite=overwrite)


class Unadopted(FaultyStore):
    """A store that reports success to a worker whose animation was there already, from another worker."""

    def create(self, name: str, data: bytes) -> None:
        try:
            super().create(name, data)
        except ObjectExistsError:
            if not name.startswith("animations/"):
                raise


@pytest.mark.long
@pytest.mark.parametrize(("broken", "first"), [(Overwriting, 0), (Forgetful, 0), (Unadopted, 12)])
def test_a_protocol_that_is_broken_is_found_out(
    tmp_path: Path, broken: Callable[[str, Process], FaultyStore], first: int
) -> None:
    assert any(history(seed, tmp_path, broken).problems for seed in range(first, first + 20))


# --- the witness ----------------------------------------------------------------------------------------------------


class Calm(Luck):
    """Nothing goes wrong."""

    def __init__(self) -> None:
        super().__init__(0)
        self.calm_down()


def small_case(folder: Path, *prompts: str) -> Case:
    """One batch of good requests, and one request that is rejected."""
    (folder / "images").mkdir()
    (folder / "images" / "0.png").write_bytes(png(0, 16, 16))
    rows = [
        {"request_id": f"r{k}", "image": "images/0.png", "prompt": prompt, "seed": k, "format": "png_zip"}
        for k, prompt in enumerate(prompts)
    ]
    rows.append(rows[0] | {"request_id": "bad", "seed": -1})
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    settings = {"manifest": str(folder), "output": str(folder / "nowhere"), "images.threads": 1}
    settings |= {"defaults.width": 16, "defaults.height": 16, "defaults.num_frames": 2}
    expected = Counter({(f"r{k}", "succeeded", None): 1 for k in range(len(prompts))})
    expected["bad", "failed", "out_of_range"] = 1
    return Case(RunConfig.load(None, settings | {"placement.batch_size": len(prompts)}), expected)


@pytest.fixture
def finished(tmp_path: Path) -> Torture:
    (tmp_path / "manifest").mkdir()
    case = small_case(tmp_path / "manifest", "a red circle", "a blue square")
    torture = Torture(case, tmp_path / "out", World(Calm()), set())
    torture.start()
    torture.keys |= {row["key"] for row in witness.results(torture.output)[0]}
    assert torture.problems_now() == []
    return torture


def rewrite_results(output: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = next((output / "results").rglob("part-*.parquet"))
    pq.write_table(change(pq.read_table(path)), path)


def tamper_row_lost(output: Path) -> None:
    rewrite_results(output, lambda table: table.slice(1))


def tamper_row_doubled(output: Path) -> None:
    rewrite_results(output, lambda table: pa.concat_tables([table, table.slice(0, 1)]))


def tamper_failure_made_up(output: Path) -> None:
    def fail(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[1] |= {"status": "failed", "error_kind": "worker_crash"}
        return pa.Table.from_pylist(rows, table.schema)

    rewrite_results(output, fail)


def tamper_object_removed(output: Path) -> None:
    next((output / "animations").rglob("*.zip")).unlink()


def tamper_object_changed(output: Path) -> None:
    path = next((output / "animations").rglob("*.zip"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def tamper_object_unexplained(output: Path) -> None:
    path = next((output / "animations").rglob("*.zip"))
    path.with_stem("0" * 32).write_bytes(b"whose?")


def tamper_frame_missing(output: Path) -> None:
    rewrite_results(
        output,
        lambda table: table.set_column(
            table.column_names.index("num_frames"), "num_frames", pa.array([3] * len(table), pa.int64())
        ),
    )


def tamper_fragment_removed(output: Path) -> None:
    next((output / "_journal").glob("*.parquet")).unlink()


def tamper_summary(output: Path) -> None:
    path = next((output / "results").rglob("_SUCCESS.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"succeeded": 3}))


def tamper_never_published(output: Path) -> None:
    (output / "results" / "LATEST.json").unlink()


TAMPERINGS = [value for name, value in sorted(globals().items()) if name.startswith("tamper_")]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=[tamper.__name__ for tamper in TAMPERINGS])
def test_the_witness_sees_what_is_wrong(finished: Torture, tamper: Callable[[Path], None]) -> None:
    tamper(finished.output)

    assert finished.problems_now() != []


def test_the_witness_knows_nothing_of_the_package() -> None:
    code = "import sys, witness; sys.exit(any(name.split('.')[0] == 'pia_batch' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=SUPPORT, check=True)


# --- every history --------------------------------------------------------------------------------------------------


def every_history(search: Search, folder: Path, begin: Callable[[World, Path], None]) -> Iterator[World]:
    """The world at the end of each history, its files in `folder / "out"`."""
    for chooser in search.histories():
        shutil.rmtree(folder / "out", ignore_errors=True)
        world = World(chooser)
        begin(world, folder / "out")
        try:
            world.run()
        except Pruned:
            world.abandon()
            continue
        assert world.bugs == []
        yield world


def test_the_search_finds_the_one_bad_history_of_a_race(tmp_path: Path) -> None:
    totals = set()
    total = 0

    def add(process: Process) -> None:
        nonlocal total
        seen = total
        process.pause(seen)
        total = seen + 1

    def begin(world: World, _: Path) -> None:
        nonlocal total
        total = 0
        world.shared_state = lambda: total
        for name in "ab":
            process = Process(world, name)
            world.start(process, partial(add, process))

    for _ in every_history(Search(), tmp_path, begin):
        totals.add(total)
    assert totals == {1, 2}


def end_of(output: Path) -> frozenset[object]:
    """Return everything that decides how a run continues from here; outputs that differ in times only are equal."""
    said = [
        tuple(row.values())
        for path in (output / "_journal").glob("*.parquet")
        for row in pq.read_table(path, columns=["key", "status", "sha256"]).to_pylist()
    ]
    animations = witness.objects(output).items()
    return frozenset([*said, *((name, sha) for name, sha in animations if name.startswith("animations/"))])


class Commits:
    """Workers that hold one and the same batch, as after a false alarm. Each of them generates other pixels."""

    def __init__(
        self,
        folder: Path,
        *prompts: str,
        one_run: bool,
        make_store: Callable[[str, Process], FaultyStore] = FaultyStore,
    ) -> None:
        (folder / "manifest").mkdir()
        self.case = small_case(folder / "manifest", *prompts)
        self.plan = make_plan(self.case.config.model_copy(update={"output": str(folder / "out")}))
        self.tasks = list(tasks_of(self.plan, 1))
        self.make_store, self.one_run = make_store, one_run
        self.keys = set(self.tasks[0]["key"].to_pylist()) | set(self.plan.rejected["key"].to_pylist())

    def begin(self, world: World, output: Path) -> None:
        self.torture = Torture(self.case, output, world, self.keys, self.make_store)
        clusters = [self._cluster("first")] if self.one_run else [self._cluster("first"), self._cluster("second")]
        world.shared_state = lambda: repr([cluster.tracker for cluster in clusters])
        for number in range(2):
            worker = clusters[number % len(clusters)].hire()
            worker.tasks = [self.tasks[0]]
            world.start(worker, partial(worker.call, self.tasks[0]))

    def _cluster(self, name: str) -> Cluster:
        driver = Driver(self.torture, name, name, leased=False)
        return Cluster(driver, self.plan, self.tasks)

    def wrong_after(self, search: Search, folder: Path) -> tuple[list[str], int]:
        """Resume each history without faults; return the problems and the number of different ends."""
        problems, ends = list[str](), set[frozenset[object]]()
        for world in every_history(search, folder, self.begin):
            end = end_of(folder / "out")
            if end in ends:
                continue
            ends.add(end)
            world.chooser = Calm()
            if not any(self.torture.start(leased=False) for _ in range(3)):
                problems.append("not finished")
            problems += self.torture.problems_now()
        return problems, len(ends)


@pytest.mark.long
@pytest.mark.parametrize("one_run", [True, False], ids=["one run", "two runs"])
def test_two_workers_of_one_request_agree_in_every_order_and_after_every_death(tmp_path: Path, one_run: bool) -> None:
    search = Search(deaths=1)
    problems, num_ends = Commits(tmp_path, "a red circle", one_run=one_run).wrong_after(search, tmp_path)

    assert problems == []
    assert num_ends >= 2  # one animation or the other, at least
    assert len(search.states) > 200


@pytest.mark.long
def test_two_workers_of_one_batch_agree_in_every_order_of_few_switches(tmp_path: Path) -> None:
    search = Search(deaths=1, switches=1)
    commits = Commits(tmp_path, "a red circle", "a blue square", one_run=False)
    problems, num_ends = commits.wrong_after(search, tmp_path)

    assert problems == []
    assert num_ends > 2
    assert len(search.states) > 200


@pytest.mark.long
def test_two_workers_of_one_request_agree_whichever_answer_of_the_store_is_lost(tmp_path: Path) -> None:
    search = Search(faults=1, answers=("lost", "retried"))
    problems, num_ends = Commits(tmp_path, "a red circle", one_run=True).wrong_after(search, tmp_path)

    assert problems == []
    assert num_ends == 2  # one animation or the other


@pytest.mark.long
@pytest.mark.parametrize("broken", [Overwriting, Unadopted])
def test_the_search_finds_a_broken_protocol(tmp_path: Path, broken: Callable[[str, Process], FaultyStore]) -> None:
    commits = Commits(tmp_path, "a red circle", one_run=False, make_store=broken)

    assert commits.wrong_after(Search(), tmp_path)[0] != []


class Publications:
    """Two drivers with one plan: generated animations are committed, rejections and results are not."""

    def __init__(self, folder: Path) -> None:
        (folder / "manifest").mkdir()
        self.case = small_case(folder / "manifest", "a red circle")
        config = self.case.config.model_copy(update={"output": str(folder / "first")})
        world = World(Calm())
        torture = Torture(self.case, folder / "first", world, set())
        driver = Driver(torture, "first", "first", leased=False)
        plan = make_plan(config)
        cluster = Cluster(driver, plan, list(tasks_of(plan, 1)))
        cluster.dispatch()
        world.run()
        self.keys = set(cluster.done[0]["key"].to_pylist()) | set(plan.rejected["key"].to_pylist())
        self.first, self.first_sha256 = folder / "first", world.first_sha256
        self.plan = make_plan(config)
        assert self.plan.num_pending == 0
        assert not find_published_run(self.plan)

    def begin(self, world: World, output: Path) -> None:
        shutil.copytree(self.first, output)
        world.first_sha256 = dict(self.first_sha256)
        self.torture = Torture(self.case, output, world, self.keys)
        for name in ("one", "other"):
            driver = Driver(self.torture, name, name, leased=False)
            world.start(driver, partial(driver.carry_out, self.plan))


@pytest.mark.long
@pytest.mark.parametrize(("deaths", "switches"), [(1, 0), (0, 1)])
def test_two_runs_that_publish_leave_whole_results_in_every_order(tmp_path: Path, deaths: int, switches: int) -> None:
    search, publications = Search(deaths=deaths, switches=switches), Publications(tmp_path)
    ends = set()
    for world in every_history(search, tmp_path, publications.begin):
        output = tmp_path / "out"
        if (output / "results" / "LATEST.json").exists():
            assert publications.torture.wrong_with_results() == []
            if deaths:  # a run that dies while it publishes what is published already is repaired by `verify`
                restore_dataset(Journal(Store(str(output))))
            assert find_dataset_difference(Store(str(output))) is None
        end = frozenset(str(path.relative_to(output)) for path in output.rglob("*"))
        if end not in ends:
            ends.add(end)
            world.chooser = Calm()
            assert any(publications.torture.start(leased=False) for _ in range(3))
            assert publications.torture.problems_now() == []
    assert len(ends) > deaths


# --- the lease ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("dead", [False, True], ids=["free", "of a dead run"])
def test_a_lease_is_never_held_twice_in_any_order(tmp_path: Path, dead: bool) -> None:
    """Two runs come for it. One answer of the store is bad, or one of them dies."""
    inside: list[str] = []
    held = set[tuple[str, ...]]()

    def come(process: Process) -> None:
        clock = 0.0

        def wait(_: float) -> None:
            nonlocal clock
            if not dead or (tmp_path / "out" / "_lease" / "000000000002.json").exists():
                raise LeaseHeldError
            clock += 1e9

        store = FaultyStore(str(tmp_path / "out"), process)
        with suppress(LeaseHeldError, StorageError), Lease(store, process.name, 600.0, lambda: clock, wait) as lease:
            process.pause("works")
            lease.renew()
            if not lease.lost.is_set():
                inside.append(process.name)
                held.add(tuple(inside))
                try:
                    process.pause("works on")
                finally:
                    inside.remove(process.name)

    def begin(world: World, output: Path) -> None:
        inside.clear()
        world.shared_state = lambda: tuple(inside)
        if dead:
            (output / "_lease").mkdir(parents=True)
            gone = {"run_id": "gone", "released": False, "ttl_s": 60.0, "host": "elsewhere", "pid": 1, "boot": 0.0}
            (output / "_lease" / "000000000001.json").write_text(json.dumps(gone | {"process_started": 0.0}))
        for name in "ab":
            process = Process(world, name)
            world.start(process, partial(come, process))

    search = Search(deaths=1) if dead else Search(faults=1)
    for _ in every_history(search, tmp_path, begin):
        pass
    assert held == {("a",), ("b",)}


# --- what is claimed ------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_on_faults_names_is_there() -> None:
    names = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    claimed = re.findall(r"`([a-z0-9_]+(?:…[a-z0-9_]*)+)`", (ROOT / "docs/faults.md").read_text())
    for claim in claimed:
        pattern = re.compile(".*".join(map(re.escape, claim.split("…"))))
        assert any(pattern.search(name) for name in names), claim
    assert len(claimed) > 20
