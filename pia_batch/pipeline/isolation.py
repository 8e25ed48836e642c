"""Isolation of poison rows: the requests of a failed batch are processed one at a time, so that each fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.errors import (
    DeviceMemoryError,
    EngineError,
    PiaBatchError,
    RequestError,
    RequestTimeoutError,
    WorkerCrashError,
    message_of,
)
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.attempts import AttemptControl, SoloAttempt
from pia_batch.pipeline.engine_guard import EngineGuard
from pia_batch.pipeline.outcomes import interrupted
from pia_batch.pipeline.request_rows import attempt_key
from pia_batch.schema.columns import Row

log = logging.getLogger(__name__)

Finish = Callable[[pa.Table, list[Row], list[Any], list[int]], list[Row]]
"""Function that commits requests with their rows, clips and attempt numbers, and returns their outcomes."""


class Isolation:
    """Solo attempts for the requests of a batch among which one may be poison.

    Args:
        control: Permission for each attempt.
        guard: Engines of this worker.
        config: Config of the run.
        finish: Function that commits one request.
    """

    def __init__(self, control: AttemptControl, guard: EngineGuard, config: RunConfig, finish: Finish) -> None:
        self._control, self._guard, self._config, self._finish = control, guard, config, finish

    def process(self, requests: pa.Table, rows: list[Row]) -> list[Row]:
        """Generate and commit each request alone; return the outcomes in order."""
        outcomes = []
        for index, row in enumerate(rows):
            solo = self._control.begin_alone(attempt_key(row))
            if solo is None:
                outcomes.append(interrupted(attempt_key(row)))
            elif solo.outcome is not None:
                outcomes.append(solo.outcome)  # committed by a worker that died later in this batch
            else:
                clip = self._blame(solo, row) or self._generate(row)
                outcomes += self._finish(requests.slice(index, 1), [row], [clip], [solo.attempt])
        return outcomes

    def _blame(self, solo: SoloAttempt, row: Row) -> RequestError | None:
        """Return the error of a request that was alone when its worker died, as often as the config allows."""
        if solo.died_of is None:
            return None
        last = f"in the last of {solo.attempt - 2} attempts to animate it alone"
        if solo.died_of == "out_of_memory":
            limit = f"{self._config.placement.memory_mb} MiB of its worker's memory (placement.memory_mb)"
            return DeviceMemoryError(f"took more than {limit}, {last}")
        if solo.died_of == "timeout":
            deadline = f"{self._guard.deadline_s([row]):.0f} s, its share of limits.timeout_s"
            return RequestTimeoutError(f"took more than {deadline}, {last}")
        attempts = f"in each of {solo.attempt - 2} attempts to animate it alone"
        return WorkerCrashError(f"its worker died {attempts} (limits.max_attempts)")

    def _generate(self, row: Row) -> Any:  # a clip, the error of a request, or None where the row has an error already
        try:
            return self._guard.generate([row])[0]
        except PiaBatchError:
            raise
        except Exception as err:
            if lack := worker_errors.memory_error(err):
                return lack
            log.exception("request_raised request_id=%s", row["request_id"])
            self._guard.exit_if_broken([row])
            return EngineError(f"the engine raised {type(err).__name__}: {message_of(err)}")
