"""Ray Data settings of the chain, and the resources by which Ray Data joins its steps to operators."""

from __future__ import annotations

import logging
from typing import Any

import ray.data

from pia_batch.planning.capacity import READ_CPUS

__all__ = ["ARRANGE_CPUS", "RANK_CPUS", "READ_CPUS", "VALIDATE_CPUS", "blocks", "configure"]

VALIDATE_CPUS, RANK_CPUS, ARRANGE_CPUS = 0.5, 0.35, 0.3
"""CPUs of a task. Ray Data makes one operator of neighbouring steps with equal resources. These values differ from
READ_CPUS and from each other, so that images are not fetched by the worker that reads, or by the one with the GPU."""


def blocks(num_cpus: float) -> dict[str, Any]:
    """Return the arguments of `map_batches` for a stage over whole blocks, as Arrow tables, in tasks of `num_cpus`."""
    return {"batch_format": "pyarrow", "batch_size": None, "num_cpus": num_cpus}


def configure() -> None:
    """Replace the defaults of Ray Data that would lose rows or restart too little."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0  # any other value reports lost blocks as success
    context.max_consecutive_actor_init_deaths = 1  # of actors that Ray cannot create; we count the others
    context.execution_no_progress_timeout_s = -1  # the driver's monitor distinguishes a waiting run from a stuck one
    context.raise_original_map_exception = True  # otherwise only the text of our own errors would reach the driver
    context.enable_progress_bars = False  # they count blocks of an operator; ours count requests
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the error that ends a run is raised, and reported once
