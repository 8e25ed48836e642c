"""Run record writer: keeps the run's record up to date and writes it as run.json."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.driver.budget import LimitReached, gpu_hours
from pia_batch.driver.progress import Progress
from pia_batch.errors import (
    InterruptedRunError,
    LeaseHeldError,
    PiaBatchError,
    StorageError,
    environment_error,
    message_of,
)
from pia_batch.journal import layout
from pia_batch.journal.log import Outcomes, to_json
from pia_batch.planning.plan import Plan
from pia_batch.schema.run_record import EngineSummary, RunRecord, RunSummary, Timings
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted, redacted_json, redacted_uri

log = logging.getLogger(__name__)

TimedPhase = Literal["planning", "waiting", "generating", "publishing"]

PROGRESS_EVERY_S = 10.0
"""Seconds between two writes of the progress to run.json."""

_PACKAGES = ("av", "diffusers", "obstore", "pillow", "pyarrow", "ray", "torch", "transformers")
"""Packages whose versions influence a run."""


class RunRecordWriter:
    """Record of one run, from its first moment to its end; docs/run-record.md lists its fields.

    Nothing is written before `begin`, so that a run which finds nothing to do leaves no run.json.

    Attributes:
        record: The record as it stands now, without its progress and its config.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._started_s = time.monotonic()
        self._store: Store | None = None
        self._progress: Progress | None = None
        self._written_s = time.monotonic()
        self._thread: threading.Thread | None = None
        self._plan: Plan | None = None
        self._engine_seconds = 0.0
        self._durations: dict[TimedPhase, float] = {}
        self.record = RunRecord(
            run_id=config.run_id,
            run_date=config.run_date,
            params=config.params,
            started_at=_now(),
            manifest=redacted_uri(config.manifest),
            output=redacted_uri(config.output),
            version=__version__,
            versions={"python": platform.python_version()} | _versions(),
        )

    @property
    def computed(self) -> int:
        """Number of requests that this run has processed so far, successfully or not."""
        return self._progress.computed if self._progress else 0

    @contextmanager
    def phase(self, name: TimedPhase) -> Iterator[None]:
        """Add the duration of the block to that of a phase."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._durations[name] = self._durations.get(name, 0.0) + time.monotonic() - started_s

    def set_plan(self, plan: Plan, run_id: str | None = None) -> None:
        """Record the work that a plan found, and the run's id where it is known by now."""
        self._plan, record = plan, self.record
        record.run_id = run_id or record.run_id
        record.engine_ids = plan.engine_ids
        record.manifest = redacted_uri(plan.manifest.uri)
        record.folder = redacted_uri(plan.manifest.folder)
        record.output = redacted_uri(Store(plan.config.output).uri)
        record.rows = plan.manifest.num_rows
        record.pending = plan.num_pending
        record.selected = plan.num_selected
        record.rejected = plan.num_rejected
        record.duplicates = plan.num_duplicates

    def begin(self, store: Store, progress: Progress) -> None:
        """Write run.json for the first time."""
        self._store, self._progress = store, progress
        self._write()

    def write_progress(self, progress: Progress) -> None:
        """Write the progress to run.json every PROGRESS_EVERY_S seconds, in a thread: the run never waits for it."""
        if time.monotonic() - self._written_s < PROGRESS_EVERY_S:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        self._written_s, self._progress = time.monotonic(), progress
        self._thread = threading.Thread(
            target=self._put_if_possible, args=(self._json(),), name="run.json", daemon=True
        )
        self._thread.start()

    def set_engines(self, summary: dict[str, Any], engine_seconds: float) -> None:
        """Record the engines at the end of the run.

        Args:
            summary: Engines as `AttemptTracker.engine_summary` returns them.
            engine_seconds: Total uptime of all engines, in seconds.
        """
        self.record.engines = EngineSummary.model_validate(summary)
        self._engine_seconds = engine_seconds

    def finish(self, outcomes: Outcomes, run_id: str, limit: LimitReached | None = None, left: int = 0) -> RunSummary:
        """Complete the record of a run that has published or was stopped by a limit; write it if `begin` was called.

        Args:
            outcomes: Outcomes of the run's requests so far.
            run_id: Id of the run that has the results.
            limit: Limit that stopped the run, or None if the results are published.
            left: Number of requests that are still pending.
        """
        plan = self._plan
        if plan is None:
            raise AssertionError  # set_plan() comes first
        failures = outcomes.failures
        failed, max_failed = failures.total(), self._config.limits.max_failed or 0
        message = None
        if limit is not None:
            message = f"{limit.message}. {left} of {len(plan.wanted)} requests are left"
        summary = RunSummary(
            run_id=run_id,
            requests=len(plan.wanted),
            succeeded=len(outcomes.keys) - failed,
            failed=failed,
            failures=dict(sorted((str(kind), count) for kind, count in failures.items())),
            rejected=plan.num_rejected,
            duplicates=plan.num_duplicates,
            computed=self.computed,
            left=left,
            seconds=self._total_s,
            gpu_hours=self._gpu_hours,
            cost=self._cost,
            results_uri=None if limit else Store(plan.config.output).uri_of(layout.results_folder(run_id)),
            reason=limit.reason if limit else None,
            message=message,
            exit_code=(3 if failed > max_failed else 0) if limit is None else limit.exit_code,
        )
        self._end("stopped" if limit else "finished", summary.reason, message, summary.exit_code)
        self.record.run_id, self.record.summary = run_id, summary
        self._write()
        return summary

    def fail(self, err: Exception) -> None:
        """Complete the record of a run that ends by an error; write it if `begin` was called and the store answers."""
        err = environment_error(err) or err
        reason = next((word for kind, word in _REASONS.items() if isinstance(err, kind)), "bug")
        message = str(err) if isinstance(err, PiaBatchError) else f"{type(err).__name__}: {message_of(err)}"
        exit_code = err.exit_code if isinstance(err, PiaBatchError) else 1
        self._end("stopped", reason, redacted(message), exit_code)
        if self._progress is not None:
            self._progress.enter("stopped")
        self._join()
        self._put_if_possible(self._json())

    @property
    def _total_s(self) -> float:
        return round(time.monotonic() - self._started_s, 3)

    @property
    def _gpu_hours(self) -> float:
        return round(gpu_hours(self._config, self._engine_seconds), 6)

    @property
    def _cost(self) -> float | None:
        price = self._config.budget.price_per_hour
        return None if price is None else round(self._gpu_hours * price, 6)

    def _end(
        self, state: Literal["finished", "stopped"], reason: str | None, message: str | None, exit_code: int
    ) -> None:
        record, generating_s = self.record, self._durations.get("generating", 0.0)
        record.state, record.reason, record.message, record.exit_code = state, reason, message, exit_code
        record.finished_at = _now()
        record.computed = self.computed
        durations = {f"{name}_s": round(seconds, 3) for name, seconds in self._durations.items()}
        record.timings = Timings(**durations, total_s=self._total_s)
        if generating_s and self.computed:
            record.requests_per_second = round(self.computed / generating_s, 4)
        record.engine_hours = round(self._engine_seconds / 3600, 6)
        record.gpu_hours = self._gpu_hours
        record.cost = self._cost

    def _write(self) -> None:
        self._join()
        self._put(self._json())

    def _join(self) -> None:
        """Wait for a write in progress: it must not overwrite the next one."""
        if self._thread is not None:
            self._thread.join()

    def _json(self) -> bytes:
        if self._progress is not None:
            self.record.progress = self._progress.snapshot()
        config = self._config.model_dump(mode="json", exclude={"on_finish"})  # a webhook's URL is a secret
        return to_json(self.record.payload() | {"config": redacted_json(config)})

    def _put(self, data: bytes) -> None:
        if self._store is not None and self.record.run_id is not None:
            self._store.replace(layout.run_record_name(self.record.run_id), data)

    def _put_if_possible(self, data: bytes) -> None:
        try:
            self._put(data)
        except StorageError as err:
            log.warning("run_record_write_failed run_id=%s: %s", self.record.run_id, err)


_REASONS: dict[type[PiaBatchError], str] = {
    InterruptedRunError: "interrupted",
    LeaseHeldError: "lease_held",
    PiaBatchError: "error",
}
"""Reason by class of error; the first class that matches counts."""


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # torch may be a vendor's build of another name
    return found
