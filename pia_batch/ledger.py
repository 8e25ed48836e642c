"""What a run's workers are doing, and what became of those that died. One for a run; its memory ends with it.

Knows nothing of Ray: `pipeline` gives it a process of its own, which outlives the workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pia_batch.records import Row


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
    died_of: Literal["worker_crash", "timeout"] | None = None
    outcome: Row | None = None


@dataclass
class _Alone:
    """What is known of a request that was begun by itself."""

    begun: int = 0
    hung: bool = False
    outcome: Row | None = None


@dataclass
class Ledger:
    """Which requests are being worked on, how often each was begun, and which of them may be poison.

    A key that is begun again without having ended was in a batch whose worker died. Its worker then asks for a turn for
    each request by itself, so that the next death has one suspect only.

    Attributes:
        max_attempts: how often a request is begun, its batch's attempt included, before its worker's deaths are its
            own fault; at least 2.
    """

    max_attempts: int
    _begun: dict[str, int] = field(default_factory=dict)
    _alone: dict[str, _Alone] = field(default_factory=dict)
    _stopping: bool = False

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
            return Turn(attempt, died_of="timeout" if known.hung else "worker_crash")
        known.begun += 1
        known.hung = False
        return Turn(attempt)

    def hang(self, keys: list[str]) -> None:
        """The worker of these requests is past their deadline, and about to end itself."""
        for key in keys:
            if key in self._alone:
                self._alone[key].hung = True

    def end(self, outcomes: list[Row]) -> None:
        """These outcomes, rows of `animate.OUTCOME`, are committed."""
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
