"""Ray Data settings of the chain, and the resources by which Ray Data joins its steps to operators."""

from __future__ import annotations

import logging
from typing import Any

import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pia_batch.planning.capacity import READ_CPUS

__all__ = [
    "ARRANGE_CPUS",
    "BLOCKS_IN_BUFFER",
    "MAX_BLOCK_STATISTICS",
    "RANK_CPUS",
    "READ_CPUS",
    "SPLIT_CPUS",
    "VALIDATE_CPUS",
    "BoundedStatistics",
    "blocks",
    "configure",
    "repartitioned",
]

VALIDATE_CPUS, RANK_CPUS, ARRANGE_CPUS, SPLIT_CPUS = 0.5, 0.35, 0.3, 0.2
"""CPUs of a task. Ray Data makes one operator of neighbouring steps with equal resources. These values differ from
READ_CPUS and from each other, so that images are not fetched by the worker that reads, or by the one with the GPU."""


def blocks(num_cpus: float) -> dict[str, Any]:
    """Return the arguments of `map_batches` for a stage over whole blocks, as Arrow tables, in tasks of `num_cpus`."""
    return {"batch_format": "pyarrow", "batch_size": None, "num_cpus": num_cpus}


def repartitioned(rows: ray.data.Dataset, num_rows: int, num_cpus: float) -> ray.data.Dataset:
    """Return the rows in blocks of `num_rows`; only the last one may be smaller.

    Ray Data joins this step to a preceding `map_batches` of as many CPUs whose `batch_size` is a multiple of
    `num_rows`. As an operator of its own it costs the driver time, and delays every block by steps of its loop.

    Args:
        rows: Rows in blocks of any size.
        num_rows: Number of rows in a block.
        num_cpus: CPUs of a task. `Dataset.repartition` has no way to set them; they would be 1.
    """
    rows = rows.repartition(target_num_rows_per_block=num_rows, strict=True)
    step = rows._logical_plan.dag  # noqa: SLF001 - Ray Data has no public way
    step.ray_remote_args["num_cpus"] = num_cpus
    return rows


BLOCKS_IN_BUFFER = 8
"""Number of blocks that a task may have ready before the driver takes them. With the 2 of Ray Data a task gives the
engines two blocks in each step of the driver's loop, and a step takes at least 0.1 s."""

MAX_BLOCK_STATISTICS = 1000
"""Maximum number of blocks whose statistics each operator keeps, at about 900 bytes a block."""


class BoundedStatistics(ExecutionCallback):  # type: ignore[misc] # Ray is untyped here
    """Callback that limits the statistics of an execution, which Ray Data keeps of every block until its end.

    Ray Data reads them only for the summary that `Dataset.stats` returns, and a run does not show that.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Forget the statistics of the oldest blocks; called at every step of the driver's scheduling loop."""
        for operator in executor._topology or ():  # noqa: SLF001 - Ray Data has no public way
            statistics: list[Any] = getattr(operator, "_output_blocks_stats", [])
            if len(statistics) > MAX_BLOCK_STATISTICS:
                del statistics[: -MAX_BLOCK_STATISTICS // 2]


def configure() -> None:
    """Replace the defaults of Ray Data that would lose rows, restart too little or keep too much."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0  # any other value reports lost blocks as success
    context.max_consecutive_actor_init_deaths = 1  # of actors that Ray cannot create; we count the others
    context.execution_no_progress_timeout_s = -1  # the driver's monitor distinguishes a waiting run from a stuck one
    context.raise_original_map_exception = True  # otherwise only the text of our own errors would reach the driver
    # Ray Data's 1.75 would need four tasks in flight before it adds engines; actor.TASKS_IN_FLIGHT are three.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.25
    context.memory_usage_poll_interval_s = None  # a thread in every task, for statistics that a run does not show
    context._max_num_blocks_in_streaming_gen_buffer = BLOCKS_IN_BUFFER  # noqa: SLF001 - Ray Data has no public way
    context.enable_progress_bars = False  # they count blocks of an operator; ours count requests
    if BoundedStatistics not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(BoundedStatistics)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the error that ends a run is raised, and reported once
