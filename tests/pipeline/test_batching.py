"""Sizes of tasks, by the numbers of a run."""

from collections.abc import Callable
from typing import Any

import pytest
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.pipeline import batching

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("settings", "requests", "batches"),
    [
        ({}, 511, 1),
        ({}, 64 * 8, 2),
        ({"placement__max_engines": 2}, 3000, 5),
        ({}, 10_000_000, 10),  # 42 pictures of 512 x 512 are 32 MiB
        ({"defaults__size": "auto", "defaults__long_side": 64}, 10_000_000, 16),
        ({"placement__max_engines": 64}, 64 * 64 * 8, 2),
        ({"placement__batch_size": 16}, 10_000_000, 2),
        ({"placement__batch_size": 64}, 10_000_000, 1),
        ({"budget__priority": "urgency"}, 10_000_000, 1),
    ],
)
def test_an_engine_is_given_several_batches_at_a_time_where_it_has_very_many(
    make_config: MakeConfig, settings: dict[str, Any], requests: int, batches: int
) -> None:
    big = {"defaults__width": 512, "defaults__height": 512, "placement__batch_size": 4}

    assert batching.batches_per_task(make_config(requests_table(1), **{**big, **settings}), requests) == batches


@pytest.mark.parametrize(
    ("threads", "task_rows", "rows"),
    [(16, 4, 16), (16, 5, 15), (8, 16, 16)],
)
def test_tasks_enough_for_every_thread_are_fetched_together(
    make_config: MakeConfig, threads: int, task_rows: int, rows: int
) -> None:
    config = make_config(requests_table(1), images__threads=threads)

    assert batching.fetch_rows(config, task_rows) == rows


@pytest.mark.parametrize(("engines", "side_px", "rows"), [(16, 64, 16), (64, 64, 64), (1000, 64, 64), (1000, 512, 40)])
def test_more_requests_are_fetched_together_for_many_engines(
    make_config: MakeConfig, engines: int, side_px: int, rows: int
) -> None:
    place = {"placement__max_engines": engines, "placement__batch_size": 4}
    config = make_config(requests_table(1), defaults__width=side_px, defaults__height=side_px, **place)

    assert batching.fetch_rows(config, task_rows=4) == rows
