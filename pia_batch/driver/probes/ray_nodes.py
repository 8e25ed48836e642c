"""Ray probe: prints the resources of every live node of the cluster at the address that is its argument.

A process of its own runs it, because Ray ends a process whose token it refuses.
"""

from __future__ import annotations

import json
import sys

from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without a stub

_ALIVE = 0
"""State of a live node in Ray's protocol."""


def resources(address: str) -> list[dict[str, float]]:
    """Return the total resources of each live node, by Ray's names."""
    client = GcsClient(address=canonicalize_bootstrap_address(address))
    nodes = client.get_all_node_info(timeout=30).values()
    return [dict(node.resources_total) for node in nodes if node.state == _ALIVE]


if __name__ == "__main__":
    print(json.dumps(resources(sys.argv[1])))  # noqa: T201 - its output
