"""Node of a Ray of a run's own, without the processes of Ray that a run does not use.

`ray.init` starts, before anything else, three programs for which it has no option: the API server, for whose imports it
waits even without a dashboard; the monitor, which adds nodes to a cluster; and the log monitor, which sends workers'
output to the driver. A run has no dashboard, adds no nodes to its own Ray, and leaves the output in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import node, worker
from ray._private.parameter import RayParams

from pia_batch.errors import InterruptedRunError


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


def check_processes() -> None:
    """Check that the programs of a Ray of our own still run, if this process has started one.

    Some seconds after one has ended, Ray ends this process too, without a message.

    Raises:
        InterruptedRunError: One has ended.
    """
    ended = _ended_programs()
    if ended:
        msg = (
            f"Ray has ended on this machine: {' and '.join(ended)}; everything finished is committed. Look for an "
            "out-of-memory kill in the system's log, use a larger machine or fewer engines, and start again to resume"
        )
        raise InterruptedRunError(msg)


def _ended_programs() -> list[str]:
    own = worker._global_node  # noqa: SLF001 - the node that `ray.init` has started
    if not isinstance(own, OwnNode):
        return []
    return [f"{name} (exit code {process.returncode})" for name, process in own.dead_processes()]
