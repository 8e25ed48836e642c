"""A chain that runs: it is pulled, its tracker is asked how far it is, and it is ended where it must be.

Knows the chain as an iterator, and the tracker of its engines; nothing of Ray Data.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from pia_batch.config import RunConfig
from pia_batch.driver.budget import Budget, Stopped
from pia_batch.driver.progress import Progress
from pia_batch.errors import InterruptedRunError, LeaseHeldError, PiaBatchError, StorageError
from pia_batch.journal.lease import Lease
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.attempts import EngineActivity

log = logging.getLogger(__name__)

_ASK_S, _LEAST_S = 0.5, 0.1
"""Seconds between two questions to the tracker: the first, or sooner where the chain moves, but not below the
second."""

_TELL_S = 30.0
"""Seconds without an outcome after which a run looks whether it has engines at all."""


class RunAttempts(Protocol):
    """What the driver asks of the run's tracker: methods of `attempts_actor.RemoteAttemptControl`."""

    def stop(self) -> None:
        """Let nothing begin any more."""

    def activity(self) -> EngineActivity:
        """What all engines have come to."""


@dataclass(frozen=True)
class Watch:
    """Who is told of a running chain, and who may end it."""

    config: RunConfig
    progress: Progress
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    lease: Lease
    budget: Budget
    failed_before: int
    """Requests that have failed already and are not drawn again."""

    @property
    def must_stop(self) -> bool:
        """Whether somebody outside wants the run to end."""
        return self.stop.is_set() or self.lease.lost.is_set()

    def also(self, see: Callable[[Progress], None]) -> Watch:
        """The same, and `see` is told how far the run is, too."""

        def on_progress(progress: Progress) -> None:
            see(progress)
            self.on_progress(progress)

        return replace(self, on_progress=on_progress)

    def spent(self) -> Stopped | None:
        """The limit that ends the run now, if one does."""
        activity = self.progress.activity
        return self.budget.reached(
            self.failed_before + self.progress.failed, 0.0 if activity is None else activity.engine_seconds
        )


def draw(
    chain: Iterable[object], tracker: RunAttempts, resources: Callable[[], Mapping[str, float]], watch: Watch
) -> Stopped | None:
    """Pull a chain to its end, or until `watch` says stop. What is counted is committed.

    Args:
        chain: what it gives is not looked at: the tracker hears of each batch when it is committed, and the chain of a
            task's batches when the last of them is.
        tracker: its tracker.
        resources: what the cluster has by now.
        watch: counts, and decides.

    Returns:
        The limit that ended it; None: everything is drawn.

    Raises:
        InterruptedRunError: stopped from outside, by a store that went away, or by workers that all fail.
        LeaseHeldError: another run has taken over.
    """
    watchman = _Watchman(watch.config, resources)
    pulled = _Pulled(chain)
    watch.on_progress(watch.progress)
    stopped = None
    try:
        while not watch.must_stop and stopped is None:
            ended = pulled.wait()
            activity = tracker.activity()
            watch.progress.hear(activity)
            watch.on_progress(watch.progress)
            watchman.see(activity)
            if ended:
                return None
            stopped = watch.spent()
        if stopped is not None:
            log.info("stopping why=%s", stopped.why)
        watch.progress.hear(_drained(tracker, watch.config.limits.stop_grace_s))
        if stopped is not None:
            return stopped
    finally:
        pulled.enough.set()
    if watch.lease.lost.is_set():
        msg = f"another run has taken over {watch.config.output}"
        raise LeaseHeldError(msg)
    msg = "stopped; what was finished is committed. Start again to resume"
    raise InterruptedRunError(msg)


class _Watchman:
    """Ends a run whose workers fail request after request, or that is given no worker at all."""

    def __init__(self, config: RunConfig, resources: Callable[[], Mapping[str, float]]) -> None:
        self._place, self._max_crashes = config.placement, config.limits.max_crashes
        self._resources = resources
        self._ended = 0
        self._moved_at = self._told_at = time.monotonic()

    def see(self, activity: EngineActivity) -> None:
        """Look at what the engines have come to.

        Raises:
            InterruptedRunError: enough requests in a row failed for their worker's sake, or the run waited enough.
        """
        outcomes = activity.outcomes
        if outcomes.worker_failures >= self._max_crashes:
            msg = (
                f"{outcomes.worker_failures} requests in a row failed because of their worker (limits.max_crashes). "
                f"Last error: {outcomes.last_worker_failure}. Look at the workers' logs and devices. "
                "What was finished is committed. Start again to go on, with --retry-failed to try these again"
            )
            raise InterruptedRunError(msg)
        now, ended = time.monotonic(), outcomes.succeeded + outcomes.failures.total()
        if ended != self._ended:
            self._ended, self._moved_at, self._told_at = ended, now, now
        if now - self._told_at < min(_TELL_S, self._place.wait_s):
            return
        self._told_at = now
        if activity.in_flight:
            self._moved_at = now
            return
        waited = now - self._moved_at
        have = self._resources()
        state = (
            f"one engine needs {self._place.num_gpus:g} GPUs and {self._place.num_cpus:g} CPUs, and the cluster has "
            f"{have.get('GPU', 0):g} and {have.get('CPU', 0):g}"
        )
        if self._place.memory_mb is not None:
            there = have.get("memory", 0) / 2**20
            state += f"; and {self._place.memory_mb} MiB of memory (placement.memory_mb), where there are {there:.0f}"
        log.warning("waiting_for_engines seconds=%.0f: %s", waited, state)
        if waited > self._place.wait_s:
            msg = f"no engine could work for {waited:.0f} s (placement.wait_s): {state}. Start again to go on"
            raise InterruptedRunError(msg)


class _Pulled:
    """A chain that a thread of its own pulls until it ends, or until that is `enough`.

    To leave it earlier would end the engines at once.
    """

    def __init__(self, chain: Iterable[object]) -> None:
        self.enough = threading.Event()
        self._moved, self._ended = threading.Event(), False
        self._error: BaseException | None = None
        self._asked_at = time.monotonic()
        threading.Thread(target=self._pull, args=(chain,), name="chain", daemon=True).start()

    def wait(self) -> bool:
        """Let some time go by, less where the chain moves. Whether it has come to its end, or raise what ended it."""
        self._moved.wait(_ASK_S)
        if not self._ended:
            time.sleep(max(0.0, self._asked_at + _LEAST_S - time.monotonic()))
        self._asked_at = time.monotonic()
        self._moved.clear()
        if self._error is not None:
            raise _for_the_operator(self._error)
        return self._ended

    def _pull(self, chain: Iterable[object]) -> None:
        try:
            for _ in chain:
                self._moved.set()
                if self.enough.is_set():
                    return
        except BaseException as err:  # noqa: BLE001 - handed to the thread that runs the run
            self._error = err
        self._ended = True
        self._moved.set()


def _drained(tracker: RunAttempts, grace_s: float) -> EngineActivity:
    """Let no batch begin, and wait for those in flight to be committed; what all have come to then."""
    tracker.stop()
    deadline = time.monotonic() + grace_s
    while (activity := tracker.activity()).in_flight and time.monotonic() < deadline:
        log.info("stopping requests_in_flight=%d", activity.in_flight)
        time.sleep(0.3)
    return activity


def _for_the_operator(err: BaseException) -> BaseException:
    """What a worker raised, out of the wrappers that Ray puts around it."""
    inner: BaseException | None = err
    while inner is not None:
        if isinstance(inner, StorageError):
            return InterruptedRunError(f"{inner}; what was finished is committed. Start again to resume")
        if isinstance(inner, PiaBatchError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return worker_errors.explain_loss(err)
