"""Errors in the start of an actor, and what makes the pool grow, without a running Ray."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from animated import fetched
from fakes import ENGINE_ID, FakeControl, FakeEngine, FakeShelf
from inputs import requests_table
from ray.data import DataContext

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.config.execution import PlacementConfig
from pia_batch.errors import ConfigError
from pia_batch.journal.log import Journal
from pia_batch.pipeline import ray_data
from pia_batch.pipeline.actor import AnimateActor, in_actor_pool
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def test_an_error_of_the_start_is_raised_whole_by_every_call() -> None:
    actor = AnimateActor("99.0", FakeControl())

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"and the driver 99\.0; install one version"):
            actor(None)
    assert actor._generating_seconds() is None


def test_the_end_of_a_task_is_reported_before_the_next_heartbeat_is_due(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "actor-1"))
    config, control, started = make_config(requests_table(2)), FakeControl(), time.monotonic()
    store = Store(config.output)
    actor = AnimateActor(
        __version__,
        control,
        load_engines=lambda: FakeShelf(FakeEngine(seconds=0.05)),
        engine_ids={"default": ENGINE_ID},
        config=config,
        run_id="run-1",
        objects=store,
        commits=Journal(store),
    )

    actor(fetched(config))

    activity = control.activity()
    assert 0.05 <= activity.generating_seconds < activity.reported_seconds < time.monotonic() - started
    assert activity.starting == 0


def test_full_engines_reach_the_use_from_which_ray_data_adds_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    context = DataContext()
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    ray_data.configure()
    requests = SimpleNamespace(map_batches=lambda _, **options: options["compute"])

    pool: Any = in_actor_pool(requests, PlacementConfig(min_engines=1, max_engines=3), AnimateActor, {})

    threshold = context.autoscaling_config.actor_pool_util_upscaling_threshold
    assert pool.max_tasks_in_flight_per_actor / pool.max_concurrent_calls_per_actor >= threshold > 1
