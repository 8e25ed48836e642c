"""Connection probe: connects to Ray as a run does, disconnects, and prints what kept it from connecting, or null.

Reads the placement as JSON from standard input. A process of its own runs it, because Ray ends a process whose token it
refuses, and because a Ray that did not start leaves threads behind.
"""

from __future__ import annotations

import json
import sys

from pia_batch.config import PlacementConfig
from pia_batch.driver.ray_cluster import connect
from pia_batch.errors import PiaBatchError


def obstacle(place: PlacementConfig) -> str | None:
    """Return the message of the error that a run would end with before its first task, or None."""
    try:
        with connect(place):
            return None
    except PiaBatchError as err:
        return str(err)


if __name__ == "__main__":
    print(json.dumps(obstacle(PlacementConfig.model_validate_json(sys.stdin.read()))))  # noqa: T201 - its output
