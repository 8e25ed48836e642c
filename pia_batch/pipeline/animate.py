"""Last stage: turns fetched requests into committed animations. It does not use Ray, and imports no torch.

A request that raises, kills its worker, hangs or exhausts the memory fails alone. The requests of a batch that ended
badly are processed one at a time, and the run's `attempts.AttemptTracker` keeps count across dead workers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.errors import PiaBatchError
from pia_batch.pipeline.attempts import AttemptControl
from pia_batch.pipeline.committer import Commits, Committer, Objects
from pia_batch.pipeline.engine_guard import EngineGuard
from pia_batch.pipeline.engine_loader import LoadEngines
from pia_batch.pipeline.isolation import Isolation
from pia_batch.pipeline.outcomes import OUTCOME, interrupted, outcome_of, outcomes_table
from pia_batch.pipeline.request_rows import ANIMATED, attempt_key
from pia_batch.pipeline.watchdog import own_bytes
from pia_batch.pipeline.worker_errors import check_starts
from pia_batch.schema.columns import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerProcess:
    """Process of a worker, as an `Animate` uses it.

    Attributes:
        worker: Name of the worker, and of the process that replaces this one if it dies.
        exit: Function that ends the process; Ray then gives its batch to another one.
        count: Function that adds to a counter of `metrics.METRICS`: name, number, tags by keyword.
        new_lock: Function that makes the locks of the device and of the encoder.
    """

    worker: str = ""
    exit: Callable[[], None] = lambda: os._exit(1)
    count: Callable[..., None] = lambda *_, **__: None
    new_lock: Callable[[], AbstractContextManager[Any]] = threading.Lock


THIS_PROCESS = WorkerProcess()


class Animate:
    """Generates, encodes, stores and commits a batch of requests, and returns OUTCOME rows.

    Two threads may call it at once: while one batch is on the device, the previous one is encoded and committed. A call
    returns only when its batch is in the commit log, so whatever Ray considers done is done. An exception that is no
    PiaBatchError is attributed to a request, unless the engine fails its self-test too.

    Args:
        load_engines: Function that gives the engines; called here, on the worker.
        engine_ids: Expected identity of each model's engine, which the keys were made with. The first model is loaded
            at once.
        config: Config of the run.
        run_id: Run id recorded in every result, or None.
        control: Permission for each batch.
        objects: Object store for the animations.
        commits: Commit log for the results.
        process: This worker's process.

    Raises:
        ConfigError: An engine is not the driver's, or takes all of `placement.memory_mb` without any request.
        BrokenDeviceError: The engine failed its self-test, or ended its process in every start.
    """

    def __init__(
        self,
        load_engines: LoadEngines,
        engine_ids: Mapping[str, str],
        config: RunConfig,
        run_id: str | None,
        control: AttemptControl,
        objects: Objects,
        commits: Commits,
        process: WorkerProcess = THIS_PROCESS,
    ) -> None:
        started = time.monotonic()
        self._config, self._control, self._count = config, control, process.count
        check_starts(control.start(process.worker))
        self.guard = EngineGuard(load_engines, engine_ids, config, control.give_up, process.exit, process.count)
        self._committer = Committer(
            objects,
            commits,
            config,
            engine_ids,
            self.guard.safety,
            upscaler=self.guard.upscaler,
            device=self.guard.device,
            run_id=run_id,
            count=process.count,
        )
        self._isolation = Isolation(control, self.guard, config, self._finish)
        self._device, self._encoder = process.new_lock(), process.new_lock()
        seconds = time.monotonic() - started
        log.info("engine_ready device=%s seconds=%.1f own_bytes=%d", self.guard.device, seconds, own_bytes())
        control.ready(process.worker, seconds)

    @property
    def generating_seconds(self) -> float:
        """Seconds during which the engines have generated, including the batch that is on the device."""
        return self.guard.timer.generating_seconds

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return one OUTCOME row for each of `requests`: committed, or `interrupted` if the run is stopping."""
        if not len(requests):
            return OUTCOME.empty_table()
        rows = requests.select([name for name in requests.column_names if name in ANIMATED]).to_pylist()
        keys = [attempt_key(row) for row in rows]
        with self._device:
            attempts = self._control.begin(keys)
            if attempts is None:
                return outcomes_table([interrupted(key) for key in keys])
            self._count("pia_batch_slots_total", len(rows), state="filled")
            self._count("pia_batch_slots_total", self._config.placement.batch_size - len(rows), state="empty")
            clips = self._generate_together(rows) if max(attempts) == 1 else None
        if clips is None:
            with self._device, self._encoder:  # nothing else happens in this worker meanwhile
                return outcomes_table(self._isolation.process(requests, rows))
        with self._encoder:
            return outcomes_table(self._finish(requests, rows, clips, attempts))

    def _generate_together(self, rows: list[Row]) -> list[Any] | None:
        """Return a clip for each row, or None where one of them, not known which, makes the engine fail."""
        try:
            return self.guard.generate(rows)
        except PiaBatchError:
            raise
        except Exception:
            log.exception("batch_failed keys=%s", ",".join(row["key"] for row in rows))
        self.guard.exit_if_broken(rows)
        return None

    def _finish(self, requests: pa.Table, rows: list[Row], clips: list[Any], attempts: list[int]) -> list[Row]:
        """Commit generated requests and record their end; return their outcomes."""
        with self.guard.watch(rows):
            results = self._committer.commit(requests, rows, clips, attempts)
        outcomes = [outcome_of(attempt_key(row), result) for row, result in zip(rows, results, strict=True)]
        self._control.end(outcomes)
        return outcomes
