"""Poison rows fail alone, and their neighbours succeed."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest
from animated import Died, Poisoned, committed, fetched, stored, validated
from fakes import FakeControl, animate_stage
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import DeviceMemoryError, EngineError, WorkerCrashError
from pia_batch.journal.log import Journal
from pia_batch.pipeline.animate import Animate, WorkerProcess
from pia_batch.pipeline.isolation import Isolation
from pia_batch.schema.columns import Row
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def run_to_the_end(config: RunConfig, control: FakeControl | None = None, workers: int = 20) -> pa.Table:
    """Give one batch to worker after worker until one survives it, as Ray does."""
    control, requests = control or FakeControl(), fetched(config)
    for _ in range(workers):
        with contextlib.suppress(Died):
            return animate_stage(config, Poisoned(), control)(requests)
    raise AssertionError("no worker survived")


@pytest.mark.parametrize(
    ("does", "kind", "attempts", "error"),
    [
        ("raises", "engine_error", 2, "the engine raised RuntimeError: weights are cursed"),
        ("hungers", "out_of_memory", 2, "the worker ran out of memory: MemoryError; lower its num_frames"),
        ("kills", "worker_crash", 4, "its worker died in each of 2 attempts to animate it alone"),
    ],
)
@pytest.mark.parametrize("where", [(0,), (3,), (1, 2)])
def test_poison_fails_alone_with_its_kind_and_its_neighbours_succeed(
    make_config: MakeConfig, does: str, kind: str, attempts: int, error: str, where: tuple[int, ...]
) -> None:
    prompts = [does if k in where else "fine" for k in range(5)]
    config = make_config(requests_table(5, prompt=prompts, format=["gif"] * 5))

    outcomes = run_to_the_end(config)

    rows = committed(config)
    assert outcomes["status"].to_pylist() == [rows[f"r{k:03d}"]["status"] for k in range(5)]
    for k in range(5):
        row = rows[f"r{k:03d}"]
        if k in where:
            assert (row["status"], row["error_kind"], row["attempts"]) == ("failed", kind, attempts)
            assert row["error"].startswith(error)
        else:
            assert row["status"] == "succeeded"
    assert len(stored(config)) == 5 - len(where)


def test_what_was_committed_before_a_worker_died_is_not_generated_again(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "fine", "kills"], format=["gif"] * 3))

    run_to_the_end(config)

    record = Journal(Store(config.output))
    fragments = record.read(record.fragments())
    assert sorted(name for table in fragments for name in table["request_id"].to_pylist()) == ["r000", "r001", "r002"]


def test_a_worker_that_hangs_ends_itself_and_the_request_is_identified(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "hangs", "fine"], format=["gif"] * 3), limits__timeout_s=0.2)
    control, requests, deaths = FakeControl(), fetched(config), threading.Event()
    for _ in range(6):
        deaths.clear()
        commits = _MortalCommits(Journal(Store(config.output)), deaths)
        mortal = animate_stage(config, Poisoned(), control, commits=commits, process=WorkerProcess(exit=deaths.set))
        worker = _Mortal(mortal, requests)
        worker.start()
        worker.join()
        if not deaths.is_set():
            break

    rows = committed(config)
    assert [rows[name]["error_kind"] for name in sorted(rows)] == [None, "timeout", None]
    assert "limits.timeout_s" in rows["r001"]["error"]


@dataclass
class _MortalCommits:
    """A commit log that takes nothing more once its worker has died, as a dead process writes no more."""

    journal: Journal
    dead: threading.Event

    def append(self, results: pa.Table) -> None:
        if self.dead.is_set():
            raise Died
        self.journal.append(results)


class _Mortal(threading.Thread):
    """A worker that may die in its call."""

    def __init__(self, animator: Animate, requests: pa.Table) -> None:
        super().__init__(daemon=True)
        self.animator, self.requests = animator, requests

    def run(self) -> None:
        with contextlib.suppress(Died):
            self.animator(self.requests)


@dataclass
class OneByOne:
    """A guard whose engine fails with `errors`, by request id."""

    errors: dict[str, Exception]
    generated: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)

    def generate(self, rows: list[Row]) -> list[Any]:
        (row,) = rows
        self.generated.append(row["request_id"])
        if row["request_id"] in self.errors:
            raise self.errors[row["request_id"]]
        return ["a clip"]

    def exit_if_broken(self, rows: list[Row]) -> None:
        self.blamed += [row["request_id"] for row in rows]


def test_each_request_gets_its_own_turn_error_and_outcome(make_config: MakeConfig) -> None:
    requests = validated(make_config(requests_table(5)))
    rows = requests.to_pylist()
    keys = [row["key"] for row in rows]
    control, finished = FakeControl(), []
    control.begin(keys)
    control.begin_alone(keys[3])
    control.end([{"key": keys[3], "status": "succeeded", "animation_uri": "file:///three.gif"}])
    for _ in range(2):
        control.begin_alone(keys[4])  # and its worker dies, twice

    def finish(table: pa.Table, rows: list[Row], clips: list[Any], attempts: list[int]) -> list[Row]:
        finished.append((table["request_id"].to_pylist(), clips[0], attempts))
        return [{"key": row["key"], "status": "done"} for row in rows]

    guard = OneByOne({"r001": RuntimeError("cursed"), "r002": MemoryError()})
    outcomes = Isolation(control, guard, make_config(), finish).process(requests, rows)

    assert [outcome["key"] for outcome in outcomes] == keys
    assert outcomes[3]["animation_uri"] == "file:///three.gif"
    assert guard.generated == ["r000", "r001", "r002"]
    assert guard.blamed == ["r001"]  # a lack of memory says nothing about the device
    assert finished[0] == (["r000"], "a clip", [2])
    assert [(ids, type(clip), attempts) for ids, clip, attempts in finished[1:]] == [
        (["r001"], EngineError, [2]),
        (["r002"], DeviceMemoryError, [2]),
        (["r004"], WorkerCrashError, [4]),
    ]


def test_no_turn_begins_once_the_run_is_stopping(make_config: MakeConfig) -> None:
    requests = validated(make_config(requests_table(2)))
    control, guard = FakeControl(), OneByOne({})
    control.stop()

    outcomes = Isolation(control, guard, make_config(), lambda *_: []).process(requests, requests.to_pylist())

    assert [outcome["status"] for outcome in outcomes] == ["interrupted"] * 2
    assert guard.generated == []
