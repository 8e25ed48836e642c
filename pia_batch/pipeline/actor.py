"""Ray actor that holds an `Animate`, and the pool of such actors at the end of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch import __version__
from pia_batch.config.execution import PlacementConfig
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.animate import Animate, WorkerProcess
from pia_batch.pipeline.heartbeat import Heartbeat
from pia_batch.pipeline.metrics import RayMeter

TASKS_IN_FLIGHT = 3
"""Tasks at or queued before one engine: two are in work, and one waits, so that the device never does. With more, the
faster engines would idle at the end of a run while tasks wait for slower ones."""

CALLS_PER_ENGINE = 2
"""Tasks that an engine has in work: one is encoded and committed while the next one is on the device; `Animate` keeps
the order."""


class AnimateActor:
    """Holder of an `Animate` in a worker of Ray. An error in its start is raised, whole, by the first call.

    If the constructor raised it, Ray would retry the constructor, and then pass on only the text of the error.

    Args:
        driver_version: Version of this package on the driver.
        control: Permission for each batch; it receives the heartbeats too.
        arguments: Further arguments of `Animate`.
    """

    def __init__(self, driver_version: str, control: Any, **arguments: Any) -> None:
        self._animate: Animate | None = None
        self._start_error: Exception | None = None
        try:
            worker_errors.show_log()
            worker_errors.check_version(driver_version)
            self._heartbeat = Heartbeat(control, self._generating_seconds)
            process = WorkerProcess(ray.get_runtime_context().get_actor_id() or "", count=RayMeter().count)
            self._animate = Animate(control=control, process=process, **arguments)
        except Exception as err:  # noqa: BLE001 - every library has its own classes for a device that it cannot use
            self._start_error = worker_errors.explain(err)

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Call `Animate`, or raise the error of the start."""
        if self._animate is None:
            raise self._start_error or AssertionError
        outcomes = self._animate(requests)
        self._heartbeat.send()
        return outcomes

    def _generating_seconds(self) -> float | None:
        """Return the seconds of generation so far, or None while the engine loads."""
        return None if self._animate is None else self._animate.generating_seconds


def in_actor_pool(
    requests: ray.data.Dataset, place: PlacementConfig, actor: type, arguments: Mapping[str, Any]
) -> ray.data.Dataset:
    """Pass requests, in batches, through a pool of actors.

    Args:
        requests: Fetched requests, one task of an actor to a block.
        place: Size of a batch, resources of an actor, and number of actors.
        actor: Class of the actors, such as AnimateActor.
        arguments: Arguments of its constructor, without `driver_version`.
    """
    return requests.map_batches(
        actor,
        fn_constructor_kwargs={**arguments, "driver_version": __version__},
        batch_size=place.batch_size,
        batch_format="pyarrow",
        num_gpus=place.num_gpus,
        num_cpus=place.num_cpus,
        memory=None if place.memory_mb is None else place.memory_mb * 2**20,
        compute=ray.data.ActorPoolStrategy(
            min_size=place.min_engines,
            max_size=place.max_engines,
            max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT,
            max_concurrent_calls_per_actor=CALLS_PER_ENGINE,
            enable_true_multi_threading=True,
        ),
    )
