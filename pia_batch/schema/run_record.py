"""Run record: the contents of run.json, of `run --json` and of what `on_finish` sends."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from pia_batch.errors import StorageError

Phase = Literal["starting", "generating", "publishing", "finished", "stopped"]

State = Literal["running", "finished", "stopped"]


class ProgressSnapshot(BaseModel):
    """Progress of a run at one moment: a progress line, `progress` of run.json and of `status --json`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    run_id: str = Field("", description="id of the run")
    phase: Phase = Field(
        "starting",
        description="`starting` (Ray), `generating`, `publishing`; at the end `finished` or `stopped`",
    )
    at: datetime = Field(description="time of this snapshot, UTC")
    seconds: float = Field(0.0, description="seconds from the start of Ray until publishing began")
    total: int | None = Field(None, description="requests that will have a result at the end; null: not known")
    done: int = Field(0, description="requests with a result, including those of earlier runs and rejected ones")
    done_before: int = Field(0, description="requests finished by earlier runs, and rejected ones")
    succeeded: int = Field(0, description="requests that this run animated")
    failed: int = Field(0, description="requests that failed in this run")
    failures: dict[str, int] = Field({}, description="failed requests of this run by error kind, most frequent first")
    clips_per_second: float = Field(0.0, description="animations per second, the start-up of Ray and engines included")
    recent_clips_per_second: float | None = Field(
        None,
        description="animations per second in the last minute, or since the eighth-last clip where that took longer",
    )
    seconds_left: float | None = Field(
        None, description="seconds left at the recent pace; null before the first result"
    )
    engines: int | None = Field(None, description="live engines, including those that still load; null: not known")
    engines_starting: int | None = Field(None, description="engines that still load")
    busy: float | None = Field(
        None, description="share of the engines' uptime spent generating, 0 to 1, start-up included"
    )
    recent_busy: float | None = Field(None, description="the same share over the recent time")
    unit: str = Field("engine hours", description="unit of `gpu_hours`: `GPU hours`, or `engine hours` on CPUs")
    gpu_hours: float | None = Field(None, description="hours of engine uptime times the GPUs of one engine")
    cost: float | None = Field(None, description="`gpu_hours` times `budget.price_per_hour`; null: no price is known")
    newest: str | None = Field(None, description="URI of the newest animation, without credentials")


class RunSummary(BaseModel):
    """Outcome of a run's manifest."""

    model_config = ConfigDict(frozen=True)

    run_id: str = Field(description="id of the run that has the results")
    requests: int = Field(description="requests of the manifest")
    succeeded: int = Field(description="requests with an animation")
    failed: int = Field(description="requests that failed, including rejected ones")
    failures: dict[str, int] = Field(description="failed requests by error kind")
    rejected: int = Field(description="failed requests that the manifest's own values rule out; no retry helps")
    duplicates: int = Field(description="rows of the manifest that repeat a request and share its result")
    computed: int = Field(description="requests that this run processed, successfully or not")
    left: int = Field(description="requests without a result because a limit was reached; 0: results are published")
    seconds: float = Field(description="duration of the run, in seconds")
    gpu_hours: float = Field(description="GPU-hours of this run; on CPUs, engine-hours")
    cost: float | None = Field(description="`gpu_hours` times `budget.price_per_hour`; null: no price is known")
    results_uri: str | None = Field(description="URI of the published results; null: nothing is published")
    reason: str | None = Field(description="limit that stopped the run, such as `deadline`; null: none did")
    message: str | None = Field(description="the same for people, with what to do")
    exit_code: int = Field(
        description="0; 3 where more requests failed than `limits.max_failed`; 4 where another limit was reached"
    )


class Timings(BaseModel):
    """Durations of a run's phases."""

    planning_s: float = Field(0.0, description="seconds spent planning")
    waiting_s: float = Field(0.0, description="seconds spent waiting for the lease")
    generating_s: float = Field(0.0, description="seconds spent generating, the start-up of Ray and engines included")
    publishing_s: float = Field(0.0, description="seconds spent publishing the results")
    total_s: float = Field(0.0, description="duration of the whole run, in seconds")


