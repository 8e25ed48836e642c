"""Tasks of several blocks, where engines end so many batches in a second that single ones would busy the driver."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from pia_batch.pipeline import batching

RATE_SECONDS = 20
"""Seconds over which the speed of the engines is measured: several tasks of each, because many end theirs together."""

_LOAD = "pia_batch_load"


@dataclass(frozen=True)
class Load:
    """Requests of a run, for the sizes of its tasks.

    Attributes:
        rows: Number of requests.
        max_rows: Maximum number of requests in a task.
    """

    rows: int
    max_rows: int


def allow(dataset: ray.data.Dataset, load: Load) -> None:
    """Let the tasks of a Dataset's actors grow while it is executed."""
    dataset.context.set_config(_LOAD, load)
    if LargerTasks not in dataset.context.custom_execution_callback_classes:
        dataset.context.custom_execution_callback_classes.append(LargerTasks)


class LargerTasks(ExecutionCallback):  # type: ignore[misc] # Ray is untyped here
    """Callback that gives an engine several blocks at a time while all of them end many requests in a second.

    Each task costs the driver and the engine's process some milliseconds of CPU, however many batches it has.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def on_execution_step(self, executor: Any) -> None:
        """Set the size of the next tasks; called at every step of the driver's scheduling loop."""
        load: Load | None = executor._data_context.get_config(_LOAD)  # noqa: SLF001 - Ray Data has no public way
        if load is None:
            return
        for operator in executor._topology or ():  # noqa: SLF001
            if isinstance(operator, ActorPoolMapOperator):
                self._resize(operator, load)

    def _resize(self, operator: Any, load: Load) -> None:
        given = operator.metrics.rows_inputs_of_submitted_tasks
        speed = self._rows_per_second(operator.metrics.rows_task_outputs_generated) if given else 0.0
        engines = operator._actor_pool.num_running_actors()  # noqa: SLF001
        rows = batching.rows_at_once(speed, load.rows - given, engines, load.max_rows)
        batch = operator._min_rows_per_bundle  # noqa: SLF001
        operator._block_ref_bundler._strategy._min_rows_per_bundle = max(batch, rows)  # noqa: SLF001

    def _rows_per_second(self, ended: int) -> float:
        """Return the speed over the last RATE_SECONDS, of which there is a mark for each second."""
        now, marks = time.monotonic(), self._marks
        if not marks or now - marks[-1][0] >= 1:
            marks.append((now, ended))
        while now - marks[0][0] > RATE_SECONDS and len(marks) > 1:
            marks.popleft()
        began, before = marks[0]
        return (ended - before) / max(1.0, now - began)
