"""A chain that runs, without Ray: outcomes are an iterator, and the ledger is at hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from fakes import FakeControl

from pia_batch.budget import Budget
from pia_batch.config import RunConfig
from pia_batch.drawing import Watch, draw
from pia_batch.errors import InterruptedRunError, LeaseHeldError, StorageError
from pia_batch.lease import Lease
from pia_batch.progress import Progress
from pia_batch.storage import Store
from pia_batch.worker import OUTCOME


def outcomes(*statuses: str) -> pa.Table:
    kinds = {"failed": "non_finite", "crashed": "worker_crash"}
    rows = [
        {"key": "k", "status": "failed" if status in kinds else status, "error_kind": kinds.get(status), "error": "why"}
        for status in statuses
    ]
    return pa.Table.from_pylist(rows, OUTCOME)


class Chain:
    """Gives what is put, until `end`, or an error. Knows that it was left."""

    def __init__(self) -> None:
        self.items: queue.Queue[pa.Table | Exception | None] = queue.Queue()

    def __iter__(self) -> Iterator[pa.Table]:
        while (item := self.items.get(timeout=60)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def put(self, *items: pa.Table | Exception | None) -> Chain:
        for item in items:
            self.items.put(item)
        return self


class Drawing:
    """One call of `draw`, and everything around it."""

    def __init__(self, store: Store, failed_before: int = 0, **settings: Any) -> None:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        self.config = RunConfig.load(None, {"manifest": "m", "output": store.uri, **dotted})
        self.chain, self.control, self.stop = Chain(), FakeControl(), threading.Event()
        self.lease = Lease(store, "mine", 60)
        self.progress = Progress(self.config, "mine", total=100, done_before=10)
        self.seen: list[int] = []
        self.failed_before = failed_before

    def __call__(self) -> Any:
        watch = Watch(
            self.config,
            self.progress,
            lambda progress: self.seen.append(progress.done),
            self.stop,
            self.lease,
            Budget(self.config),
            self.failed_before,
        )
        return draw(self.chain, self.control, dict, watch)


def test_a_chain_is_pulled_to_its_end_and_counted(store: Store) -> None:
    drawing = Drawing(store)
    drawing.chain.put(outcomes("succeeded", "failed"), outcomes("succeeded"), None)

    assert drawing() is None
    assert (drawing.progress.succeeded, drawing.progress.failed, drawing.progress.computed) == (2, 1, 3)
    assert drawing.seen == [10, 12, 13]


def test_failures_beyond_what_is_tolerated_stop_it_and_what_is_in_flight_is_counted(store: Store) -> None:
    drawing = Drawing(store, failed_before=1, limits__max_failed=2)
    drawing.control.begin(["in flight"])
    drawing.chain.put(outcomes("succeeded"), outcomes("failed", "failed"))
    control_ended = threading.Timer(0.5, lambda: drawing.control.end([{"key": "in flight"}]))
    control_ended.start()
    drawing.chain.put(outcomes("succeeded", "interrupted"), None)  # comes while it stops

    reached = drawing()

    control_ended.join()
    assert (reached.why, reached.exit_code) == ("max_failed", 3)
    assert (drawing.progress.succeeded, drawing.progress.failed) == (2, 2)
    assert drawing.control.begin(["another"]) is None  # the ledger lets nothing begin
    assert drawing.control.in_flight() == 0


def test_gpu_hours_stop_it(store: Store) -> None:
    drawing = Drawing(store, budget__max_gpu_hours=1)
    drawing.control.alive("engine", 3500)
    drawing.chain.put(outcomes("succeeded"))
    later = threading.Timer(0.3, lambda: drawing.control.alive("engine", 3601))
    later.start()

    reached = drawing()

    later.join()
    drawing.chain.put(None)
    assert reached.why == "max_gpu_hours"


def test_what_stops_from_outside_is_an_error(store: Store) -> None:
    asked, lost = Drawing(store), Drawing(store)
    asked.stop.set()
    lost.lease.lost.set()

    with pytest.raises(InterruptedRunError, match="Start again to resume"):
        asked()
    with pytest.raises(LeaseHeldError, match="another run has taken over"):
        lost()
    asked.chain.put(None)
    lost.chain.put(None)


def test_an_error_of_a_worker_comes_out_of_its_wrappers(store: Store) -> None:
    class TaskError(Exception):
        """As Ray wraps what a task raised."""

        cause = StorageError("the bucket is gone")

    away, bug = Drawing(store), Drawing(store)
    away.chain.put(RuntimeError().with_traceback(None), None)
    with pytest.raises(RuntimeError):
        away()
    bug.chain.put(TaskError())
    with pytest.raises(InterruptedRunError, match="the bucket is gone; what was finished is committed"):
        bug()


def test_crash_after_crash_stops_it_and_a_success_between_does_not(store: Store) -> None:
    mixed = Drawing(store, limits__max_crashes=3)
    mixed.chain.put(outcomes("crashed", "crashed", "succeeded", "crashed", "crashed"), None)
    assert mixed() is None

    doomed = Drawing(store, limits__max_crashes=3)
    doomed.chain.put(outcomes("crashed", "crashed"), outcomes("crashed"), None)
    with pytest.raises(InterruptedRunError, match=r"3 requests in a row .* because why"):
        doomed()


def test_a_run_without_engines_says_what_one_needs(store: Store) -> None:
    drawing = Drawing(store, placement__wait_s=0.1, placement__memory_mb=512)

    with pytest.raises(InterruptedRunError, match=r"needs 0 GPUs and 1 CPUs.*; and 512 MiB of memory .*there are 0\."):
        drawing()
    drawing.chain.put(None)
