"""The chain on a real Ray: what comes out, what is left out, and what survives a kill."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_of_types import EXTENSIONS, LEAVES, extension_column
from fakes import FakeControl, FakeEngine, FakeEngineLoader, FakeShelf, PoisonedEngine
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.driver import run as driver_run
from pia_batch.driver.progress import Progress
from pia_batch.errors import BrokenDeviceError, ConfigError, InterruptedRunError, ManifestError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.pipeline import actor, batching, chain
from pia_batch.planning.plan import Plan, Retry, make_plan
from pia_batch.schema.run_record import RunRecord, RunSummary
from pia_batch.storage.object_store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

MakeConfig = Callable[..., RunConfig]


def run(config: RunConfig, **options: object) -> RunSummary:
    engine_id = make_plan(config).engine_ids["default"]
    options.setdefault("load_engines", FakeEngineLoader(engine_id))
    return driver_run.run(config, **options)


def results_of(config: RunConfig, summary: RunSummary) -> dict[str, dict]:
    rows = pq.read_table(f"{config.output}/results/{summary.run_id}").to_pylist()
    return {row["request_id"]: row for row in rows}


def objects(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_good_requests_succeed_and_bad_ones_fail_with_a_kind(make_config: MakeConfig) -> None:
    table = requests_table(
        7,
        image=["images/0.png", "images/gone.png", "images/1.png", "images/2.png", "images/3.png", "images/0.png", None],
        prompt=["fine", "fine", "not finite", "fine", "fine", "fine", "fine"],
        motion_scale=pa.array([0, 0, 0, 9, None, 3, 0]),
        format=["gif", "gif", "gif", "gif", "webp", None, "gif"],
        num_frames=pa.array([3, 3, 3, 3, 5, 4, 3]),
        shop=["a", "b", "c", "d", "e", "f", "g"],
    )
    config = make_config(table, limits__max_failed=4)

    summary = run(config)

    rows = results_of(config, summary)
    assert {name: row["error_kind"] for name, row in rows.items()} == {
        "r000": None,
        "r001": "image_unavailable",
        "r002": "non_finite",
        "r003": "out_of_range",
        "r004": None,
        "r005": None,
        "r006": "missing_value",
    }
    assert (summary.succeeded, summary.failed, summary.computed, summary.exit_code) == (3, 4, 5, 0)
    assert summary.failures == {"image_unavailable": 1, "missing_value": 1, "non_finite": 1, "out_of_range": 1}
    assert [rows[name]["shop"] for name in sorted(rows)] == list("abcdefg")
    assert [rows[name]["num_frames"] for name in ("r000", "r004", "r005")] == [3, 5, 4]
    assert rows["r005"]["animation_uri"].endswith(".mp4")


@pytest.mark.long
def test_more_failures_than_allowed_end_with_exit_code_3(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, prompt=["fine", "not finite"]))

    assert run(config).exit_code == 3
    assert run(config).exit_code == 3  # the state of the manifest, not of this run


def test_a_second_run_writes_nothing_and_starts_no_engine(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "fine", "not finite"]))
    first = run(config)
    before = objects(config.output)

    def no_engine() -> FakeEngine:
        raise AssertionError

    second = run(config, load_engines=no_engine)

    assert objects(config.output) == before
    assert (second.run_id, second.computed, second.failed) == (first.run_id, 0, 1)


@pytest.mark.long
def test_failed_requests_come_back_only_when_asked_for(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "fine", "not finite"]))
    run(config)

    again = run(config, retry=Retry())

    assert (again.computed, again.failed, again.succeeded) == (1, 1, 2)


@pytest.mark.long
def test_a_changed_row_is_pending_again_and_the_others_are_not(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4))
    run(config)
    table = requests_table(4)
    changed = table.set_column(2, "prompt", pa.array(["a blue square", *table["prompt"].to_pylist()[1:]]))

    summary = run(make_config(changed))

    assert (summary.computed, summary.succeeded) == (1, 4)


@pytest.mark.long
def test_a_repeated_request_is_animated_once_and_a_contradicting_one_is_refused(make_config: MakeConfig) -> None:
    table = pa.concat_tables([requests_table(4), requests_table(2), requests_table(1, request_id=["r003"])])
    config = make_config(table, placement__batch_size=1)

    summary = run(config)

    rows = pq.read_table(f"{config.output}/results/{summary.run_id}").to_pylist()
    counts = Counter((row["request_id"], row["error_kind"]) for row in rows)
    assert counts == {("r000", None): 1, ("r001", None): 1, ("r002", None): 1, ("r003", "duplicate_id"): 2}
    assert (summary.duplicates, summary.computed) == (2, 3)


@pytest.mark.long
def test_jsonl_manifests_run_too(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    manifest = Path(config.manifest) / "more.jsonl"
    manifest.write_text('{"request_id": 7, "image": "images/0.png", "prompt": "fine", "seed": 5}\n')
    config = RunConfig.load(None, {"manifest": str(manifest), "output": str(tmp_path / "out")})

    assert [row["seed"] for row in results_of(config, run(config)).values()] == [5]


@pytest.mark.long
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_from_the_first_on_are_operators_of_their_own_and_blocks_have_the_size_of_a_batch(
    make_config: MakeConfig, *, mixed: bool
) -> None:
    frames = [8, 4, 8, 4, 8, 4, 8] if mixed else [8] * 7
    config = make_config(requests_table(7, num_frames=frames), placement__batch_size=2)
    plan = make_plan(config)
    Store(config.output).check(layout.CREATE_ONLY_PROBE)  # as a run does before its chain
    dataset = chain.chain(plan, "run", FakeControl(), FakeEngineLoader(plan.engine_ids["default"]))

    sizes = [len(block) for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]

    stats = dataset.stats()
    steps = ["ReadManifest->MapBatches(Validate)->MapBatches(DropFinished)", "StreamingRepartition"]
    steps += ["MapBatches(Arrange)", "StreamingRepartition"] if mixed else []
    steps += ["MapBatches(FetchImages)->StreamingRepartition", "MapBatches(AnimateActor)"]
    operators = [line.split(" ", 2)[2] for line in stats.splitlines() if line.startswith("Operator ")]
    assert [name.split(":")[0].split("[")[0] for name in operators[-len(steps) :]] == steps
    assert sum("->" in name for name in operators[1 - len(steps) :]) == 1  # "->" is how Ray writes a fusion
    assert sum(sizes) == 7
    assert max(sizes) <= 3  # Ray may hand the last, smaller block over together with the one before


@pytest.mark.long
def test_an_engine_that_is_not_the_drivers_ends_the_run_with_the_remedy(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"weights on this node differ from the driver.*same weights"):
        run(make_config(), load_engines=FakeEngineLoader("0" * 32))


@dataclass(frozen=True)
class LeavesItsPid:
    """An engine loader that leaves the pid of its process, for the test to kill it."""

    engine_id: str
    folder: Path

    def __call__(self) -> FakeShelf:
        (self.folder / f"{os.getpid()}.pid").touch()
        return FakeShelf(FakeEngine(engine_id=self.engine_id, seconds=0.4))


@pytest.mark.long
@pytest.mark.parametrize("batches", [1, 4])
def test_a_killed_engine_is_replaced_and_nothing_is_lost_or_doubled(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    monkeypatch.setattr(batching, "TASKS_PER_ENGINE", 8 // batches)
    config = make_config(requests_table(16), placement__batch_size=2)
    assert batching.batches_per_task(config, 16) == batches
    pids = tmp_path / "pids"
    pids.mkdir()
    engine_id = make_plan(config).engine_ids["default"]
    journal = Journal(Store(config.output))

    def kill_one() -> None:
        while len(journal.fragments()) < 2:
            time.sleep(0.05)
        os.kill(int(next(pids.iterdir()).stem), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = run(config, load_engines=LeavesItsPid(engine_id, pids))
    killer.join()

    rows = results_of(config, summary)
    assert len(list(pids.iterdir())) == 2
    assert (summary.succeeded, len(rows), len(list(Path(config.output, "animations").rglob("*.mp4")))) == (16, 16, 16)
    assert Counter(row["attempts"] for row in rows.values())[1] >= 8  # only what was in flight was begun again


@pytest.mark.long
def test_a_stopped_run_commits_what_is_in_flight_and_the_next_one_finishes(make_config: MakeConfig) -> None:
    config = make_config(requests_table(12), placement__batch_size=2)
    engine_id = make_plan(config).engine_ids["default"]
    stop = threading.Event()

    asked = 0.0

    def stop_early(progress: Progress) -> None:
        nonlocal asked
        if progress.succeeded:
            asked = time.monotonic()
            stop.set()

    loader = FakeEngineLoader(engine_id, seconds=1.0)
    with pytest.raises(InterruptedRunError, match="Start again"):
        run(config, stop=stop, on_progress=stop_early, load_engines=loader)
    stopped = time.monotonic()

    committed = len(Journal(Store(config.output)).outcomes().keys)
    assert 4 <= committed < 12  # the batch that made the test stop the run, and the one on the device then
    assert stopped - asked < 20  # and not `limits.stop_grace_s`, which is for engines that do not answer
    assert len(list(Path(config.output, "animations").rglob("*.mp4"))) == committed  # nothing half done
    assert not Path(config.output, "results").exists()
    rest = run(config)
    assert (rest.computed, rest.succeeded) == (12 - committed, 12)


@pytest.mark.long
def test_poison_of_every_sort_fails_alone_and_the_run_ends_by_itself(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "TASKS_PER_ENGINE", 2)  # tasks of two batches: one death has more to come again
    poison = {3: "raises", 5: "exits", 8: "crashes", 12: "eats", 14: "hungers", 15: "not finite"}
    prompts = [poison.get(k, "fine") for k in range(16)]
    table = requests_table(16, prompt=prompts, format=["gif"] * 16)
    config = make_config(table, placement__batch_size=4, placement__memory_mb=1024, limits__max_attempts=2)
    loader = FakeEngineLoader(make_plan(config).engine_ids["default"], engine=PoisonedEngine)

    summary = run(config, load_engines=loader)

    rows = results_of(config, summary)
    kinds = {
        3: "engine_error",
        5: "worker_crash",
        8: "worker_crash",
        12: "out_of_memory",
        14: "out_of_memory",
        15: "non_finite",
    }
    assert {name: row["error_kind"] for name, row in rows.items() if row["status"] == "failed"} == {
        f"r{k:03d}": kind for k, kind in kinds.items()
    }
    assert "1024 MiB of its worker's memory (placement.memory_mb)" in rows["r012"]["error"]
    assert (summary.succeeded, summary.failed, summary.exit_code) == (10, 6, 3)
    assert len(list(Path(config.output, "animations").rglob("*.gif"))) == 10
    assert max(row["attempts"] for row in rows.values()) <= config.limits.max_attempts + 1


@pytest.mark.long
def test_a_request_that_hangs_fails_alone_after_its_deadline(make_config: MakeConfig) -> None:
    table = requests_table(4, prompt=["fine", "hangs", "fine", "fine"], format=["gif"] * 4)
    limits = {"limits__timeout_s": 5, "limits__max_attempts": 2}  # others must not take as long on a busy machine
    config = make_config(table, placement__batch_size=4, **limits)
    loader = FakeEngineLoader(make_plan(config).engine_ids["default"], engine=PoisonedEngine)

    summary = run(config, load_engines=loader)

    assert (summary.succeeded, summary.failures) == (3, {"timeout": 1})
    assert "limits.timeout_s" in results_of(config, summary)["r001"]["error"]


@dataclass(frozen=True)
class FailingLoader:
    """Cannot load an engine, in one of the ways that there are."""

    way: str

    def __call__(self) -> FakeShelf:
        if self.way == "dies":
            os._exit(9)
        raise ImportError("libtorch_cuda.so: cannot open shared object file")


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "raised", "says"),
    [
        ("dies", BrokenDeviceError, "an engine's process has died 3 times in a row while it started"),
        ("has no torch", ConfigError, "an engine cannot start on node .* libtorch_cuda.so.* install the versions"),
    ],
)
def test_an_engine_that_cannot_start_ends_the_run_with_the_cause(
    make_config: MakeConfig, way: str, raised: type[Exception], says: str
) -> None:
    config = make_config()

    with pytest.raises(raised, match=says):
        run(config, load_engines=FailingLoader(way))

    assert len(Journal(Store(config.output)).outcomes().keys) == 0


@pytest.mark.long
def test_a_node_with_another_version_of_the_package_ends_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "__version__", "99.0")  # the driver's; workers import the package themselves

    with pytest.raises(ConfigError, match=r"and the driver 99\.0; install one version on every node"):
        run(make_config())


@pytest.mark.long
def test_a_node_without_the_code_of_the_run_ends_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("class Loader:\n    def __call__(self):\n        return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    loader = importlib.import_module("only_here").Loader()

    with pytest.raises(ConfigError, match="No module named 'only_here'"):
        run(make_config(), load_engines=loader)


@pytest.mark.long
@pytest.mark.parametrize("harm", ["damaged", "replaced"])
def test_a_manifest_that_cannot_be_trusted_any_more_ends_the_run_with_the_file(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    config = make_config(requests_table(4, shop=[f"the shop number {k}" for k in range(4)]))
    path = Path(config.manifest, "requests.parquet")
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="none", use_dictionary=False)
    if harm == "damaged":  # where planning does not look
        path.write_bytes(path.read_bytes().replace(b"the shop number 2", b"the ship number 2", 1))
        with pytest.raises(ManifestError, match=r"cannot read manifest .*requests\.parquet"):
            run(config)
        return

    def plan_and_be_overtaken(*arguments: object, **options: object) -> Plan:
        plan = make_plan(*arguments, **options)
        pq.write_table(requests_table(9), path)
        return plan

    monkeypatch.setattr(driver_run, "make_plan", plan_and_be_overtaken)
    with pytest.raises(InterruptedRunError, match=r"requests\.parquet was replaced or removed .* Start again"):
        driver_run.run(config, load_engines=FakeEngineLoader("0" * 32))


@pytest.mark.long
def test_a_worker_that_fails_every_request_stops_the_run_before_all_are_spent(make_config: MakeConfig) -> None:
    table = requests_table(200, prompt=["raises"] * 200)
    config = make_config(table, placement__batch_size=2, limits__max_crashes=4)
    loader = FakeEngineLoader(make_plan(config).engine_ids["default"], engine=PoisonedEngine)

    with pytest.raises(InterruptedRunError, match=r"requests in a row failed .* weights are cursed"):
        run(config, load_engines=loader)

    assert 4 <= len(Journal(Store(config.output)).outcomes().keys) < 200


@pytest.mark.long
def test_several_models_and_sizes_are_animated_by_the_embedded_model(make_config: MakeConfig) -> None:
    table = requests_table(
        6,
        prompt=["a red circle moving left"] * 6,
        model=["ddim", None, "ddim", None, "ddim", None],
        motion=["small", "medium", "large"] * 2,
        loop=[False, False, False, True, True, True],
        size=["fixed", "auto", None, "auto", None, None],
        format=["png_zip"] * 6,
    )
    config = make_config(table, models__ddim={"scheduler": {"name": "ddim"}}, defaults__num_inference_steps=2)

    summary = driver_run.run(config)

    rows = results_of(config, summary)
    ids = make_plan(config).engine_ids
    assert {row["status"] for row in rows.values()} == {"succeeded"}
    assert [rows[f"r{k:03d}"]["engine_id"] for k in range(6)] == [ids[name] for name in ["ddim", "default"] * 3]
    assert [rows[f"r{k:03d}"]["motion_scale"] for k in range(6)] == [0, 1, 2, 3, 4, 5]
    assert {(row["width"], row["height"]) for row in rows.values()} == {(64, 64)}


# --- budgets --------------------------------------------------------------------------------------------------------


def run_json_of(config: RunConfig, run_id: str) -> dict[str, Any]:
    return dict(json.loads(Path(config.output, "_runs", run_id, "run.json").read_text()))


@pytest.mark.long
def test_a_limited_run_animates_the_highest_priorities_first_and_the_next_run_the_rest(make_config: MakeConfig) -> None:
    order = random.Random(0).sample(range(40), 40)
    table = requests_table(40, score=[float(score) if score else None for score in order], format=["gif"] * 40)
    best = {f"r{order.index(score):03d}" for score in range(36, 40)}
    budget = {"budget__limit": 4, "budget__priority": "score", "budget__price_per_hour": 3600.0}
    limited = make_config(table, **budget, defaults__num_frames=2)
    least = requests_table(6, request_id=[f"least{k}" for k in range(6)], score=[-1.0] * 6, format=["gif"] * 6)
    pq.write_table(least, Path(limited.manifest, "least.parquet"))  # a block of which nothing is chosen
    ended: list[RunRecord] = []

    first = run(limited, on_end=ended.append)

    log = Journal(Store(limited.output))
    committed = pa.concat_tables(log.winning_rows(log.outcomes()))
    assert set(committed["request_id"].to_pylist()) == best
    assert (first.computed, first.left, first.reason, first.exit_code, first.results_uri) == (4, 42, "limit", 4, None)
    assert not Path(limited.output, "results").exists()
    page = Path(limited.output, "_runs", first.run_id, "report.html").read_text()
    assert {name for name in (f"r{k:03d}" for k in range(40)) if f'"{name}"' in page} == best
    written = run_json_of(limited, first.run_id)
    assert [record.payload() for record in ended] == [
        {name: value for name, value in written.items() if name != "config"}
    ]
    assert (written["state"], written["engines"]["count"]) == ("stopped", 1)
    assert written["engine_hours"] > 0
    assert written["cost"] == pytest.approx(3600 * written["engine_hours"], abs=0.01)

    rest = run(limited.model_copy(update={"budget": limited.budget.model_copy(update={"limit": None})}))

    assert (rest.computed, rest.succeeded, rest.exit_code) == (42, 46, 0)
    rows = sorted(results_of(limited, rest).values(), key=lambda row: row["finished_at"])
    late = [row["score"] or 0.0 for row in rows if row["request_id"] not in best]
    assert sum(late[:12]) / 12 > sum(late[-12:]) / 12 + 21  # 29.5 and 0.75 in order; few batches are done at once
    assert "__rank__" not in rows[0]


@pytest.mark.long
def test_engine_hours_that_are_spent_stop_a_run_and_what_is_in_flight_is_committed(make_config: MakeConfig) -> None:
    config = make_config(requests_table(60), placement__batch_size=2, budget__max_gpu_hours=3 / 3600)
    engine_id = make_plan(config).engine_ids["default"]

    stopped = run(config, load_engines=FakeEngineLoader(engine_id, seconds=1.0))

    committed = len(Journal(Store(config.output)).outcomes().keys)
    assert (stopped.reason, stopped.exit_code) == ("max_gpu_hours", 4)
    assert stopped.gpu_hours >= 3 / 3600 - 1e-6  # rounded
    assert 0 < stopped.computed == committed < 60
    assert stopped.left == 60 - committed
    assert len(list(Path(config.output, "animations").rglob("*.mp4"))) == committed


@pytest.mark.long
def test_columns_of_every_type_are_in_the_results_as_they_were(make_config: MakeConfig) -> None:
    listed = [pa.list_(one) for one in LEAVES] + [pa.struct([("x", one)]) for one in LEAVES]
    own = {f"c{number}": pa.nulls(3, one) for number, one in enumerate([*LEAVES, *listed])}
    own |= {f"e{number}": extension_column(one, 3) for number, one in enumerate(EXTENSIONS)}
    own["views"] = pa.array([["a"], None, ["b", None]]).cast(pa.list_(pa.string_view()))
    own["lists"] = pa.array([["a"], None, ["b", None]], pa.list_view(pa.string()))
    table = requests_table(3, num_frames=[2] * 3, **own)
    config = make_config(table)

    summary = run(config)

    results = pq.read_table(f"{config.output}/results/{summary.run_id}").sort_by("request_id")
    assert results["status"].to_pylist() == ["succeeded"] * 3
    for name in own:
        read, written = plain_column(results[name]), plain_column(table[name])
        assert (written if written.type == read.type else written.cast(read.type)).equals(read), table[name].type
    assert [results[f"e{number}"].type for number in range(len(EXTENSIONS))] == list(EXTENSIONS)


@pytest.mark.long
def test_empty_objects_of_json_lines_are_in_the_results(make_config: MakeConfig) -> None:
    lines = [{"request_id": "a", "image": "images/0.png", "prompt": "p", "meta": value} for value in ({}, {"a": {}})]
    config = make_config()
    Path(config.manifest, "requests.parquet").unlink()
    for number, line in enumerate(lines):
        line["request_id"] = str(number)
    Path(config.manifest, "a.jsonl").write_text("\n".join(map(json.dumps, lines)))

    rows = results_of(config, run(config))

    assert {name: row["meta"] for name, row in rows.items()} == {"0": "{}", "1": '{"a": {}}'}
