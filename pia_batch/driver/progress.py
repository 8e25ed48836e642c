"""How far a run is: as its tracker counts, told as one `Snapshot` to people, logs, run.json and programs."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pia_batch.config import RunConfig
from pia_batch.driver.budget import gpu_hours, unit
from pia_batch.pipeline.attempts import HEARTBEAT_S, EngineActivity, OutcomeCounts
from pia_batch.pipeline.metrics import RayMeter
from pia_batch.storage.uris import redacted_uri

Phase = Literal["starting", "drawing", "publishing", "finished", "stopped"]

RECENT_S = 60.0
"""Seconds that count as recent, unless fewer than RECENT_CLIPS came in them."""

RECENT_CLIPS = 8
"""Of a slow device, so many clips are looked back to: the pace of a minute without one would be 0."""

_MAX_MARKS = 4096


class Snapshot(BaseModel):
    """How far a run is at one moment, as JSON: a progress line, `progress` of run.json and of `status --json`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    run_id: str = Field("", description="which run")
    phase: Phase = Field(
        "starting",
        description="`starting` (Ray), `drawing`, `publishing`; at the end `finished` or `stopped`",
    )
    at: datetime = Field(description="when this was so, UTC")
    seconds: float = Field(0.0, description="since the run began to start Ray, until it began to publish")
    total: int | None = Field(None, description="requests that have a result at the end; null: not known")
    done: int = Field(0, description="requests with a result; those of earlier runs and rejected ones are among them")
    done_before: int = Field(0, description="those of earlier runs and rejected ones")
    succeeded: int = Field(0, description="drawn by this run")
    failed: int = Field(0, description="failed in this run")
    failures: dict[str, int] = Field({}, description="the same by error kind, the most frequent first")
    clips_per_second: float = Field(0.0, description="animations a second, the start of Ray and engines included")
    recent_clips_per_second: float | None = Field(
        None, description="the same in the last minute, or since the eighth-last clip where that took longer"
    )
    seconds_left: float | None = Field(None, description="at the recent pace; null before the first result")
    engines: int | None = Field(None, description="alive, those that still load included; null: not known")
    engines_starting: int | None = Field(None, description="those that still load")
    busy: float | None = Field(
        None, description="share of the engines' seconds that they drew in, 0 to 1, their start included"
    )
    recent_busy: float | None = Field(None, description="the same over the recent time")
    unit: str = Field("engine hours", description="what `gpu_hours` counts: `GPU hours`, or `engine hours` on CPUs")
    gpu_hours: float | None = Field(None, description="engines alive, times the GPUs of one")
    cost: float | None = Field(None, description="those times `budget.price_per_hour`; null: no price is known")
    newest: str | None = Field(None, description="URI of the newest animation, without credentials")


@dataclass(frozen=True, slots=True)
class _Mark:
    """What was counted at one moment, for paces."""

    at: float
    succeeded: int
    computed: int
    reported_seconds: float
    generating_seconds: float


