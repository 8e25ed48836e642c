"""Cluster checks: the Ray that a run connects to, and its capacity for engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from pia_batch.config import PlacementConfig
from pia_batch.driver.preflight.finding import Finding, State
from pia_batch.planning.capacity import Node, find_shortage, local_cpus
from pia_batch.storage.uris import redacted_uri

_PROBE_S = 60.0
"""Seconds that a cluster has to list its nodes."""


def check_ray(place: PlacementConfig) -> Iterator[Finding]:
    """Check that Ray answers, and whether it asks for a token."""
    address = place.address
    if address == "local":
        yield Finding("ok", "ray", "the run starts a Ray of its own on this machine, and ends it")
        return
    from pia_batch.driver.authentication import (  # noqa: PLC0415 - Ray takes a second to import
        OPEN_REMEDY,
        authentication,
        connect_once,
    )

    shown, found = redacted_uri(address), authentication(address)
    if found == "token":
        yield Finding("ok", "ray", f"{shown} answers, and asks for its token")
        return
    state: State = "fail" if place.require_auth else "warn"
    if found == "none":
        message = f"{shown} answers, and asks for no token: everyone who can reach it can run any code there"
        yield Finding(state, "ray", message, OPEN_REMEDY)
        return
    try:
        connect_once(address)
    except (OSError, ValueError):
        remedy = "start the cluster, or correct placement.ray_address or RAY_ADDRESS"
        yield Finding("fail", "ray", f"nothing answers at {shown}", remedy)
        return
    message = f"{shown} answers, but not whether it asks for a token"
    yield Finding(state, "ray", message, "name the dashboard (http://HEAD:8265) or Ray's own address (HEAD:6379)")


def check_capacity(place: PlacementConfig, num_gpus: int) -> Iterator[Finding]:
    """Check that engines leave a CPU for reading the manifest, as far as the nodes are known before a run.

    Args:
        place: Placement of the run.
        num_gpus: Number of GPUs of this machine.
    """
    address = place.address
    if address == "local" and num_gpus < place.num_gpus:  # check_devices has reported it
        return
    if address == "local":
        nodes, where = [Node(local_cpus(), num_gpus)], "this machine"
    else:
        nodes, where = _nodes_of(address), f"the cluster at {redacted_uri(address)}"
    if not nodes:
        return
    found = find_shortage(place, nodes)
    has = f"{where} has {sum(node.cpus for node in nodes):g} CPUs on {len(nodes)} node{'s'[: len(nodes) > 1]}"
    if found is None:
        engines = "one engine" if place.min_engines == 1 else f"{place.min_engines} engines at once"
        yield Finding("ok", "capacity", f"{has}: enough for {engines} and for reading the manifest")
    elif address == "local":
        yield Finding("fail", "capacity", f"{has}: {found.problem}", found.remedy)
    else:
        remedy = f"{found.remedy}; a cluster that scales automatically may do so itself"
        yield Finding("warn", "capacity", f"{has}: {found.problem}", remedy)


def _nodes_of(address: str) -> list[Node]:
    """Return the nodes of a cluster; empty if it does not list them, or only its dashboard is known."""
    if "://" in address:
        return []
    command = [sys.executable, "-m", "pia_batch.driver.probes.ray_nodes", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=True)  # noqa: S603 - ours
        nodes = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return []
    return [Node.of(resources) for resources in nodes]
