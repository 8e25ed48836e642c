"""Sizes of blocks and tasks: requests that are arranged together, fetched together, or given to an engine at once."""

from __future__ import annotations

import math

from pia_batch.config import RunConfig

WINDOW, SMALL_WINDOW = 1024, 64
"""Requests that are arranged together; fewer where each request holds its image."""

TASKS_PER_ENGINE = 64
"""A task has several batches only where each engine still gets more tasks than these, because the driver's time grows
with the tasks. Engines of equal speed that have no task left while others end theirs lose less than 1 % of the run."""

FETCHES_PER_ROUND = 4
"""Number of fetch tasks that give each engine one batch, where a run has very many engines: few, because engines may
leave only a few CPUs to fetch with."""

TASKS_PER_SECOND = 5
"""Tasks a second that the driver gives to all engines before it makes them larger. A pool of Ray Data whose 64 engines
only wait 1 s a batch of its own task is 55 % busy on two cores, and can begin 35 tasks a second."""

SHARE_LEFT = 4
"""A task that is made larger has at most one in this many of the requests that are left for each engine, so that tasks
become small again before the engines end."""

TASK_ROWS, TASK_BYTES = 64, 32 * 2**20
"""Maximum number of requests in a task of several batches, or in a fetch task for many engines, and of the bytes of
their pixels under the config's defaults."""


def batches_per_task(config: RunConfig, num_requests: int) -> int:
    """Return the number of batches that an engine is given at a time: one, unless each engine has very many requests.

    With priorities it is always one, because what is in a task is processed before everything after it.
    """
    place = config.placement
    if config.budget.priority is not None:
        return 1
    rows = min(max_rows(config), num_requests // (TASKS_PER_ENGINE * place.max_engines))
    return max(1, rows // place.batch_size)


def fetch_rows(config: RunConfig, task_rows: int) -> int:
    """Return the number of requests that are fetched together: tasks enough to employ all threads and feed all engines.

    Args:
        config: Config of the run.
        task_rows: Number of requests in a task of an engine.
    """
    place = config.placement
    for_engines = min(max_rows(config), place.batch_size * place.max_engines // FETCHES_PER_ROUND)
    return task_rows * max(1, max(config.images.threads, for_engines) // task_rows)


def rows_at_once(rows_per_second: float, rows_left: int, engines: int, max_rows: int) -> int:
    """Return the number of requests that the next task may have, so that tasks are few; a batch where this is less.

    Engines that end few batches in a second get one at a time, as all of a cluster of GPUs together mostly do.

    Args:
        rows_per_second: Requests that all engines together end in a second.
        rows_left: Requests that no engine has been given yet.
        engines: Number of engines that are ready.
        max_rows: Most requests in a task, of `max_rows`.
    """
    wanted = math.ceil(rows_per_second / TASKS_PER_SECOND)
    return min(wanted, rows_left // (SHARE_LEFT * max(1, engines)), max_rows)


def max_rows(config: RunConfig) -> int:
    """Return the number of requests that several batches together may have, by TASK_ROWS and TASK_BYTES."""
    defaults = config.defaults
    row_bytes = 3 * (defaults.width * defaults.height if defaults.size == "fixed" else defaults.long_side**2)
    return min(TASK_ROWS, TASK_BYTES // row_bytes)
