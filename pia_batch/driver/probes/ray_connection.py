"""Connection probe: connects to Ray as a run does, disconnects, and prints what kept it from that, or null.

On a Ray of its own it runs one task, too: a worker may meet limits of this machine that Ray's start does not. Reads the
placement as JSON from standard input. A process of its own runs it, because Ray ends a process whose token it refuses,
and because a Ray that did not start leaves threads behind.
"""

from __future__ import annotations

import json
import sys

import ray

from pia_batch.config import PlacementConfig
from pia_batch.driver import own_ray
from pia_batch.driver.ray_cluster import connect
from pia_batch.errors import PiaBatchError


def obstacle(place: PlacementConfig) -> str | None:
    """Return the message of the error that a run would end with before its first task, or None."""
    try:
        with connect(place):
            if place.address == "local":
                _run_task()
            return None
    except PiaBatchError as err:
        return str(err)


def _run_task() -> None:
    """Run an empty task.

    Raises:
        ConfigError: No worker ran it.
    """

    def nothing() -> None:
        pass

    try:
        ray.get(ray.remote(num_cpus=0)(nothing).remote(), timeout=own_ray.TASK_S)
    except ray.exceptions.RayError as err:
        raise own_ray.explain_task(err) from None


if __name__ == "__main__":
    print(json.dumps(obstacle(PlacementConfig.model_validate_json(sys.stdin.read()))))  # noqa: T201 - its output
