"""Ray Data as the chain uses it: what it keeps of an execution, and of how many operators a run consists."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
from fakes import FakeControl
from inputs import requests_table
from ray.data._internal.logical.optimizers import get_execution_plan

from pia_batch.config import RunConfig
from pia_batch.pipeline import batching
from pia_batch.pipeline.chain import chain
from pia_batch.pipeline.larger_tasks import LargerTasks
from pia_batch.pipeline.ray_data import MAX_BLOCK_STATISTICS, BoundedStatistics, configure
from pia_batch.planning.plan import make_plan

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def context() -> Any:
    """A context of Ray Data of the test's own."""
    before = ray.data.DataContext.get_current()
    mine = before.copy()
    ray.data.DataContext._set_current(mine)
    yield mine
    ray.data.DataContext._set_current(before)


def test_statistics_of_blocks_stay_few_and_the_newest_are_kept() -> None:
    mapped = SimpleNamespace(_output_blocks_stats=[])
    executor = SimpleNamespace(_topology=[SimpleNamespace(), mapped])
    most = 0

    for block in range(10 * MAX_BLOCK_STATISTICS):
        mapped._output_blocks_stats.append(block)
        BoundedStatistics().on_execution_step(executor)
        most = max(most, len(mapped._output_blocks_stats))

    assert most == MAX_BLOCK_STATISTICS
    assert mapped._output_blocks_stats[-1] == 10 * MAX_BLOCK_STATISTICS - 1


def test_ray_data_calls_the_limit_of_statistics_once_however_often_it_is_configured(context: Any) -> None:
    configure()
    configure()

    assert context.execution_callback_classes.count(BoundedStatistics) == 1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")  # a chain begins with blocks in Ray's store
@pytest.mark.parametrize(("rows", "tasks"), [(3, 1), (64 * 2 * 16, 4)])
@pytest.mark.parametrize("fetch_cpus", [0.2, 0.25, 0.3, 0.35, 0.5, 1])
def test_fetched_requests_are_cut_to_tasks_by_the_step_that_fetches_them(
    make_config: MakeConfig, context: Any, rows: int, tasks: int, fetch_cpus: float
) -> None:
    assert context
    place = {"placement__batch_size": 4, "placement__max_engines": 2, "placement__num_cpus": 2}
    config = make_config(requests_table(rows), **place, placement__fetch_num_cpus=fetch_cpus)
    assert batching.batches_per_task(config, rows) == tasks

    steps, step = [], get_execution_plan(chain(make_plan(config), "run", FakeControl())._logical_plan)[0].dag
    while step.input_dependencies:
        steps.append(step.name)
        (step,) = step.input_dependencies

    fetch = "MapBatches(FetchImages)" + (
        "->StreamingRepartition[num_rows_per_block=4,strict=True]" if tasks == 1 else ""
    )
    cut = "StreamingRepartition[num_rows_per_block=16,strict=True]"
    read = "ReadManifest->MapBatches(Validate)->MapBatches(DropFinished)"
    assert steps == ["MapBatches(AnimateActor)", fetch, cut, read]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("priority", [None, "urgency"])
def test_requests_with_priorities_keep_their_order_and_others_may_be_given_together(
    make_config: MakeConfig, context: Any, priority: str | None
) -> None:
    config = make_config(requests_table(3, urgency=[3, 1, 2]), budget__priority=priority)

    mine = chain(make_plan(config), "run", FakeControl()).context

    assert mine.execution_options.preserve_order == (priority is not None)
    assert (LargerTasks in mine.execution_callback_classes) == (priority is None)
    assert not context.execution_options.preserve_order
    assert LargerTasks not in context.execution_callback_classes