class StartupSeconds(BaseModel):
    """Spread of the engines' start-up times."""

    median: float = Field(description="median start-up time of an engine, in seconds")
    max: float = Field(description="longest start-up time of an engine, in seconds")


class EngineSummary(BaseModel):
    """Engines of a run, in numbers."""

    count: int = Field(description="engines that became ready, replacements of dead ones included")
    startup_seconds: StartupSeconds | None = Field(description="start-up times; null: no engine became ready")


class RunRecord(BaseModel):
    """Contents of run.json. Every field is always present; what is not known, or not known yet, is null.

    A run that ends before it begins to generate has only the fields that were known by then.
    """

    model_config = ConfigDict(validate_assignment=True)

    run_id: str | None = Field(None, description="id of the run")
    state: State = Field("running", description="`running`, `finished` (results are published) or `stopped`")
    reason: str | None = Field(
        None,
        description="cause of a stop: the limit `deadline`, `max_gpu_hours`, `max_failed`, `limit` or `sample`; or "
        "`interrupted`, `lease_held`, `error`, `bug`",
    )
    message: str | None = Field(None, description="cause of a stop for people, with what to do")
    exit_code: int | None = Field(None, description="exit code of the command; null while it runs")
    run_date: str | None = Field(None, description="date of the run; null without placeholders")
    params: dict[str, str] = Field({}, description="values of the config's own placeholders")
    started_at: datetime = Field(description="start of the run, UTC")
    finished_at: datetime | None = Field(None, description="end of the run, UTC")
    manifest: str = Field(description="URI of the manifest, without credentials")
    folder: str | None = Field(None, description="URI of the manifest's folder, without credentials")
    output: str = Field(description="URI of the output, without credentials")
    rows: int | None = Field(None, description="rows of the manifest")
    duplicates: int | None = Field(None, description="rows that repeat a request")
    rejected: int | None = Field(None, description="requests that the manifest's own values rule out")
    pending: int | None = Field(None, description="requests that had no result when the run began")
    selected: int | None = Field(None, description="pending requests that the budget selected")
    progress: ProgressSnapshot | None = Field(
        None, description="progress, as in [watching a run](monitoring.md#for-programs)"
    )
    computed: int = Field(0, description="requests that this run processed, successfully or not")
    requests_per_second: float | None = Field(None, description="`computed` divided by `timings.generating_s`")
    timings: Timings | None = Field(None, description="durations of the phases; null while it runs")
    engines: EngineSummary | None = Field(None, description="engines of the run; null while it runs")
    engine_hours: float | None = Field(None, description="hours of engine uptime")
    gpu_hours: float | None = Field(None, description="`engine_hours` times the GPUs of one engine")
    cost: float | None = Field(None, description="`gpu_hours` times `budget.price_per_hour`; null: no price is known")
    summary: RunSummary | None = Field(None, description="outcome; null unless the run published or reached a limit")
    version: str = Field(description="version of this package")
    versions: dict[str, str] = Field({}, description="versions of Python, Ray, torch and other packages that matter")
    engine_ids: dict[str, str] = Field({}, description="identity of each model's weights, scheduler, dtype and engine")
    config: dict[str, Any] | None = Field(
        None,
        description="every config key, without credentials and without `on_finish`; only in run.json",
    )

    @field_validator("progress", mode="wrap")
    @classmethod
    def _drop_unknown_progress(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> ProgressSnapshot | None:
        """Return None for the progress that another version of this package wrote in another form."""
        try:
            snapshot: ProgressSnapshot | None = validate(value)
        except ValidationError:
            return None
        return snapshot

    @classmethod
    def parse(cls, data: bytes, uri: str) -> RunRecord:
        """Return the record that a run has written.

        Args:
            data: Contents of run.json.
            uri: URI of run.json, for the message.

        Raises:
            StorageError: The record is damaged, or another version of this package wrote it in another form.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as err:
            problem = err.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            msg = f"{uri} is damaged or of another version: {where + ': ' if where else ''}{problem['msg']}"
            raise StorageError(msg) from None

    def payload(self) -> dict[str, Any]:
        """Return the record as a JSON object without the config, for programs that the run notifies."""
        return self.model_dump(mode="json", exclude={"config"})
