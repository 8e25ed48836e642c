"""Ray Data chain from the manifest to the journal.

    read → Validate → DropFinished → Arrange → FetchImages → Animate (which commits)

Ray Data makes one operator of neighbouring steps with equal resources: here of the first three, because the driver's
cost of a batch grows with the number of operators. The other steps have resources of their own (`ray_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch.config import RunConfig
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.pipeline import batching, datasource, larger_tasks, ray_data, stages
from pia_batch.pipeline.actor import AnimateActor, in_actor_pool
from pia_batch.pipeline.attempts import AttemptControl
from pia_batch.pipeline.engine_loader import EngineLoader, LoadEngines
from pia_batch.pipeline.larger_tasks import Load
from pia_batch.pipeline.request_rows import with_row_error
from pia_batch.planning.plan import Plan
from pia_batch.schema.columns import RANK
from pia_batch.storage.object_store import Store


def chain(
    plan: Plan, run_id: str, control: AttemptControl, load_engines: LoadEngines | None = None
) -> ray.data.Dataset:
    """Return the whole job as a lazy Dataset of `outcomes.OUTCOME` rows, one for each pending request."""
    config, folder = plan.config, plan.manifest.folder
    store = Store(config.output, layout.CREATE_ONLY_PROBE)
    fetch = stages.FetchImages(config.images, folder, config.original_models)
    animate = {
        "load_engines": load_engines or EngineLoader.of(config),
        "engine_ids": {name: plan.engine_ids[name] for name in plan.models},
        "config": config,
        "run_id": run_id,
        "control": control,
        "objects": store,
        "commits": Journal(store),
    }
    batches = batching.batches_per_task(config, plan.num_selected)
    return fetched_and_animated(
        pending_requests(plan), config, fetch, AnimateActor, animate, batches, plan.num_selected
    )


def pending_requests(plan: Plan) -> ray.data.Dataset:
    """Return the requests that a run animates, in the order in which they are fetched, as a lazy Dataset."""
    ray_data.configure()
    validate = stages.Validate(plan.config, plan.engine_ids, plan.model_limits)
    drop_finished = stages.DropFinished(plan.skipped, plan.selected)
    requests = datasource.dataset(plan.manifest)
    requests = requests.map_batches(validate, **ray_data.blocks(ray_data.READ_CPUS))
    requests = requests.map_batches(drop_finished, **ray_data.blocks(ray_data.READ_CPUS))
    requests = _with_repeats(requests, plan)
    requests = _by_priority(requests, plan.config)
    return _arranged(requests, plan)


def _with_repeats(requests: ray.data.Dataset, plan: Plan) -> ray.data.Dataset:
    """Add the requests that stand in several rows of the manifest, once each."""
    if not len(plan.repeats):
        return requests
    return requests.union(ray.data.from_arrow(with_row_error(plan.repeats)))


def _by_priority(requests: ray.data.Dataset, config: RunConfig) -> ray.data.Dataset:
    """Sort the requests by the config's priority column, if it names one."""
    if config.budget.priority is None:
        return requests
    ranked = requests.map_batches(stages.Rank(config.budget.priority), **ray_data.blocks(ray_data.RANK_CPUS))
    return ranked.sort(RANK, descending=True).drop_columns([RANK])


def _arranged(requests: ray.data.Dataset, plan: Plan) -> ray.data.Dataset:
    """Arrange the requests so that neighbours share a batch, if they differ in what a batch has in common."""
    if not plan.is_mixed:
        return requests
    window = batching.SMALL_WINDOW if "image_bytes" in plan.manifest.schema.names else batching.WINDOW
    config = plan.config
    arrange = stages.Arrange(config.images, plan.manifest.folder, config.original_models)
    windows = requests.repartition(target_num_rows_per_block=window, strict=True)
    return windows.map_batches(arrange, **ray_data.blocks(ray_data.ARRANGE_CPUS))


def fetched_and_animated(
    requests: ray.data.Dataset,
    config: RunConfig,
    fetch: Callable[[pa.Table], pa.Table],
    actor: type,
    arguments: Mapping[str, Any],
    batches: int = 1,
    num_requests: int | None = None,
) -> ray.data.Dataset:
    """Fetch the images of requests, and pass them in batches through a pool of actors.

    Args:
        requests: Requests as `stages.Validate` gives them.
        config: Config of the run.
        fetch: Stage that adds the images to a block, such as `stages.FetchImages`.
        actor: Class of the actors.
        arguments: Arguments of its constructor, by name.
        batches: Number of batches that an actor is given at a time.
        num_requests: Number of requests, where an actor may be given more at a time if that makes it faster.
    """
    place = config.placement
    task_rows = place.batch_size * batches
    together = batching.fetch_rows(config, task_rows)
    requests = ray_data.repartitioned(requests, together, ray_data.SPLIT_CPUS)
    requests = requests.map_batches(fetch, **ray_data.blocks(place.fetch_num_cpus) | {"batch_size": together})
    if together != task_rows:  # else the blocks are those of the tasks already
        requests = ray_data.repartitioned(requests, task_rows, place.fetch_num_cpus)
    animated = in_actor_pool(requests, place, actor, arguments)
    if config.budget.priority is not None:
        animated.context.execution_options.preserve_order = True
    elif num_requests is not None:
        larger_tasks.allow(animated, Load(num_requests, batching.max_rows(config)))
    return animated
