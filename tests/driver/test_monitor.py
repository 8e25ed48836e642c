"""A run that is monitored, without Ray: the chain is an iterator, and the tracker is in this process."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeControl
from ray.exceptions import RayTaskError

from pia_batch.config import PlacementConfig, RunConfig
from pia_batch.driver import monitor
from pia_batch.driver.budget import Budget
from pia_batch.driver.monitor import RunControls, consume
from pia_batch.driver.progress import Progress
from pia_batch.errors import ConfigError, InterruptedRunError, LeaseHeldError, StorageError
from pia_batch.journal.lease import Lease
from pia_batch.storage.object_store import Store

_KINDS = {"failed": "non_finite", "crashed": "worker_crash"}
_KEYS = map(str, itertools.count())


class Chain:
    """Ends requests in the tracker as `animate.Animate` does, and goes on, until `end`, or an error."""

    def __init__(self, control: FakeControl) -> None:
        self._control = control
        self._items: queue.Queue[tuple[str, ...] | Exception | None] = queue.Queue()

    def __iter__(self) -> Iterator[object]:
        while (item := self._items.get(timeout=60)) is not None:
            if isinstance(item, Exception):
                raise item
            self.commit(*item)
            yield item

    def commit(self, *statuses: str) -> None:
        """End requests whose batch the chain has not returned yet."""
        for status in statuses:
            kind = _KINDS.get(status)
            outcome = {"key": next(_KEYS), "status": "failed" if kind else status, "error_kind": kind, "error": "why"}
            self._control.end([outcome | {"animation_uri": None if kind else "x.mp4"}])

    def put(self, *items: tuple[str, ...] | Exception | None) -> Chain:
        for item in items:
            self._items.put(item)
        return self


class Monitored:
    """One call of `monitor.consume`, with everything it needs."""

    def __init__(self, store: Store, failed_before: int = 0, **settings: Any) -> None:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        self.config = RunConfig.load(None, {"manifest": "m", "output": store.uri, **dotted})
        self.control, self.stop = FakeControl(), threading.Event()
        self.chain = Chain(self.control)
        self.lease = Lease(store, "mine", 60)
        self.progress = Progress(self.config, "mine", total=100, done_before=10)
        self.seen: list[int] = []
        self.failed_before = failed_before

    def __call__(self) -> Any:
        return consume(self.chain, self.control, dict, self.controls(self.see))

    def controls(self, on_progress: Any) -> RunControls:
        budget = Budget(self.config)
        return RunControls(
            self.config, self.progress, on_progress, self.stop, self.lease, budget, failed_before=self.failed_before
        )

    def see(self, progress: Progress) -> None:
        self.seen.append(progress.done)


def test_a_chain_is_consumed_to_its_end_and_the_counts_of_its_tracker_are_reported(store: Store) -> None:
    monitored = Monitored(store)
    monitored.chain.put(("succeeded", "failed"), ("succeeded",), None)

    assert monitored() is None
    assert (monitored.progress.succeeded, monitored.progress.failed, monitored.progress.computed) == (2, 1, 3)
    assert (monitored.seen[0], monitored.seen[-1]) == (10, 13)


def test_what_is_committed_is_counted_before_the_chain_returns_it(store: Store) -> None:
    monitored = Monitored(store)
    monitored.chain.commit("succeeded", "succeeded")

    def see(progress: Progress) -> None:
        if progress.done == 12:
            monitored.chain.put(None)

    assert consume(monitored.chain, monitored.control, dict, monitored.controls(see)) is None
    assert monitored.progress.succeeded == 2


def test_more_failures_than_allowed_stop_it_and_what_is_in_flight_is_counted(store: Store) -> None:
    monitored = Monitored(store, failed_before=1, limits__max_failed=2)
    monitored.control.begin(["in flight"])
    monitored.chain.put(("succeeded",), ("failed", "failed"))
    outcome = {"key": "in flight", "status": "succeeded", "error_kind": None, "animation_uri": "x.mp4"}
    ended = threading.Timer(0.5, lambda: monitored.control.end([outcome]))  # while it stops
    ended.start()

    reached = monitored()

    ended.join()
    monitored.chain.put(None)
    assert (reached.reason, reached.exit_code) == ("max_failed", 3)
    assert (monitored.progress.succeeded, monitored.progress.failed) == (2, 2)
    assert monitored.control.begin(["another"]) is None  # the tracker lets nothing begin
    assert monitored.control.in_flight() == 0


def test_gpu_hours_stop_it(store: Store) -> None:
    monitored = Monitored(store, budget__max_gpu_hours=1)
    monitored.control.heartbeat("engine", 3500)
    monitored.chain.put(("succeeded",))
    later = threading.Timer(0.3, lambda: monitored.control.heartbeat("engine", 3601))
    later.start()

    reached = monitored()

    later.join()
    monitored.chain.put(None)
    assert reached.reason == "max_gpu_hours"


def test_what_stops_from_outside_is_an_error_and_what_was_committed_is_counted(store: Store) -> None:
    asked, lost = Monitored(store), Monitored(store)
    asked.stop.set()
    lost.lease.lost.set()
    for each in (asked, lost):
        each.chain.commit("succeeded")

    with pytest.raises(InterruptedRunError, match="Start again to resume"):
        asked()
    with pytest.raises(LeaseHeldError, match="another run has taken over"):
        lost()
    for each in (asked, lost):
        each.chain.put(None)
        assert each.progress.succeeded == 1


def test_an_error_of_a_worker_comes_out_of_its_wrappers(store: Store) -> None:
    class TaskError(Exception):
        """Wrapper of a task's exception, like Ray's."""

        cause = StorageError("the bucket is gone")

    away, bug = Monitored(store), Monitored(store)
    away.chain.put(RuntimeError().with_traceback(None), None)
    with pytest.raises(RuntimeError):
        away()
    bug.chain.put(TaskError())
    with pytest.raises(InterruptedRunError, match="the bucket is gone; everything finished is committed"):
        bug()


def test_an_error_of_ours_comes_out_of_rays_wrappers_as_its_own_one_line(store: Store) -> None:
    monitored = Monitored(store)
    notes = "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, backoff"
    cause = ConfigError(f"model.loras: no layer fits\n{notes}")  # as Ray Data appends it
    cause.__cause__ = StorageError("not this one")
    inner = RayTaskError("Animate()", "Traceback\n" * 70, cause).as_instanceof_cause()
    outer = RayTaskError("map_batches()", "Traceback\n" * 70, inner)
    assert isinstance(inner, ConfigError)  # as Ray makes it

    monitored.chain.put(outer)

    with pytest.raises(ConfigError) as raised:
        monitored()
    assert str(raised.value) == "model.loras: no layer fits"


def test_crash_after_crash_stops_it_and_a_success_between_does_not(store: Store) -> None:
    mixed = Monitored(store, limits__max_crashes=3)
    mixed.chain.put(("crashed", "crashed", "succeeded", "crashed", "crashed"), None)
    assert mixed() is None

    doomed = Monitored(store, limits__max_crashes=3)
    doomed.chain.put(("crashed", "crashed"), ("crashed",), None)
    with pytest.raises(InterruptedRunError, match=r"3 requests in a row .* Last error: why"):
        doomed()


@pytest.mark.parametrize(
    ("available", "starts"),
    [
        ({"CPU": 1, "GPU": 1, "memory": 512 * 2**20}, True),
        ({"CPU": 8, "GPU": 8, "memory": 2**40}, True),
        ({"CPU": 0.9, "GPU": 1, "memory": 2**40}, False),
        ({"CPU": 1, "memory": 2**40}, False),
        ({"CPU": 1, "GPU": 1}, False),
        ({}, False),
    ],
)
def test_an_engine_for_which_there_is_room_is_said_to_be_starting(available: dict[str, float], starts: bool) -> None:
    place = PlacementConfig(num_gpus=1, num_cpus=1, memory_mb=512)

    text = monitor._room(place, available)

    assert text.startswith(
        f"one engine needs 1 GPUs and 1 CPUs, and the cluster has {available.get('GPU', 0):g} GPUs and "
    )
    assert ("an engine is starting there" in text) == starts


def test_a_run_without_engines_says_what_one_needs(store: Store) -> None:
    monitored = Monitored(store, placement__wait_s=0.1, placement__memory_mb=512)

    with pytest.raises(InterruptedRunError, match=r"needs 0 GPUs and 1 CPUs.*; and 512 MiB of memory .* of 0 MiB\."):
        monitored()
    monitored.chain.put(None)
