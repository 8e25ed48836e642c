"""Node of a Ray of a run's own, without the processes of Ray that a run does not use.

`ray.init` starts, before anything else, three programs for which it has no option: the API server, for whose imports it
waits even without a dashboard; the monitor, which adds nodes to a cluster; and the log monitor, which sends workers'
output to the driver. A run has no dashboard, adds no nodes to its own Ray, and leaves the output in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import node
from ray._private.parameter import RayParams


class OwnNode(node.Node):  # type: ignore[misc] # Ray is untyped here
    """Head node of one process's Ray, without API server, monitor and log monitor."""

    def __init__(self, ray_params: RayParams, **options: Any) -> None:
        # At its default port, the node's agent would wait 3.4 s if another Ray of this machine has it.
        ray_params.update(no_monitor=True, include_log_monitor=False, dashboard_agent_listen_port=0)
        super().__init__(ray_params, **options)

    def start_api_server(self, **_: Any) -> None:
        """Start nothing; there is no dashboard's URL."""
        self._webui_url = None


@contextmanager
def started_by_init() -> Iterator[None]:
    """Context in which `ray.init` starts an `OwnNode`."""
    before = node.Node
    node.Node = OwnNode
    try:
        yield
    finally:
        node.Node = before
