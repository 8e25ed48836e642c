"""Ray actor that holds the attempt tracker, and the handle through which workers and the driver call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pia_batch.pipeline.attempts import AttemptTracker, EngineActivity, ExitCause, SoloAttempt
from pia_batch.schema.columns import Row


class RemoteAttemptControl:
    """`attempts.AttemptControl` by remote calls to the tracker's actor, plus the methods that the driver calls.

    Args:
        tracker: Handle of the actor.
        check_ray: Function of the driver that raises if Ray has ended. Its calls would then wait until Ray ends this
            process, without a message. A worker's copy has none.
    """

    def __init__(self, tracker: Any, check_ray: Callable[[], None] = lambda: None) -> None:
        self.tracker = tracker
        self._check_ray = check_ray

    def __reduce__(self) -> tuple[type[RemoteAttemptControl], tuple[Any]]:
        """Return what a worker's copy is made of."""
        return type(self), (self.tracker,)

    def _answer(self, reference: Any) -> Any:
        """Return the answer to a call of the driver, or raise if Ray ends meanwhile."""
        self._check_ray()
        while not ray.wait([reference], timeout=_CHECK_S)[0]:
            self._check_ray()
        return ray.get(reference)

    def start(self, worker: str) -> int:
        """Call `AttemptTracker.start`."""
        number: int = ray.get(self.tracker.start.remote(worker))
        return number

    def ready(self, worker: str, seconds: float) -> None:
        """Call `AttemptTracker.ready`."""
        ray.get(self.tracker.ready.remote(worker, seconds))

    def engine_summary(self) -> dict[str, Any]:
        """Call `AttemptTracker.engine_summary`."""
        summary: dict[str, Any] = self._answer(self.tracker.engine_summary.remote())
        return summary

    def heartbeat(self, engine: str, seconds: float, generating_seconds: float | None = None) -> None:
        """Call `AttemptTracker.heartbeat` without waiting for it."""
        self.tracker.heartbeat.remote(engine, seconds, generating_seconds)

    def activity(self) -> EngineActivity:
        """Call `AttemptTracker.activity`."""
        activity: EngineActivity = self._answer(self.tracker.activity.remote())
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
        self._answer(self.tracker.stop.remote())


_CHECK_S = 1.0
"""Seconds between two checks of Ray during a call. It ends the driver some 10 seconds after its own end."""


def start_attempt_tracker(
    max_attempts: int, *, returns_outcomes: bool = True, check_ray: Callable[[], None] = lambda: None
) -> RemoteAttemptControl:
    """Start the run's attempt tracker in a process on the driver's node, if that node has room for it.

    The process ends with the run, once no copy of the returned handle exists any more.

    Args:
        max_attempts: Maximum number of attempts per request, as `limits.max_attempts`.
        returns_outcomes: Hand out the outcome of a committed request that comes again.
        check_ray: Function that raises if Ray has ended.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(AttemptTracker)
    return RemoteAttemptControl(actor.remote(max_attempts, returns_outcomes=returns_outcomes), check_ray)
