"""Errors in the start of an actor, and what makes the pool grow, without a running Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeControl
from ray.data import DataContext

from pia_batch.config.execution import PlacementConfig
from pia_batch.errors import ConfigError
from pia_batch.pipeline import ray_data
from pia_batch.pipeline.actor import AnimateActor, in_actor_pool


def test_an_error_of_the_start_is_raised_whole_by_every_call() -> None:
    actor = AnimateActor("99.0", FakeControl())

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"and the driver 99\.0; install one version"):
            actor(None)
    assert actor._generating_seconds() is None


def test_full_engines_reach_the_use_from_which_ray_data_adds_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    context = DataContext()
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    ray_data.configure()
    requests = SimpleNamespace(map_batches=lambda _, **options: options["compute"])

    pool: Any = in_actor_pool(requests, PlacementConfig(min_engines=1, max_engines=3), AnimateActor, {})

    threshold = context.autoscaling_config.actor_pool_util_upscaling_threshold
    assert pool.max_tasks_in_flight_per_actor / pool.max_concurrent_calls_per_actor >= threshold > 1
