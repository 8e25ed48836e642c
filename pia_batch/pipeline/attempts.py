"""What a run's workers are doing, and what became of those that died. One for a run; its memory ends with it.

Knows nothing of Ray: `pipeline` gives it a process of its own, which outlives the workers.
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

PULSE_S = 2.0
"""Seconds between two signs of life of an engine: by so much a budget of GPU hours may be exceeded, and the drain."""

SILENT_S = 5 * PULSE_S
"""Seconds without a sign after which an engine is taken for dead: only what is shown depends on it."""

REMEMBERED = 50_000
"""Outcomes that are kept, some 40 MB, for a batch that comes again although it is committed: its task died with its
worker later on. One that is forgotten is drawn once more, and its result is the same."""

Cause = Literal["timeout", "out_of_memory"]
"""Why a worker ends itself: its requests took longer, or its process has grown larger, than the config allows."""

_WORKERS_FAULTS = frozenset(
    error.kind for error in (WorkerCrashError, RequestTimeoutError, EngineError, DeviceMemoryError)
)
"""Of requests that failed for their worker's sake: where all do, it is not the requests."""


@dataclass
class Tally:
    """What has become of the requests that ended, each counted once.

    Attributes:
        succeeded: requests.
        failures: failed requests by error kind.
        newest: the URI of the animation that was committed last.
        crashes: requests in a row, to the last one, that failed for their worker's sake.
        crash: why the last of them did.
    """

    succeeded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    newest: str | None = None
    crashes: int = 0
    crash: str | None = None

    def count(self, outcome: Row) -> None:
        """Add a row of `worker.OUTCOME`."""
        if outcome["status"] == SUCCEEDED:
            self.succeeded, self.newest = self.succeeded + 1, outcome["animation_uri"]
            self.crashes, self.crash = 0, None
            return
        kind = outcome["error_kind"]
        self.failures[kind] += 1
        self.crashes, self.crash = (self.crashes + 1, outcome["error"]) if kind in _WORKERS_FAULTS else (0, None)

    def copy(self) -> Tally:
        """One that does not change any more."""
        return replace(self, failures=Counter(self.failures))


@dataclass(frozen=True, slots=True)
class Work:
    """What all engines of a run have come to, those that are dead by now included.

    Attributes:
        engines: alive, those that still load included.
        starting: those of them that still load.
        seconds: that all of them have lived, as `Ledger.engine_seconds`.
        heard_seconds: that they have told so far, and of those
        drawn_seconds: that they were drawing.
        in_flight: requests that were begun and have not ended.
        tally: of those that have.
        ledger: which ledger says so; one whose process has died begins anew.
    """

    engines: int = 0
    starting: int = 0
    seconds: float = 0.0
    heard_seconds: float = 0.0
    drawn_seconds: float = 0.0
    in_flight: int = 0
    tally: Tally = field(default_factory=Tally)
    ledger: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """The ledger's answer to a worker that wants to draw one request by itself.

    Attributes:
        attempt: the number of this attempt, those in batches included; where `died_of` is set, of the one that is not
            made.
        died_of: why the request must not be drawn again; None: it may.
        outcome: what is committed of it already; None: nothing.
    """

    attempt: int
    died_of: Literal["worker_crash"] | Cause | None = None
    outcome: Row | None = None


@dataclass
class _Alone:
    """What is known of a request that was begun by itself."""

    begun: int = 0
    given_up: Cause | None = None


class Control(Protocol):
    """The run's word on each batch: the methods of `Ledger` that a worker calls, from wherever it is."""

    def start(self, worker: str) -> int:
        """The worker begins to load its engine; how many times in a row it has now."""

    def ready(self, worker: str, seconds: float) -> None:
        """Its engine draws, so many seconds later."""

    def begin(self, keys: list[str]) -> list[int] | None:
        """The number of the attempt that starts now for each key, or None if the run is stopping."""

    def begin_alone(self, key: str) -> Turn | None:
        """Whether one of a batch that ended badly may be drawn by itself; None if the run is stopping."""

    def give_up(self, keys: list[str], cause: Cause) -> None:
        """The worker is about to end itself because of these."""

    def end(self, outcomes: list[Row]) -> None:
        """These outcomes are committed."""


