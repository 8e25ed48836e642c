"""What a run's workers are doing, and what became of those that died. One for a run; its memory ends with it.

Knows nothing of Ray: `pipeline` gives it a process of its own, which outlives the workers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pia_batch.records import Row

PULSE_S = 2.0
"""Seconds between two signs of life of an engine: by so much a budget of GPU hours may be exceeded, and the drain."""

SILENT_S = 5 * PULSE_S
"""Seconds without a sign after which an engine is taken for dead: only what is shown depends on it."""

Cause = Literal["timeout", "out_of_memory"]
"""Why a worker ends itself: its requests took longer, or its process has grown larger, than the config allows."""


@dataclass(frozen=True, slots=True)
class Work:
    """What all engines of a run have come to, those that are dead by now included.

    Attributes:
        engines: alive, those that still load included.
        starting: those of them that still load.
        seconds: that all of them have lived, as `Ledger.engine_seconds`.
        heard_seconds: that they have told so far, and of those
        drawn_seconds: that they were drawing.
    """

    engines: int
    starting: int
    seconds: float
    heard_seconds: float
    drawn_seconds: float


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
    outcome: Row | None = None


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
        # A key that is known from a turn by itself ended in a batch that did not: it is not new either.
        return [self._begun[key] + (key in self._alone) for key in keys]

    def begin_alone(self, key: str) -> Turn | None:
        """A turn for one request that `begin` has counted, or None if the run is stopping."""
        if self._stopping:
            self._forget([key])
            return None
        known = self._alone.setdefault(key, _Alone())
        attempt = known.begun + 2  # the first one was in a batch
        if known.outcome is not None:
            self._begun.pop(key, None)
            return Turn(attempt - 1, outcome=known.outcome)
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
            if key in self._alone:
                self._alone[key].outcome = outcome

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