@dataclass
class Progress:
    """How far a run is, counted in requests of its manifest. `now` is a monotonic clock, in seconds."""

    config: RunConfig
    run_id: str
    total: int
    """Those that have a result at the end of this run, if nothing stops it."""
    done_before: int
    """Finished by earlier runs, or rejected."""
    now: Callable[[], float] = time.monotonic
    phase: Phase = "starting"
    activity: EngineActivity | None = None
    """What the engines have come to; None: nobody has asked yet."""
    _before: OutcomeCounts = field(default_factory=OutcomeCounts)
    """What trackers had counted whose process died."""

    def __post_init__(self) -> None:
        self._started = self.now()
        self._ended: float | None = None
        self._marks: deque[_Mark] = deque(maxlen=_MAX_MARKS)

    @property
    def succeeded(self) -> int:
        """Requests that this run drew."""
        return self._before.succeeded + self._outcomes.succeeded

    @property
    def failures(self) -> Counter[str]:
        """Failed requests of this run by error kind."""
        return self._before.failures + self._outcomes.failures

    @property
    def newest(self) -> str | None:
        """The URI of the animation that was committed last."""
        return self._outcomes.newest or self._before.newest

    @property
    def failed(self) -> int:
        """Requests that failed in this run."""
        return self.failures.total()

    @property
    def done(self) -> int:
        """Requests with a result."""
        return self.done_before + self.succeeded + self.failed

    @property
    def computed(self) -> int:
        """Requests that this run drew, or tried to."""
        return self.succeeded + self.failed

    @property
    def seconds(self) -> float:
        """Since the chain started, the start-up of its workers included, until the run began to publish."""
        return (self.now() if self._ended is None else self._ended) - self._started

    @property
    def clips_per_second(self) -> float:
        """Animations a second, over `seconds`."""
        return self.succeeded / max(self.seconds, 1e-9)

    @property
    def recent_clips_per_second(self) -> float | None:
        """Animations a second lately, see RECENT_S and RECENT_CLIPS; None while there is too little to tell."""
        return self._rate(lambda mark: mark.succeeded)

    @property
    def seconds_left(self) -> float | None:
        """By the recent pace, or by that so far; None before the first result."""
        pace = self._rate(lambda mark: mark.computed) or self.computed / max(self.seconds, 1e-9)
        return max(0, self.total - self.done) / pace if pace else None

    def enter(self, phase: Phase) -> None:
        """Go on to a phase; the clock stops when nothing is drawn any more."""
        self.phase = phase
        if phase not in ("starting", "drawing") and self._ended is None:
            self._ended = self.now()

    def hear(self, activity: EngineActivity) -> None:
        """Note what the engines have come to, and every HEARTBEAT_S how far the run was then."""
        if self.activity is not None and self.activity.tracker_id != activity.tracker_id:
            self._before = OutcomeCounts(self.succeeded, self.failures, self.newest)
        self.activity = activity
        if self._marks and self.now() - self._marks[-1].at < HEARTBEAT_S:
            return
        self._marks.append(self._mark())
        while len(self._marks) > 1 and self._is_old(self._marks[1]):
            self._marks.popleft()

    def snapshot(self) -> Snapshot:
        """All of it, at this moment."""
        activity, hours, price = self.activity, None, self.config.budget.price_per_hour
        if activity is not None:
            hours = round(gpu_hours(self.config, activity.engine_seconds), 6)
        return Snapshot(
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
        heard, drawn = (
            (0.0, 0.0) if self.activity is None else (self.activity.reported_seconds, self.activity.generating_seconds)
        )
        at = self.now() if self._ended is None else self._ended
        return _Mark(at, self.succeeded, self.computed, heard, drawn)

    def _is_old(self, mark: _Mark) -> bool:
        """Whether the time since this mark is recent enough, and not too short for a pace."""
        return self.now() - mark.at >= RECENT_S and self.computed - mark.computed >= RECENT_CLIPS

    def _rate(self, count: Callable[[_Mark], int]) -> float | None:
        """What was counted a second since the oldest mark; None without a mark that something was counted since."""
        if not self._marks:
            return None
        first, last = self._marks[0], self._mark()
        counted = count(last) - count(first)
        return counted / (last.at - first.at) if counted and last.at > first.at else None

    def _recent_busy(self) -> float | None:
        if not self._marks:
            return None
        first, last = self._marks[0], self._marks[-1]
        return _share(
            last.generating_seconds - first.generating_seconds, last.reported_seconds - first.reported_seconds
        )


class Gauges:
    """The gauges of a run, set from its driver."""

    def __init__(self) -> None:
        self._meter = RayMeter()

    def show(self, progress: Progress) -> None:
        """Set them to what is done and what is left."""
        self._meter.set("pia_batch_requests", progress.done, state="done")
        self._meter.set("pia_batch_requests", progress.total - progress.done, state="left")


def _share(part: float, whole: float) -> float | None:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


def _rounded(number: float | None, digits: int = 4) -> float | None:
    return None if number is None else round(number, digits)