@dataclass
class Ledger:
    """Which requests are being worked on, how often each was begun, and which of them may be poison.

    A key that is begun again without having ended was in a batch whose worker died. Its worker then asks for a turn for
    each request by itself, so that the next death has one suspect only.

    Attributes:
        max_attempts: how often a request is begun, its batch's attempt included, before its worker's deaths are its
            own fault; at least 2.
        now: a monotonic clock, in seconds.
    """

    max_attempts: int
    now: Callable[[], float] = time.monotonic
    _begun: dict[str, int] = field(default_factory=dict)
    _alone: dict[str, _Alone] = field(default_factory=dict)
    _stopping: bool = False
    _starts: dict[str, int] = field(default_factory=dict)
    """By worker, how often it has begun to start since it was ready last."""
    _startup_seconds: list[float] = field(default_factory=list)
    _lived: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Seconds by engine, and when that was heard."""
    _drawn: dict[str, float] = field(default_factory=dict)
    """Seconds by engine that draws, or has drawn."""
    _ended: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    """The REMEMBERED newest outcomes."""
    _tally: Tally = field(default_factory=Tally, repr=False)
    _name: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)

    def start(self, worker: str) -> int:
        """A worker's process begins to load its engine; how many in a row have now, this one included.

        The process that takes a dead one's place has its name.
        """
        self._starts[worker] = self._starts.get(worker, 0) + 1
        return self._starts[worker]

    def ready(self, worker: str, seconds: float) -> None:
        """The engine of this worker draws, `seconds` after its start."""
        self._starts.pop(worker, None)
        self._startup_seconds.append(seconds)

    def engines(self) -> dict[str, Any]:
        """What `run.json` tells of the engines.

        Returns:
            `count` of those that became ready, the replacements of dead ones included, and `median` and `max` of their
            `startup_seconds`; None there if there was no engine.
        """
        seconds = self._startup_seconds
        spread = {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)} if seconds else None
        return {"count": len(seconds), "startup_seconds": spread}

    def alive(self, engine: str, seconds: float, drawn_seconds: float | None = None) -> None:
        """The process of this engine has lived for so long; told now and then, the start-up included.

        Args:
            engine: names the process.
            seconds: since it began.
            drawn_seconds: those of them that it was drawing; None: its engine still loads.
        """
        if seconds > self._lived.get(engine, (-1.0, 0.0))[0]:
            self._lived[engine] = seconds, self.now()
            if drawn_seconds is not None:
                self._drawn[engine] = drawn_seconds

    def work(self) -> Work:
        """What all engines have come to, as far as they told."""
        now = self.now()
        alive = [engine for engine, (_, heard) in self._lived.items() if now - heard < SILENT_S]
        return Work(
            engines=len(alive),
            starting=sum(engine not in self._drawn for engine in alive),
            seconds=self.engine_seconds(),
            heard_seconds=sum(seconds for seconds, _ in self._lived.values()),
            drawn_seconds=sum(self._drawn.values()),
            in_flight=self.in_flight(),
            tally=self._tally.copy(),
            ledger=self._name,
        )

    def engine_seconds(self) -> float:
        """How long all engines have lived: what each told, and since then at most the PULSE_S to its next sign."""
        now = self.now()
        return sum(seconds + min(now - heard, PULSE_S) for seconds, heard in self._lived.values())

    def begin(self, keys: list[str]) -> list[int] | None:
        """The number of the attempt that starts now for each key of a batch, or None if the run is stopping."""
        if self._stopping:
            self._forget(keys)
            return None
        for key in keys:
            self._begun[key] = self._begun.get(key, 0) + 1
        # A key that had a turn by itself, or has ended, was in a task that did not end: it is not new either.
        return [self._begun[key] + (key in self._alone or key in self._ended) for key in keys]

    def begin_alone(self, key: str) -> Turn | None:
        """A turn for one request that `begin` has counted, or None if the run is stopping."""
        if self._stopping:
            self._forget([key])
            return None
        known = self._alone.setdefault(key, _Alone())
        attempt = known.begun + 2  # the first one was in a batch
        outcome = self._ended.get(key)
        if outcome is not None:
            self._begun.pop(key, None)
            return Turn(attempt - 1, outcome=outcome)
        if known.begun >= self.max_attempts - 1:
            return Turn(attempt, died_of=known.given_up or "worker_crash")
        known.begun += 1
        known.given_up = None
        return Turn(attempt)

    def give_up(self, keys: list[str], cause: Cause) -> None:
        """The worker of these requests is about to end itself."""
        for key in keys:
            if key in self._alone:
                self._alone[key].given_up = cause

    def end(self, outcomes: list[Row]) -> None:
        """These outcomes, rows of `worker.OUTCOME`, are committed."""
        for outcome in outcomes:
            key = outcome["key"]
            self._begun.pop(key, None)
            if key not in self._ended:  # two workers may come to the same end, one of them taken for dead
                self._tally.count(outcome)
            self._ended[key] = outcome
            if len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)

    def stop(self) -> None:
        """Let nothing begin any more."""
        self._stopping = True

    def in_flight(self) -> int:
        """How many requests were begun and have not ended."""
        return len(self._begun)

    def _forget(self, keys: list[str]) -> None:
        """Whoever had begun them is dead, or lets them be: nobody has to be waited for."""
        for key in keys:
            self._begun.pop(key, None)
