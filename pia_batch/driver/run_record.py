"""What a run tells of itself: what it has come to, and `run.json`, which says that to programs, and how far it is."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.driver.budget import Stopped, gpu_hours
from pia_batch.driver.progress import Progress
from pia_batch.errors import InterruptedRunError, LeaseHeldError, PiaBatchError, StorageError, message_of
from pia_batch.journal import layout
from pia_batch.journal import log as journal
from pia_batch.journal.log import Outcomes
from pia_batch.planning.plan import Plan
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted, redacted_json, redacted_uri

log = logging.getLogger(__name__)

_PACKAGES = ("av", "diffusers", "obstore", "pillow", "pyarrow", "ray", "torch", "transformers")
"""Whose versions decide what a run does."""

SHOW_EVERY_S = 10.0
"""Seconds between two times that run.json tells how far a run is."""


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
    left: int
    """Requests that have no result yet, because a limit of the budget was reached; 0: the results are published."""
    seconds: float
    gpu_hours: float
    """Of this run, as `budget.gpu_hours` counts them."""
    cost: float | None
    """Those times `budget.price_per_hour`; None: no price is known."""
    results_uri: str | None
    """None: nothing is published, see `left`."""
    why: str | None
    """The limit that was reached, such as `deadline`; None: none was."""
    message: str | None
    """The same for people, with what to do."""
    exit_code: int
    """0, 3 where more requests failed than `limits.max_failed`, or 4 where another limit was reached."""


class Record:
    """What run.json says of a run, from its first moment to its end; docs/schedules.md has its fields."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._began = time.monotonic()
        self._store: Store | None = None
        self._progress: Progress | None = None
        self._shown = time.monotonic()
        self._writer: threading.Thread | None = None
        self._plan: Plan | None = None
        self._engine_seconds = 0.0
        self._phases = dict.fromkeys(("planning", "waiting", "drawing", "publishing"), 0.0)
        self.told: dict[str, Any] = {
            "run_id": config.run_id,
            "state": "running",
            "why": None,
            "message": None,
            "exit_code": None,
            "run_date": config.run_date,
            "params": config.params,
            "started_at": _now(),
            "finished_at": None,
            "manifest": redacted_uri(config.manifest),
            "output": redacted_uri(config.output),
            "version": __version__,
            "versions": {"python": platform.python_version()} | _versions(),
        }

    @property
    def computed(self) -> int:
        """Requests that this run drew, or tried to, by now."""
        return self._progress.computed if self._progress else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as that of `planning`, `waiting`, `drawing` or `publishing`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] += time.monotonic() - started

    def planned(self, plan: Plan, run_id: str | None = None) -> None:
        """Say what is to be done, once that is known."""
        self._plan = plan
        self.told |= {
            "run_id": run_id or self.told["run_id"],
            "engine_ids": plan.engine_ids,
            "manifest": redacted_uri(plan.manifest.uri),
            "folder": redacted_uri(plan.manifest.folder),
            "output": redacted_uri(Store(plan.config.output).uri),
            "rows": plan.manifest.num_rows,
            "pending": plan.num_pending,
            "chosen": plan.num_chosen,
            "rejected": plan.num_rejected,
            "duplicates": plan.num_duplicates,
        }

    def begin(self, store: Store, progress: Progress) -> None:
        """Write run.json for the first time."""
        self._store, self._progress = store, progress
        self._write()

    def show(self, progress: Progress) -> None:
        """Have run.json tell how far the run is, every SHOW_EVERY_S seconds. Nobody waits for the store."""
        if time.monotonic() - self._shown < SHOW_EVERY_S or (self._writer is not None and self._writer.is_alive()):
            return
        self._shown, self._progress = time.monotonic(), progress
        self._writer = threading.Thread(
            target=self._put_if_possible, args=(self._json(),), name="run.json", daemon=True
        )
        self._writer.start()

    def engines(self, told: dict[str, Any], seconds: float) -> None:
        """Note what the attempt tracker knows of the engines at their end, and how long all of them lived."""
        self.told["engines"] = told
        self._engine_seconds = seconds

    def finish(self, outcomes: Outcomes, run_id: str, stopped: Stopped | None = None, left: int = 0) -> RunSummary:
        """The summary of a run that has published, or that a limit has stopped; run.json tells it if it was begun.

        Args:
            outcomes: of the run's requests, by now.
            run_id: which results have them.
            stopped: the limit that was reached; None: the results are published.
            left: requests that are not drawn yet, or not again.
        """
        plan = self._plan
        if plan is None:
            raise AssertionError  # planned() comes first
        failures = outcomes.failures
        failed, most = failures.total(), self._config.limits.max_failed or 0
        exit_code = (3 if failed > most else 0) if stopped is None else stopped.exit_code
        message = None
        if stopped is not None:
            message = f"{stopped.message}. {left} of {len(plan.wanted)} requests are left"
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
            seconds=round(time.monotonic() - self._began, 3),
            gpu_hours=self._gpu_hours,
            cost=self._cost,
            results_uri=None if stopped else Store(plan.config.output).uri_of(layout.results_folder(run_id)),
            why=stopped.why if stopped else None,
            message=message,
            exit_code=exit_code,
        )
        self._end("stopped" if stopped else "finished", summary.why, message, exit_code)
        self.told |= {"run_id": run_id, "summary": asdict(summary)}
        self._write()
        return summary

    def fail(self, err: Exception) -> None:
        """Note that the run ends by an error; run.json tells it if it was begun and the store answers."""
        why = next((word for kind, word in _CAUSES.items() if isinstance(err, kind)), "bug")
        message = str(err) if isinstance(err, PiaBatchError) else f"{type(err).__name__}: {message_of(err)}"
        code = err.exit_code if isinstance(err, PiaBatchError) else 1
        self._end("stopped", why, redacted(message), code)
        if self._progress is not None:
            self._progress.enter("stopped")
        self._finish_writing()
        self._put_if_possible(self._json())

    @property
    def _gpu_hours(self) -> float:
        return round(gpu_hours(self._config, self._engine_seconds), 6)

    @property
    def _cost(self) -> float | None:
        price = self._config.budget.price_per_hour
        return None if price is None else round(self._gpu_hours * price, 6)

    def _end(self, state: str, why: str | None, message: str | None, exit_code: int) -> None:
        drawing = self._phases["drawing"]
        self.told |= {
            "state": state,
            "why": why,
            "message": message,
            "exit_code": exit_code,
            "finished_at": _now(),
            "computed": self.computed,
            "timings": {f"{name}_s": round(spent, 3) for name, spent in self._phases.items()}
            | {"total_s": round(time.monotonic() - self._began, 3)},
            "requests_per_second": round(self.computed / drawing, 4) if drawing and self.computed else None,
            "engine_hours": round(self._engine_seconds / 3600, 6),
            "gpu_hours": self._gpu_hours,
            "cost": self._cost,
        }

    def _write(self) -> None:
        self._finish_writing()
        self._put(self._json())

    def _finish_writing(self) -> None:
        """What was begun to be written must not come after what is written next."""
        if self._writer is not None:
            self._writer.join()

    def _json(self) -> bytes:
        config = self._config.model_dump(mode="json", exclude={"on_finish"})  # a webhook's URL is a secret
        if self._progress is not None:
            self.told["progress"] = self._progress.snapshot().model_dump(mode="json")
        return journal.to_json(self.told | {"config": redacted_json(config)})

    def _put(self, data: bytes) -> None:
        if self._store is not None:
            self._store.replace(layout.run_record_name(self.told["run_id"]), data)

    def _put_if_possible(self, data: bytes) -> None:
        try:
            self._put(data)
        except StorageError as problem:
            log.warning("run_json_not_written run_id=%s: %s", self.told["run_id"], problem)


_CAUSES: dict[type[PiaBatchError], str] = {
    InterruptedRunError: "interrupted",
    LeaseHeldError: "lease_held",
    PiaBatchError: "error",
}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # torch may be a vendor's build of another name
    return found
