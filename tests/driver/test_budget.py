"""Limits on what a run may spend, and how what it spends is counted."""

from __future__ import annotations

import queue
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pia_batch.config import BudgetConfig, RunConfig
from pia_batch.driver import budget
from pia_batch.driver.budget import Budget
from pia_batch.pipeline.attempts import HEARTBEAT_S, AttemptTracker
from pia_batch.pipeline.heartbeat import Heartbeat

NOW = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)


def config(**settings: Any) -> RunConfig:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return RunConfig.load(None, {"manifest": "m", "output": "o", **dotted})


def test_without_limits_nothing_ends_a_run() -> None:
    assert Budget(config()).reached(10**6, 10.0**9) is None
    assert Budget(config()).seconds_left == float("inf")


@pytest.mark.parametrize(("limit", "failed", "ends"), [(0, 0, False), (0, 1, True), (3, 3, False), (3, 4, True)])
def test_one_failure_more_than_allowed_ends_with_3(limit: int, failed: int, ends: bool) -> None:
    reached = Budget(config(limits__max_failed=limit)).reached(failed)

    assert (reached is not None) == ends
    if reached is not None:
        assert (reached.reason, reached.exit_code) == ("max_failed", 3)
        assert f"allows ({limit})" in reached.message


def test_a_deadline_ends_with_4_when_it_has_passed() -> None:
    clock = NOW
    limits = Budget(config(budget__deadline="06:00"), lambda: clock)
    assert limits.seconds_left == 3600
    clock += timedelta(minutes=59, seconds=59)
    assert limits.reached(0) is None
    clock += timedelta(seconds=1)

    reached = limits.reached(0)

    assert reached is not None
    assert (reached.reason, reached.exit_code) == ("deadline", 4)
    assert "2026-11-23T06:00 UTC" in reached.message
    assert limits.seconds_left == 0


@pytest.mark.parametrize(("num_gpus", "seconds"), [(0, 7200), (1, 7200), (0.25, 4 * 7200)])
def test_gpu_hours_are_those_of_engines_times_their_gpus(num_gpus: float, seconds: float) -> None:
    limits = Budget(config(budget__max_gpu_hours=2, placement__num_gpus=num_gpus))
    assert limits.reached(0, seconds - 1) is None

    reached = limits.reached(0, seconds)

    assert reached is not None
    assert (reached.reason, reached.exit_code) == ("max_gpu_hours", 4)
    assert ("2 GPU hours" if num_gpus else "2 engine hours") in reached.message


def test_what_one_date_has_spent_is_not_there_for_the_next() -> None:
    whole = BudgetConfig(limit=10, max_gpu_hours=2.0, sample=0.5)
    rest = budget.remaining(whole, 4, 0.5)

    assert rest is not None
    assert (rest.limit, rest.max_gpu_hours, rest.sample) == (6, 1.5, 0.5)
    assert budget.remaining(whole, 10, 0.5) is None
    assert budget.remaining(whole, 4, 2.5) is None
    assert budget.remaining(BudgetConfig(), 10**9, 10**9) == BudgetConfig()


def test_an_engine_reports_its_uptime_to_the_tracker() -> None:
    tracker = AttemptTracker(3)
    beats: queue.Queue[float] = queue.Queue()
    go_on: queue.Queue[None] = queue.Queue()

    def wait(_: float) -> None:
        beats.put(tracker.engine_seconds())
        go_on.get()

    Heartbeat(tracker, wait=wait)
    first = beats.get(timeout=20)
    go_on.put(None)
    second = beats.get(timeout=20)

    assert 0 <= first < second < 20


def test_an_engine_counts_until_its_next_heartbeat_could_arrive_and_once() -> None:
    now = 50.0
    tracker = AttemptTracker(3, now=lambda: now)
    assert tracker.engine_seconds() == 0

    tracker.heartbeat("one", 0.0)
    now += 0.5
    assert tracker.engine_seconds() == 0.5
    now += 3600
    assert tracker.engine_seconds() == HEARTBEAT_S

    tracker.heartbeat("another", 100.0)
    now += 1
    tracker.heartbeat("another", 90.0)  # overtaken on its way
    assert tracker.engine_seconds() == HEARTBEAT_S + 101


def test_a_heartbeat_ends_with_the_tracker() -> None:
    ended: queue.Queue[str] = queue.Queue()

    class GoneTracker:
        def heartbeat(self, engine: str, seconds: float, generating_seconds: float | None) -> None:
            ended.put(f"{engine} {seconds} {generating_seconds}")
            raise ConnectionError

    def wait(_: float) -> None:
        ended.put("waits")

    Heartbeat(GoneTracker(), wait=wait)

    assert ended.get(timeout=20) != "waits"
    with pytest.raises(queue.Empty):
        ended.get(timeout=0.1)
