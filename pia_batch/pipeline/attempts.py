"""Attempt tracking: counts attempts per request, isolates poison rows and sums up what the engines of a run did.

One tracker serves a run; its memory ends with the run. This module does not use Ray: `attempts_actor` places the
tracker in a process of its own, which outlives the workers.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pia_batch.errors import DeviceMemoryError, EngineError, RequestTimeoutError, WorkerCrashError
from pia_batch.schema.columns import SUCCEEDED, Row

HEARTBEAT_S = 2.0
"""Seconds between two heartbeats of an engine. A GPU-hour budget, and the drain, may be exceeded by this much."""

HEARTBEAT_TIMEOUT_S = 5 * HEARTBEAT_S
"""Seconds without a heartbeat after which an engine counts as dead. Only the displayed numbers depend on it."""

MAX_REMEMBERED = 50_000
"""Maximum number of outcomes kept (some 40 MB), for a batch that comes again although it is committed because its task
died with its worker later on. A forgotten request is generated once more, and its result is the same."""

ExitCause = Literal["timeout", "out_of_memory"]
"""Reason for which a worker ends its own process: its requests exceed the time limit, or its process the memory limit
of the config."""

_WORKER_FAILURES = frozenset(
    error.kind for error in (WorkerCrashError, RequestTimeoutError, EngineError, DeviceMemoryError)
)
"""Error kinds caused by the worker. Where every request fails with one of them, the requests are not the cause."""


@dataclass
class OutcomeCounts:
    """Counts of the requests that ended, each counted once.

    Attributes:
        succeeded: Number of requests that succeeded.
        failures: Number of failed requests by error kind.
        newest: URI of the animation that was committed last.
        worker_failures: Number of consecutive requests, up to the last one, that failed because of their worker.
        last_worker_failure: Error message of the last of them.
    """

    succeeded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    newest: str | None = None
    worker_failures: int = 0
    last_worker_failure: str | None = None

    def count(self, outcome: Row) -> None:
        """Add a row of `animate.OUTCOME`."""
        if outcome["status"] == SUCCEEDED:
            self.succeeded, self.newest = self.succeeded + 1, outcome["animation_uri"]
            self.worker_failures, self.last_worker_failure = 0, None
            return
        kind = outcome["error_kind"]
        self.failures[kind] += 1
        if kind in _WORKER_FAILURES:
            self.worker_failures, self.last_worker_failure = self.worker_failures + 1, outcome["error"]
        else:
            self.worker_failures, self.last_worker_failure = 0, None

    def copy(self) -> OutcomeCounts:
        """Return a copy that later counts do not change."""
        return replace(self, failures=Counter(self.failures))


@dataclass(frozen=True, slots=True)
class EngineActivity:
    """Totals over all engines of a run, dead ones included.

    Attributes:
        engines: Number of live engines, including those that still load.
        starting: Number of live engines that still load.
        engine_seconds: Total uptime of all engines, in seconds, as `AttemptTracker.engine_seconds` estimates it.
        reported_seconds: Total uptime in the heartbeats received so far, in seconds.
        generating_seconds: Part of `reported_seconds` during which the engines generated.
        in_flight: Number of requests that have begun and not ended.
        outcomes: Counts of the requests that ended.
        tracker_id: Identity of the tracker. A tracker whose process died is replaced by one that starts from zero.
    """

    engines: int = 0
    starting: int = 0
    engine_seconds: float = 0.0
    reported_seconds: float = 0.0
    generating_seconds: float = 0.0
    in_flight: int = 0
    outcomes: OutcomeCounts = field(default_factory=OutcomeCounts)
    tracker_id: str = ""


@dataclass(frozen=True, slots=True)
class SoloAttempt:
    """Answer of the tracker to a worker that wants to process one request alone.

    Attributes:
        attempt: Number of this attempt, attempts in batches included. Where `died_of` is set, the number of the attempt
            that is not made.
        died_of: Cause for which the request must not be tried again, or None if it may be.
        outcome: Outcome of the request if it is committed already, else None.
    """

    attempt: int
    died_of: Literal["worker_crash"] | ExitCause | None = None
    outcome: Row | None = None


@dataclass
class _SoloRecord:
    """Attempts of one request that is processed alone.

    Attributes:
        begun: Number of solo attempts that have begun.
        exit_cause: Reason for which the worker of the last attempt ended its process, if it reported one.
    """

    begun: int = 0
    exit_cause: ExitCause | None = None


class AttemptControl(Protocol):
    """Permission to process requests: the methods of `AttemptTracker` that a worker calls, locally or remotely."""

    def start(self, worker: str) -> int:
        """Record that the worker begins to load its engine; return the number of consecutive starts."""

    def ready(self, worker: str, seconds: float) -> None:
        """Record that the worker's engine is ready, so many seconds after its start."""

    def begin(self, keys: list[str]) -> list[int] | None:
        """Begin an attempt for each key; return the attempt numbers, or None if the run is stopping."""

    def begin_alone(self, key: str) -> SoloAttempt | None:
        """Begin a solo attempt for one request of a batch that failed; return None if the run is stopping."""

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        """Record that the worker is about to end its process because of these keys."""

    def end(self, outcomes: list[Row]) -> None:
        """Record that these outcomes are committed."""


