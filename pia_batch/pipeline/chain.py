"""The Ray Data chain from manifest to journal.

    reading → Validate → DropFinished → Arrange → FetchImages → Animate (commits inside)

Ray makes one operator of neighbours that ask for the same resources: of the first three, for what the driver spends on
a batch grows with the operators. The others ask for different ones, or images would be fetched on the GPU's worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.pipeline import animate, datasource, stages, worker_errors
from pia_batch.pipeline import engine_loader as engines
from pia_batch.pipeline.attempts import AttemptControl
from pia_batch.pipeline.heartbeat import Heartbeat
from pia_batch.pipeline.metrics import RayMeter
from pia_batch.planning.capacity import READ_CPUS
from pia_batch.planning.plan import Plan

VALIDATE_CPUS, RANK_CPUS, ARRANGE_CPUS = 0.5, 0.35, 0.3
"""They differ from READ_CPUS and from each other, see above."""

WINDOW, SMALL_WINDOW = 1024, 64
"""Requests that are put in order together; fewer where each brings its image along."""

IN_FLIGHT = 4
"""Tasks at or queued before one engine: two are worked on, two wait, so that the device never does."""

TASKS_PER_ENGINE = 256
"""A task has several batches where each engine has more tasks than these all the same, as the driver's time and memory
grow with the tasks. Engines that find none left while others end theirs lose less than a hundredth of the run."""

TASK_ROWS, TASK_BYTES = 64, 32 * 2**20
"""Requests in a task of several batches, and the bytes of their pixels, as far as the config's defaults tell."""

LoadEngines = Callable[[], engines.Engines]


def chain(
    plan: Plan, run_id: str, control: AttemptControl, load_engines: LoadEngines | None = None
) -> ray.data.Dataset:
    """The whole job as a lazy Dataset of `worker.OUTCOME` rows, one for each request that is left to do."""
    config = plan.config
    _own_the_settings()
    requests = (
        datasource.dataset(plan.manifest)
        .map_batches(stages.Validate(config, plan.engine_ids), **blocks(READ_CPUS))
        .map_batches(stages.DropFinished(plan.settled, plan.chosen), **blocks(READ_CPUS))
    )
    if len(plan.repeats):
        requests = requests.union(ray.data.from_arrow(plan.repeats))
    if config.budget.priority is not None:
        ranked = requests.map_batches(stages.Rank(config.budget.priority), **blocks(RANK_CPUS))
        requests = ranked.sort(stages.RANK, descending=True).drop_columns([stages.RANK])
    if plan.is_mixed:
        window = SMALL_WINDOW if "image_bytes" in plan.manifest.schema.names else WINDOW
        requests = requests.repartition(target_num_rows_per_block=window, strict=True).map_batches(
            stages.Arrange(config.images, plan.manifest.folder), **blocks(ARRANGE_CPUS)
        )
    drawn = {name: plan.engine_ids[name] for name in plan.models}
    loader = load_engines or engine_loader(config)
    stage = {"load_engines": loader, "engine_ids": drawn, "config": config, "run_id": run_id, "control": control}
    fetch = stages.FetchImages(config.images, plan.manifest.folder)
    return draw_in_pool(requests, config, fetch, Animate, stage, batches_per_task(config, plan.num_chosen))


def batches_per_task(config: RunConfig, num_requests: int) -> int:
    """How many batches an engine is given at a time: one, unless there are very many requests for each engine.

    With priorities it is always one, for what is in a task goes before all that comes after it.
    """
    place, defaults = config.placement, config.defaults
    if config.budget.priority is not None:
        return 1
    row_bytes = 3 * (defaults.width * defaults.height if defaults.size == "fixed" else defaults.long_side**2)
    rows = min(TASK_ROWS, TASK_BYTES // row_bytes, num_requests // (TASKS_PER_ENGINE * place.max_engines))
    return max(1, rows // place.batch_size)


def engine_loader(config: RunConfig) -> engines.EngineLoader:
    """What gives each worker the engines of the config's models."""
    device = "cuda" if config.placement.num_gpus else "cpu"
    return engines.EngineLoader(config.all_models, device, config.placement.max_models)


def draw_in_pool(
    requests: ray.data.Dataset,
    config: RunConfig,
    fetch: Callable[[pa.Table], pa.Table],
    stage: type[Animate],
    arguments: Mapping[str, Any],
    batches: int = 1,
) -> ray.data.Dataset:
    """Requests in batches, their images fetched, through a pool of actors as `placement` has it.

    Args:
        requests: as `stages.Validate` gives them.
        config: the run's config.
        fetch: gives a block of them its images, as `stages.FetchImages` does.
        stage: what each actor holds.
        arguments: of its constructor, by name.
        batches: how many of them an actor is given at a time.
    """
    place = config.placement
    task = together = place.batch_size * batches
    if config.budget.priority is None:  # what is fetched at once; with priorities no more, as tasks overtake each other
        together *= max(1, config.images.threads // task)
    return (
        requests.repartition(target_num_rows_per_block=together, strict=True)
        .map_batches(fetch, **blocks(place.fetch_num_cpus))
        .repartition(target_num_rows_per_block=task, strict=True)
        .map_batches(
            stage,
            fn_constructor_kwargs={**arguments, "version": __version__, "count": RayMeter().count},
            batch_size=place.batch_size,
            batch_format="pyarrow",
            num_gpus=place.num_gpus,
            num_cpus=place.num_cpus,
            memory=None if place.memory_mb is None else place.memory_mb * 2**20,
            compute=ray.data.ActorPoolStrategy(
                min_size=place.min_engines,
                max_size=place.max_engines,
                max_tasks_in_flight_per_actor=IN_FLIGHT,
                # One batch is encoded and committed while the next is on the device; Animate sees to the order.
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
        )
    )


class Animate(animate.Animate):
    """`worker.Animate` as Ray wants it: what goes wrong in its start comes as the error of a call, whole.

    From a constructor Ray would try it again, and then hand on its text only.
    """

    def __init__(self, version: str, **arguments: Any) -> None:
        self._mistake: Exception | None = None
        try:
            worker_errors.show_log()
            worker_errors.check_version(version)
            Heartbeat(arguments["control"], lambda: self.generating_seconds)
            super().__init__(worker=ray.get_runtime_context().get_actor_id() or "", **arguments)
        except Exception as err:  # noqa: BLE001 - every library has its own classes for a device that it cannot use
            self._mistake = worker_errors.explain(err)

    def __call__(self, requests: pa.Table) -> pa.Table:
        """As `worker.Animate`, or the error that its constructor met."""
        if self._mistake is not None:
            raise self._mistake
        return super().__call__(requests)


def blocks(num_cpus: float) -> dict[str, Any]:
    """How `map_batches` gives a stage whole blocks as Arrow tables, in tasks that take so many CPUs."""
    return {"batch_format": "pyarrow", "batch_size": None, "num_cpus": num_cpus}


def _own_the_settings() -> None:
    """Ray Data's own defaults would lose rows, or start too little again."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0  # anything else reports lost blocks as success
    context.max_consecutive_actor_init_deaths = 1  # of actors that Ray cannot even make; the tracker counts the others
    context.execution_no_progress_timeout_s = -1  # _Watchman knows a run that waits from one that is stuck
    context.raise_original_map_exception = True  # or only the text of our own errors would reach the driver
    context.enable_progress_bars = False  # blocks of an operator; ours count requests
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is raised, and told once
