"""Monitor: consumes the dataset, polls progress and stops on limits.

Knows the chain as an iterator, and the attempt tracker of its engines; nothing of Ray Data.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from pia_batch.config import PlacementConfig, RunConfig
from pia_batch.driver.budget import Budget, LimitReached
from pia_batch.driver.progress import Progress
from pia_batch.errors import InterruptedRunError, LeaseHeldError
from pia_batch.journal.lease import Lease
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.attempts import EngineActivity

log = logging.getLogger(__name__)

_POLL_S, _MIN_POLL_S = 0.5, 0.25
"""Seconds between two polls of the tracker: the first, or sooner where the chain moves, but at least the second."""

_IDLE_CHECK_S = 30.0
"""Seconds without an outcome after which the run checks whether it has any engines."""


class RunAttempts(Protocol):
    """Attempt tracker as the driver calls it: methods of `attempts_actor.RemoteAttemptControl`."""

    def stop(self) -> None:
        """Refuse every attempt from now on."""

    def activity(self) -> EngineActivity:
        """Return the totals over all engines."""


@dataclass(frozen=True)
class RunControls:
    """Progress callback and stop conditions of a run that generates.

    Attributes:
        config: Config of the run.
        progress: Progress of the run; the monitor updates it.
        on_progress: Called at every poll.
        stop: Event that a signal, or the caller, sets to stop the run.
        lease: Lease of the output; a lost lease stops the run.
        budget: Limits of the run.
        failed_before: Number of requests that had failed before this run and are not tried again.
    """

    config: RunConfig
    progress: Progress
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    lease: Lease
    budget: Budget
    failed_before: int

    @property
    def stop_requested(self) -> bool:
        """True if a signal, the caller or another run wants this run to stop."""
        return self.stop.is_set() or self.lease.lost.is_set()

    def with_observer(self, observe: Callable[[Progress], None]) -> RunControls:
        """Return the same controls with one more function that is called at every poll, before the others."""

        def on_progress(progress: Progress) -> None:
            observe(progress)
            self.on_progress(progress)

        return replace(self, on_progress=on_progress)

    def limit_reached(self) -> LimitReached | None:
        """Return the limit that ends the run now, or None."""
        activity = self.progress.activity
        return self.budget.reached(
            self.failed_before + self.progress.failed, 0.0 if activity is None else activity.engine_seconds
        )


def consume(
    chain: Iterable[object], tracker: RunAttempts, resources: Callable[[], Mapping[str, float]], controls: RunControls
) -> LimitReached | None:
    """Consume a chain to its end, or until the controls stop it. Counted requests are committed.

    Args:
        chain: Iterator over the chain's outcomes. Its items are ignored: the tracker counts each batch as soon as it is
            committed, the chain returns the batches of a task only after the last of them.
        tracker: Attempt tracker of the run.
        resources: Function that returns the cluster's resources at this moment.
        controls: Progress callback and stop conditions.

    Returns:
        The limit that ended the run, or None if every selected request is processed.

    Raises:
        InterruptedRunError: The run was stopped from outside, by a store that went away, or by workers that all fail.
        LeaseHeldError: Another run has taken over.
    """
    health = _EngineHealth(controls.config, resources)
    consumer = _Consumer(chain)
    controls.on_progress(controls.progress)
    limit = None
    try:
        while not controls.stop_requested and limit is None:
            ended = consumer.wait()
            activity = tracker.activity()
            controls.progress.update(activity)
            controls.on_progress(controls.progress)
            health.check(activity)
            if ended:
                return None
            limit = controls.limit_reached()
        if limit is not None:
            log.info("run_stopping reason=%s", limit.reason)
        controls.progress.update(_drain(tracker, controls.config.limits.stop_grace_s))
        if limit is not None:
            return limit
    finally:
        consumer.enough.set()
    if controls.lease.lost.is_set():
        msg = f"another run has taken over {controls.config.output}"
        raise LeaseHeldError(msg)
    msg = "stopped; everything finished is committed. Start again to resume"
    raise InterruptedRunError(msg)


class _EngineHealth:
    """Check that ends a run whose workers fail request after request, or that gets no worker at all."""

    def __init__(
        self,
        config: RunConfig,
        resources: Callable[[], Mapping[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._max_crashes = config.placement, config.limits.max_crashes
        self._resources, self._clock = resources, clock
        self._ended = 0
        self._moved_at = self._checked_at = clock()

    def check(self, activity: EngineActivity) -> None:
        """Check the totals over all engines.

        Raises:
            InterruptedRunError: `limits.max_crashes` requests in a row failed because of their worker, or the run has
                waited for an engine longer than `placement.wait_s`.
        """
        outcomes = activity.outcomes
        if outcomes.worker_failures >= self._max_crashes:
            msg = (
                f"{outcomes.worker_failures} requests in a row failed because of their worker (limits.max_crashes). "
                f"Last error: {outcomes.last_worker_failure}. Check the workers' logs and devices. "
                "Everything finished is committed. Start again to continue, with --retry-failed to try these again"
            )
            raise InterruptedRunError(msg)
        now, ended = self._clock(), outcomes.succeeded + outcomes.failures.total()
        if ended != self._ended:
            self._ended, self._moved_at, self._checked_at = ended, now, now
        if now - self._checked_at < min(_IDLE_CHECK_S, self._place.wait_s):
            return
        self._checked_at = now
        if activity.in_flight:
            self._moved_at = now
            return
        waited_s, state = now - self._moved_at, _room(self._place, self._resources())
        log.warning("engines_awaited waited_s=%.0f: %s", waited_s, state)
        if waited_s > self._place.wait_s:
            msg = f"no engine could start within {waited_s:.0f} s (placement.wait_s): {state}. Start again to continue"
            raise InterruptedRunError(msg)


def _room(place: PlacementConfig, available: Mapping[str, float]) -> str:
    """Return what one engine needs, and what the cluster has, in words.

    Args:
        place: The run's placement.
        available: Sums over all nodes, with memory in bytes.
    """
    gpus, cpus, memory_mb = (available.get(name, 0) for name in ("GPU", "CPU", "memory"))
    memory_mb /= 2**20
    needed = f"{place.num_gpus:g} GPUs and {place.num_cpus:g} CPUs"
    text = f"one engine needs {needed}, and the cluster has {gpus:g} GPUs and {cpus:g} CPUs"
    if place.memory_mb is not None:
        text += f"; and {place.memory_mb} MiB of memory (placement.memory_mb), of {memory_mb:.0f} MiB"
    if gpus >= place.num_gpus and cpus >= place.num_cpus and memory_mb >= (place.memory_mb or 0):
        text += "; if one node has them, an engine is starting there: its worker's log says how far it is"
    return text


class _Consumer:
    """Thread that consumes a chain to its end, or until `enough` is set.

    Leaving the iterator earlier would end the engines at once.
    """

    def __init__(self, chain: Iterable[object]) -> None:
        self.enough = threading.Event()
        self._moved, self._ended = threading.Event(), False
        self._error: BaseException | None = None
        self._polled_at = time.monotonic()
        threading.Thread(target=self._consume, args=(chain,), name="chain", daemon=True).start()

    def wait(self) -> bool:
        """Wait for one poll interval, or less where the chain moves; return True once the chain has ended.

        Raises:
            BaseException: The error that ended the chain, as `_unwrapped` returns it.
        """
        self._moved.wait(_POLL_S)
        if not self._ended:
            time.sleep(max(0.0, self._polled_at + _MIN_POLL_S - time.monotonic()))
        self._polled_at = time.monotonic()
        self._moved.clear()
        if self._error is not None:
            raise unwrapped(self._error)
        return self._ended

    def _consume(self, chain: Iterable[object]) -> None:
        try:
            for _ in chain:
                self._moved.set()
                if self.enough.is_set():
                    return
        except BaseException as err:  # noqa: BLE001 - handed to the thread that runs the run
            self._error = err
        self._ended = True
        self._moved.set()


def _drain(
    tracker: RunAttempts,
    grace_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> EngineActivity:
    """Refuse new attempts, wait until those in flight are committed, and return the totals over all engines then."""
    tracker.stop()
    deadline = clock() + grace_s
    while (activity := tracker.activity()).in_flight:
        left_s = deadline - clock()
        if left_s <= 0:
            log.warning(
                "requests_abandoned count=%d: not finished within %g s (limits.stop_grace_s); the next start generates "
                "them again",
                activity.in_flight,
                grace_s,
            )
            break
        log.info("run_stopping requests_in_flight=%d", activity.in_flight)
        sleep(min(0.3, left_s))
    return activity


def unwrapped(err: BaseException) -> BaseException:
    """Return the exception that a worker raised, without the wrappers that Ray puts around it."""
    own = worker_errors.own_cause(err)
    if own is None:
        return worker_errors.explain_loss(err)
    return worker_errors.interruption_by(own) or type(own)(worker_errors.own_message(own))
