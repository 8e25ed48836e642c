"""Ray actor that holds the attempt tracker, and the handle through which workers and the driver call it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pia_batch.pipeline.attempts import AttemptTracker, EngineActivity, ExitCause, SoloAttempt
from pia_batch.schema.columns import Row


class RemoteAttemptControl:
    """`attempts.AttemptControl` by remote calls to the tracker's actor, plus the methods that the driver calls."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def start(self, worker: str) -> int:
        """Call `AttemptTracker.start`."""
        number: int = ray.get(self.tracker.start.remote(worker))
        return number

    def ready(self, worker: str, seconds: float) -> None:
        """Call `AttemptTracker.ready`."""
        ray.get(self.tracker.ready.remote(worker, seconds))

    def engine_summary(self) -> dict[str, Any]:
        """Call `AttemptTracker.engine_summary`."""
        summary: dict[str, Any] = ray.get(self.tracker.engine_summary.remote())
        return summary

    def heartbeat(self, engine: str, seconds: float, generating_seconds: float | None = None) -> None:
        """Call `AttemptTracker.heartbeat` without waiting for it."""
        self.tracker.heartbeat.remote(engine, seconds, generating_seconds)

    def activity(self) -> EngineActivity:
        """Call `AttemptTracker.activity`."""
        activity: EngineActivity = ray.get(self.tracker.activity.remote())
        return activity

    def begin(self, keys: list[str]) -> list[int] | None:
        """Call `AttemptTracker.begin`."""
        attempts: list[int] | None = ray.get(self.tracker.begin.remote(keys))
        return attempts

    def begin_alone(self, key: str) -> SoloAttempt | None:
        """Call `AttemptTracker.begin_alone`."""
        solo: SoloAttempt | None = ray.get(self.tracker.begin_alone.remote(key))
        return solo

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        """Call `AttemptTracker.give_up`; wait at most 5 seconds, as the process is about to end."""
        ray.get(self.tracker.give_up.remote(keys, cause), timeout=5)

    def end(self, outcomes: list[Row]) -> None:
        """Call `AttemptTracker.end`."""
        ray.get(self.tracker.end.remote(outcomes))

    def stop(self) -> None:
        """Call `AttemptTracker.stop`."""
        ray.get(self.tracker.stop.remote())


def start_attempt_tracker(max_attempts: int, *, returns_outcomes: bool = True) -> RemoteAttemptControl:
    """Start the run's attempt tracker in a process on the driver's node, if that node has room for it.

    The process ends with the run, once no copy of the returned handle exists any more.

    Args:
        max_attempts: Maximum number of attempts per request, as `limits.max_attempts`.
        returns_outcomes: Hand out the outcome of a committed request that comes again.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(AttemptTracker)
    return RemoteAttemptControl(actor.remote(max_attempts, returns_outcomes=returns_outcomes))