@dataclass
class AttemptTracker:
    """Attempts of every request of a run; finds the requests that may be poison.

    A key that begins again without having ended was in a batch whose worker died. Its new worker then asks for a solo
    attempt for each request of the batch, so that the next death has one suspect only.

    Attributes:
        max_attempts: Maximum number of attempts per request, its batch's attempt included, before the deaths of its
            workers are attributed to it; at least 2.
        returns_outcomes: Hand out the outcome of a committed request that comes again. Without it the request is
            processed once more, for callers whose results are lost with their worker.
        now: Monotonic clock, in seconds.
    """

    max_attempts: int
    returns_outcomes: bool = field(default=True, kw_only=True)
    now: Callable[[], float] = time.monotonic
    _begun: dict[str, int] = field(default_factory=dict)
    """Number of batch attempts by key, for the requests in flight."""
    _solo: dict[str, _SoloRecord] = field(default_factory=dict)
    _stopping: bool = False
    _starts: dict[str, int] = field(default_factory=dict)
    """Number of starts by worker since it was ready last."""
    _startup_seconds: list[float] = field(default_factory=list)
    _uptimes: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Uptime by engine in seconds, and the time at which the tracker received it."""
    _generating: dict[str, float] = field(default_factory=dict)
    """Seconds of generation by engine, for the engines that have loaded."""
    _ended: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    """The newest MAX_REMEMBERED outcomes by key."""
    _outcomes: OutcomeCounts = field(default_factory=OutcomeCounts, repr=False)
    _tracker_id: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)

    def start(self, worker: str) -> int:
        """Record that a worker's process begins to load its engine.

        The process that replaces a dead one has the same worker name.

        Returns:
            Number of consecutive starts without a ready engine, this one included.
        """
        self._starts[worker] = self._starts.get(worker, 0) + 1
        return self._starts[worker]

    def ready(self, worker: str, seconds: float) -> None:
        """Record that the engine of this worker is ready, `seconds` after its start."""
        self._starts.pop(worker, None)
        self._startup_seconds.append(seconds)

    def engine_summary(self) -> dict[str, Any]:
        """Return the `engines` section of run.json.

        Returns:
            `count`: number of engines that became ready, replacements of dead ones included. `startup_seconds`:
            `median` and `max` of their start-up times in seconds, or None if there was no engine.
        """
        seconds = self._startup_seconds
        spread = {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)} if seconds else None
        return {"count": len(seconds), "startup_seconds": spread}

    def heartbeat(self, engine: str, seconds: float, generating_seconds: float | None = None) -> None:
        """Record the uptime of an engine's process; it is sent regularly, also during start-up.

        Args:
            engine: Name of the process.
            seconds: Uptime of the process, in seconds.
            generating_seconds: Part of the uptime during which it generated, in seconds; None while its engine loads.
        """
        if seconds > self._uptimes.get(engine, (-1.0, 0.0))[0]:
            self._uptimes[engine] = seconds, self.now()
            if generating_seconds is not None:
                self._generating[engine] = generating_seconds

    def activity(self) -> EngineActivity:
        """Return the totals over all engines, as far as their heartbeats report them."""
        now = self.now()
        alive = [engine for engine, (_, received) in self._uptimes.items() if now - received < HEARTBEAT_TIMEOUT_S]
        return EngineActivity(
            engines=len(alive),
            starting=sum(engine not in self._generating for engine in alive),
            engine_seconds=self.engine_seconds(),
            reported_seconds=sum(seconds for seconds, _ in self._uptimes.values()),
            generating_seconds=sum(self._generating.values()),
            in_flight=self.in_flight(),
            outcomes=self._outcomes.copy(),
            tracker_id=self._tracker_id,
        )

    def engine_seconds(self) -> float:
        """Return the total uptime of all engines: as reported, plus up to HEARTBEAT_S each since the last report."""
        now = self.now()
        return sum(seconds + min(now - received, HEARTBEAT_S) for seconds, received in self._uptimes.values())

    def begin(self, keys: list[str]) -> list[int] | None:
        """Begin an attempt for each key of a batch; return the attempt numbers, or None if the run is stopping."""
        if self._stopping:
            self._forget(keys)
            return None
        for key in keys:
            self._begun[key] = self._begun.get(key, 0) + 1
        # A key with a solo attempt, or one that has ended, was in a task that did not end: it is not new either.
        return [self._begun[key] + (key in self._solo or key in self._ended) for key in keys]

    def begin_alone(self, key: str) -> SoloAttempt | None:
        """Begin a solo attempt for a request that `begin` has counted; return None if the run is stopping."""
        if self._stopping:
            self._forget([key])
            return None
        record = self._solo.setdefault(key, _SoloRecord())
        attempt = record.begun + 2  # the first one was in a batch
        outcome = self._ended.get(key)
        if outcome is not None:
            self._begun.pop(key, None)
            return SoloAttempt(attempt - 1, outcome=outcome if self.returns_outcomes else None)
        if record.begun >= self.max_attempts - 1:
            return SoloAttempt(attempt, died_of=record.exit_cause or "worker_crash")
        record.begun += 1
        record.exit_cause = None
        return SoloAttempt(attempt)

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        """Record that the worker of these requests is about to end its process."""
        for key in keys:
            if key in self._solo:
                self._solo[key].exit_cause = cause

    def end(self, outcomes: list[Row]) -> None:
        """Record that these outcomes, rows of `animate.OUTCOME`, are committed."""
        for outcome in outcomes:
            key = outcome["key"]
            self._begun.pop(key, None)
            if key not in self._ended:  # two workers may end the same request if one was wrongly taken for dead
                self._outcomes.count(outcome)
            self._ended[key] = outcome
            if len(self._ended) > MAX_REMEMBERED:
                self._ended.popitem(last=False)

    def stop(self) -> None:
        """Refuse every attempt from now on."""
        self._stopping = True

    def in_flight(self) -> int:
        """Return the number of requests that have begun and not ended."""
        return len(self._begun)

    def _forget(self, keys: list[str]) -> None:
        """Drop keys whose worker is dead or skips them, so that a stopping run does not wait for them."""
        for key in keys:
            self._begun.pop(key, None)
