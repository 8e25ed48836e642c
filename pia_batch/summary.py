"""What a run tells of itself: how far it is, what `run.json` says, and what its manifest has come to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pia_batch import __version__, journal
from pia_batch.journal import Outcomes
from pia_batch.planning import Plan
from pia_batch.storage import Store
from pia_batch.uris import redacted_json, redacted_uri


@dataclass
class Progress:
    """How far a run is, counted in requests of its manifest."""

    total: int
    done_before: int
    """Finished by earlier runs, or rejected."""
    succeeded: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Requests with a result."""
        return self.done_before + self.succeeded + self.failed

    @property
    def clips_per_second(self) -> float:
        """Animations a second since the chain started, the start-up of its workers included."""
        return self.succeeded / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None before the first result."""
        computed = self.succeeded + self.failed
        return (time.monotonic() - self.started) / computed * (self.total - self.done) if computed else None


@dataclass(frozen=True)
class RunSummary:
    """What a run's manifest has come to."""

    run_id: str
    requests: int
    succeeded: int
    failed: int
    failures: dict[str, int]
    """Failed requests by `error_kind`."""
    rejected: int
    """Those among them that the manifest's own values rule out: no retry helps."""
    duplicates: int
    """Rows of the manifest that repeat a request; they share its result."""
    computed: int
    """Requests that this run drew, or tried to."""
    seconds: float
    results_uri: str
    exit_code: int
    """0, or 3 where more requests failed than `limits.max_failed`."""


def about(plan: Plan, run_id: str) -> dict[str, Any]:
    """What `run.json` tells of a run."""
    return {
        "run_id": run_id,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "engine_ids": plan.engine_ids,
        "manifest": redacted_uri(plan.manifest.uri),
        "folder": redacted_uri(plan.manifest.folder),
        "rows": plan.manifest.num_rows,
        "pending": plan.num_pending,
        "rejected": plan.num_rejected,
        "duplicates": plan.num_duplicates,
        "config": redacted_json(plan.config.model_dump(mode="json")),
    }


def summarise(plan: Plan, outcomes: Outcomes, run_id: str, computed: int, started: float) -> RunSummary:
    """The summary of a run that began at `started` (monotonic seconds) and is published as `run_id`."""
    failures = outcomes.failures
    failed = failures.total()
    return RunSummary(
        run_id=run_id,
        requests=len(plan.wanted),
        succeeded=len(outcomes.keys) - failed,
        failed=failed,
        failures=dict(sorted(failures.items())),
        rejected=plan.num_rejected,
        duplicates=plan.num_duplicates,
        computed=computed,
        seconds=round(time.monotonic() - started, 3),
        results_uri=Store(plan.config.output).uri_of(f"{journal.RESULTS}{run_id}"),
        exit_code=3 if failed > plan.config.limits.max_failed else 0,
    )
