"""Progress of a run: counts, paces, and the snapshot."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.config import RunConfig
from pia_batch.driver.progress import RECENT_CLIPS, RECENT_S, Progress
from pia_batch.pipeline.attempts import HEARTBEAT_S, HEARTBEAT_TIMEOUT_S, AttemptTracker, EngineActivity, OutcomeCounts
from pia_batch.schema.run_record import ProgressSnapshot


@dataclass
class Run:
    """Run with a clock of its own and one tracker."""

    total: int = 1000
    before: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    time: float = 5000.0

    def __post_init__(self) -> None:
        dotted = {"manifest": "m", "output": "o", **self.settings}
        self.tracker = AttemptTracker(3, now=lambda: self.time)
        self.progress = Progress(RunConfig.load(None, dotted), "night", self.total, self.before, now=lambda: self.time)
        self.keys = map(str, itertools.count())

    def advance(self, seconds: float, clips_per_second: float = 0.0, busy: float = 1.0) -> ProgressSnapshot:
        """Let time pass, one heartbeat of one engine after the other."""
        begun, generating_s = self.time, 0.0
        clips = self.progress.succeeded
        while self.time < begun + seconds:
            self.time += HEARTBEAT_S
            uptime = self.time - 5000.0
            generating_s = self.tracker.activity().generating_seconds + HEARTBEAT_S * busy
            self.tracker.heartbeat("one", uptime, generating_s)
            now = clips + int((self.time - begun) * clips_per_second)
            self.end(now - self.progress.succeeded)
            self.progress.update(self.tracker.activity())
        return self.progress.snapshot()

    def end(self, succeeded: int, failures: Mapping[str, int] | None = None, uri: str | None = None) -> None:
        """Report requests that have ended to the tracker."""
        kinds = [None] * succeeded + list(Counter(failures or {}).elements())
        named = [
            {"key": next(self.keys), "status": "failed" if kind else "succeeded", "error_kind": kind, "error": kind}
            for kind in kinds
        ]
        self.tracker.end([outcome | {"animation_uri": uri} for outcome in named])


def test_before_the_first_result_nothing_is_known_of_the_pace() -> None:
    run = Run(total=30, before=10)

    snapshot = run.progress.snapshot()

    assert (snapshot.done, snapshot.total, snapshot.seconds_left, snapshot.recent_clips_per_second) == (
        10,
        30,
        None,
        None,
    )
    assert (snapshot.engines, snapshot.busy, snapshot.gpu_hours, snapshot.cost, snapshot.newest) == (
        None,
        None,
        None,
        None,
        None,
    )


def test_the_time_left_is_that_of_the_selected_requests() -> None:
    run = Run(total=30, before=10)
    run.end(9, {"non_finite": 1}, "s3://bucket/x.mp4")
    run.progress.update(run.tracker.activity())
    run.time += 100

    snapshot = run.progress.snapshot()

    assert (snapshot.done, snapshot.succeeded, snapshot.failed, snapshot.failures) == (20, 9, 1, {"non_finite": 1})
    assert (snapshot.seconds_left, snapshot.clips_per_second, snapshot.newest) == (100, 0.09, "s3://bucket/x.mp4")


def test_a_start_that_took_long_is_in_the_pace_of_all_and_not_in_the_recent_one() -> None:
    run = Run(total=10_000)
    run.advance(300, busy=0.0)
    snapshot = run.advance(300, clips_per_second=4.0)

    assert snapshot.clips_per_second == pytest.approx(2.0, rel=0.05)
    assert snapshot.recent_clips_per_second == pytest.approx(4.0, rel=0.05)
    assert snapshot.seconds_left == pytest.approx((10_000 - snapshot.done) / 4.0, rel=0.1)
    assert snapshot.busy == pytest.approx(0.5, rel=0.05)
    assert snapshot.recent_busy == pytest.approx(1.0, rel=0.05)


def test_a_run_that_is_over_between_two_marks_was_busy() -> None:
    run = Run(total=3)
    for seconds, generating_s in ((0.5, None), (1.5, 0.9)):
        run.time = 5000.0 + seconds
        run.tracker.heartbeat("one", seconds, generating_s)
        run.progress.update(run.tracker.activity())

    snapshot = run.progress.snapshot()

    assert (snapshot.busy, snapshot.recent_busy) == (0.6, 0.9)


def test_the_pace_of_a_slow_device_covers_enough_clips() -> None:
    run = Run()
    snapshot = run.advance(3600, clips_per_second=1 / 90)

    assert snapshot.recent_clips_per_second == pytest.approx(1 / 90, rel=0.15)


def test_a_device_that_got_stuck_is_slower_every_minute() -> None:
    run = Run(total=100_000)
    before = run.advance(300, clips_per_second=2.0).recent_clips_per_second or 0.0
    paces = [run.advance(RECENT_S).recent_clips_per_second or 0.0 for _ in range(5)]

    assert paces == sorted(paces, reverse=True)
    assert paces[-1] < before / 4


def test_the_clock_stops_when_generation_ends() -> None:
    run = Run()
    run.advance(100, clips_per_second=1.0)
    run.progress.enter("publishing")
    at_end = run.progress.snapshot()
    run.time += 3600
    run.progress.enter("finished")

    later = run.progress.snapshot()
    assert (later.phase, later.seconds, later.clips_per_second) == ("finished", at_end.seconds, at_end.clips_per_second)


@pytest.mark.parametrize(("gpus", "unit", "hours"), [(0, "engine hours", 2.0), (0.5, "GPU hours", 1.0)])
def test_the_cost_of_engines_has_their_unit(gpus: float, unit: str, hours: float) -> None:
    run = Run(settings={"placement.num_gpus": gpus, "budget.price_per_hour": 3.0})
    run.progress.update(
        EngineActivity(engines=2, starting=1, engine_seconds=7200.0, reported_seconds=7000.0, generating_seconds=3500.0)
    )

    snapshot = run.progress.snapshot()

    assert (snapshot.unit, snapshot.gpu_hours, snapshot.cost) == (unit, hours, 3 * hours)
    assert (snapshot.engines, snapshot.engines_starting, snapshot.busy) == (2, 1, 0.5)


def test_what_a_tracker_counted_stays_when_its_process_dies() -> None:
    run = Run()
    run.end(3, {"timeout": 2}, "s3://bucket/x.mp4")
    run.progress.update(run.tracker.activity())
    run.tracker = AttemptTracker(3, now=lambda: run.time)

    run.progress.update(run.tracker.activity())
    assert (run.progress.succeeded, run.progress.failures) == (3, {"timeout": 2})
    assert run.progress.newest == "s3://bucket/x.mp4"
    run.end(1, {"timeout": 1}, "s3://bucket/y.mp4")
    run.progress.update(run.tracker.activity())

    assert (run.progress.succeeded, run.progress.failures) == (4, {"timeout": 3})
    assert run.progress.newest == "s3://bucket/y.mp4"


def test_marks_are_as_far_apart_as_heartbeats() -> None:
    run = Run()
    for _ in range(100):
        run.progress.update(run.tracker.activity())
        run.time += HEARTBEAT_S / 10

    assert len(run.progress._marks) == 10


def test_the_tracker_counts_live_loading_and_generating_engines() -> None:
    now = 0.0
    tracker = AttemptTracker(3, now=lambda: now)
    nothing = tracker.activity()
    assert nothing == EngineActivity(outcomes=OutcomeCounts(), tracker_id=nothing.tracker_id)
    tracker.heartbeat("dies", 100.0, 60.0)
    now += HEARTBEAT_TIMEOUT_S
    tracker.heartbeat("loads", 10.0, None)
    tracker.heartbeat("generates", 30.0, 20.0)
    tracker.heartbeat("generates", 29.0, 5.0)  # overtaken on its way

    activity = tracker.activity()

    assert (activity.engines, activity.starting, activity.reported_seconds, activity.generating_seconds) == (
        2,
        1,
        140.0,
        80.0,
    )
    assert activity.engine_seconds == tracker.engine_seconds()


STEPS = st.lists(
    st.tuples(
        st.floats(0, 500),  # seconds that pass
        st.integers(0, 30),  # requests that succeed
        st.dictionaries(st.sampled_from(["non_finite", "timeout", "image_unavailable"]), st.integers(1, 9)),
        st.booleans(),  # True if the tracker is polled
    ),
    max_size=60,
)


@given(STEPS, st.integers(0, 2000), st.integers(0, 50))
def test_whatever_comes_the_figures_add_up(
    steps: list[tuple[float, int, dict[str, int], bool]], total: int, before: int
) -> None:
    run, ended = Run(total=before + total, before=before), 0
    for seconds, succeeded, failures, polled in steps:
        run.time += seconds
        run.end(succeeded, failures)
        ended += succeeded + sum(failures.values())
        uptime = run.time - 5000.0
        run.tracker.heartbeat("one", uptime, uptime / 2)
        if polled:
            run.progress.update(run.tracker.activity())

        snapshot = run.progress.snapshot()
        assert snapshot.done == before + snapshot.succeeded + snapshot.failed <= before + ended
        assert not polled or snapshot.done == before + ended
        assert snapshot.failed == sum(snapshot.failures.values())
        for share in (snapshot.busy, snapshot.recent_busy):
            assert share is None or 0 <= share <= 1
        assert snapshot.clips_per_second >= 0
        assert (snapshot.recent_clips_per_second or 0.0) >= 0
        assert (snapshot.seconds_left or 0.0) >= 0
        assert ProgressSnapshot.model_validate(json.loads(snapshot.model_dump_json())) == snapshot
    assert len(run.progress._marks) <= len(steps) + 1


def test_few_clips_are_not_enough_for_a_recent_pace() -> None:
    run = Run()
    run.advance(RECENT_S * 10, clips_per_second=1.0)
    first = run.progress._marks[0]

    assert run.time - first.at == pytest.approx(RECENT_S, abs=HEARTBEAT_S)
    assert run.progress.computed - first.computed >= RECENT_CLIPS
