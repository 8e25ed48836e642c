"""Progress: counts the requests of a run and returns one snapshot for people, logs, run.json and programs."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pia_batch.config import RunConfig
from pia_batch.driver.budget import gpu_hours, unit
from pia_batch.pipeline.attempts import HEARTBEAT_S, EngineActivity, OutcomeCounts
from pia_batch.pipeline.metrics import RayMeter
from pia_batch.schema.run_record import Phase, ProgressSnapshot
from pia_batch.storage.uris import redacted_uri

RECENT_S = 60.0
"""Seconds that count as recent, unless fewer than RECENT_CLIPS were committed in them."""

RECENT_CLIPS = 8
"""Minimum number of clips that a recent pace covers: on a slow device, a minute may pass without one."""

_MAX_MARKS = 4096


@dataclass(frozen=True, slots=True)
class _Mark:
    """Counts at one moment, from which paces are computed."""

    at: float
    succeeded: int
    computed: int
    reported_seconds: float
    generating_seconds: float


@dataclass
class Progress:
    """Progress of a run, in requests of its manifest.

    Attributes:
        config: Config of the run.
        run_id: Id of the run.
        total: Number of requests that have a result at the end of this run, if nothing stops it.
        done_before: Number of requests that earlier runs finished or that were rejected.
        now: Monotonic clock, in seconds.
        phase: Current phase.
        activity: Totals over all engines, or None before the first update.
    """

    config: RunConfig
    run_id: str
    total: int
    done_before: int
    now: Callable[[], float] = time.monotonic
    phase: Phase = "starting"
    activity: EngineActivity | None = None
    _before: OutcomeCounts = field(default_factory=OutcomeCounts)
    """Counts of the trackers whose process died."""

    def __post_init__(self) -> None:
        self._started = self.now()
        self._ended: float | None = None
        self._marks: deque[_Mark] = deque(maxlen=_MAX_MARKS)

    @property
    def succeeded(self) -> int:
        """Number of requests that this run animated."""
        return self._before.succeeded + self._outcomes.succeeded

    @property
    def failures(self) -> Counter[str]:
        """Number of failed requests of this run by error kind."""
        return self._before.failures + self._outcomes.failures

    @property
    def newest(self) -> str | None:
        """URI of the animation that was committed last, or None."""
        return self._outcomes.newest or self._before.newest

    @property
    def failed(self) -> int:
        """Number of requests that failed in this run."""
        return self.failures.total()

    @property
    def done(self) -> int:
        """Number of requests with a result."""
        return self.done_before + self.succeeded + self.failed

    @property
    def computed(self) -> int:
        """Number of requests that this run processed, successfully or not."""
        return self.succeeded + self.failed

    @property
    def seconds(self) -> float:
        """Seconds since this object was made, start-up of the workers included, until publishing began."""
        return (self.now() if self._ended is None else self._ended) - self._started

    @property
    def clips_per_second(self) -> float:
        """Animations per second, over `seconds`."""
        return self.succeeded / max(self.seconds, 1e-9)

    @property
    def recent_clips_per_second(self) -> float | None:
        """Animations per second over the recent time (RECENT_S, RECENT_CLIPS); None before the first clip."""
        return self._rate(lambda mark: mark.succeeded)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the recent pace, or at the overall one; None before the first result."""
        pace = self._rate(lambda mark: mark.computed) or self.computed / max(self.seconds, 1e-9)
        return max(0, self.total - self.done) / pace if pace else None

    def enter(self, phase: Phase) -> None:
        """Enter a phase; the clock stops when generation ends."""
        self.phase = phase
        if phase not in ("starting", "generating") and self._ended is None:
            self._ended = self.now()

    def update(self, activity: EngineActivity) -> None:
        """Store the totals over all engines, and every HEARTBEAT_S a mark for the recent pace."""
        if self.activity is not None and self.activity.tracker_id != activity.tracker_id:
            self._before = OutcomeCounts(self.succeeded, self.failures, self.newest)
        self.activity = activity
        if self._marks and self.now() - self._marks[-1].at < HEARTBEAT_S:
            return
        self._marks.append(self._mark())
        while len(self._marks) > 1 and self._is_old(self._marks[1]):
            self._marks.popleft()

    def snapshot(self) -> ProgressSnapshot:
        """Return the progress at this moment."""
        activity, hours, price = self.activity, None, self.config.budget.price_per_hour
        if activity is not None:
            hours = round(gpu_hours(self.config, activity.engine_seconds), 6)
        return ProgressSnapshot(
            run_id=self.run_id,
            phase=self.phase,
            at=datetime.now(UTC).replace(microsecond=0),
            seconds=round(self.seconds, 1),
            total=self.total,
            done=self.done,
            done_before=self.done_before,
            succeeded=self.succeeded,
            failed=self.failed,
            failures=dict(self.failures.most_common()),
            clips_per_second=round(self.clips_per_second, 4),
            recent_clips_per_second=_rounded(self.recent_clips_per_second),
            seconds_left=_rounded(self.seconds_left, 1),
            engines=None if activity is None else activity.engines,
            engines_starting=None if activity is None else activity.starting,
            busy=_rounded(_share(activity.generating_seconds, activity.reported_seconds)) if activity else None,
            recent_busy=_rounded(self._recent_busy()),
            unit=unit(self.config),
            gpu_hours=hours,
            cost=None if price is None or hours is None else round(hours * price, 6),
            newest=None if self.newest is None else redacted_uri(self.newest),
        )

    @property
    def _outcomes(self) -> OutcomeCounts:
        return OutcomeCounts() if self.activity is None else self.activity.outcomes

    def _mark(self) -> _Mark:
        reported_s, generating_s = (
            (0.0, 0.0) if self.activity is None else (self.activity.reported_seconds, self.activity.generating_seconds)
        )
        at = self.now() if self._ended is None else self._ended
        return _Mark(at, self.succeeded, self.computed, reported_s, generating_s)

    def _is_old(self, mark: _Mark) -> bool:
        """Return True if the time since this mark suffices for a recent pace, so that earlier marks can go."""
        return self.now() - mark.at >= RECENT_S and self.computed - mark.computed >= RECENT_CLIPS

    def _rate(self, count: Callable[[_Mark], int]) -> float | None:
        """Return the count per second since the oldest mark, or None if nothing was counted since then."""
        if not self._marks:
            return None
        first, last = self._marks[0], self._mark()
        counted = count(last) - count(first)
        return counted / (last.at - first.at) if counted and last.at > first.at else None

    def _recent_busy(self) -> float | None:
        if not self._marks:
            return None
        first, last = self._marks[0], self._mark()
        return _share(
            last.generating_seconds - first.generating_seconds, last.reported_seconds - first.reported_seconds
        )


class Gauges:
    """Prometheus gauges of a run, set by its driver."""

    def __init__(self) -> None:
        self._meter = RayMeter()

    def set(self, progress: Progress) -> None:
        """Set the gauges to the numbers of requests that are done and left."""
        self._meter.set("pia_batch_requests", progress.done, state="done")
        self._meter.set("pia_batch_requests", progress.total - progress.done, state="left")


def _share(part: float, whole: float) -> float | None:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


def _rounded(number: float | None, digits: int = 4) -> float | None:
    return None if number is None else round(number, digits)
