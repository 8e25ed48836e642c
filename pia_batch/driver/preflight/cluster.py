"""Cluster checks: the Ray that a run connects to, and its capacity for engines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator

from pia_batch.config import PlacementConfig
from pia_batch.driver import own_ray
from pia_batch.driver.preflight.finding import Finding, State
from pia_batch.driver.ray_address import check_address
from pia_batch.errors import MESSAGE_LENGTH, ConfigError, message_of, printable
from pia_batch.planning.capacity import Node, find_shortage, local_cpus
from pia_batch.planning.child_python import child_environment, module_command
from pia_batch.storage.uris import redacted_uri

_START_S = 180.0
"""Seconds that a Ray has to start, or to accept a connection; a busy machine of two cores takes 20."""

_PROBE_S = 60.0
"""Seconds that a cluster has to list its nodes."""


def find_obstacle(place: PlacementConfig) -> str | None:
    """Return what keeps a run from connecting to Ray, or None; found by a process that connects as a run does."""
    command = module_command("pia_batch.driver.probes.ray_connection")
    try:
        done = subprocess.run(  # noqa: S603 - ours
            command,
            input=place.model_dump_json(),
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"Ray did not answer within {_START_S:g} s; look at the load, the memory and the limits of this machine"
    except OSError as err:
        return f"cannot start a process: {message_of(err)}; raise the limits of memory and processes (`ulimit -a`)"
    try:
        found: str | None = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if place.address == "local":
            return str(own_ray.explain_end(lines[-1].strip()))
        return f"Ray ended the process that connected to it: {printable(lines[-1])[:MESSAGE_LENGTH]}"
    return found


def check_ray(place: PlacementConfig, connection: Callable[[PlacementConfig], str | None]) -> Iterator[Finding]:
    """Check that a run can start its own Ray, or connect to the cluster, and whether the cluster asks for a token.

    Args:
        place: Placement of the run.
        connection: Function that connects as a run does, and returns what kept it from that; such as `find_obstacle`.
    """
    address = place.address
    try:
        check_address(address)
    except ConfigError as err:
        problem, _, remedy = str(err).partition("; ")
        yield Finding("fail", "ray", problem, remedy)
        return
    if address != "local" and (found := _token_finding(place)):
        yield found
        if found.state == "fail":
            return
    obstacle = connection(place)
    if obstacle is not None:
        problem, _, remedy = obstacle.partition("; ")
        yield Finding("fail", "ray", problem, remedy or "correct placement.ray_address or RAY_ADDRESS")
    elif address == "local":
        yield Finding("ok", "ray", "a Ray of the run's own starts on this machine, and ends with the run")
    else:
        yield Finding("ok", "ray", f"a run connects to {redacted_uri(address)}")


def _token_finding(place: PlacementConfig) -> Finding | None:
    """Return whether a cluster asks for a token; None if that is not known yet, and its address is wrong or silent."""
    from pia_batch.driver.authentication import (  # noqa: PLC0415 - Ray takes a second to import
        OPEN_REMEDY,
        authentication,
        connect_once,
    )

    address = place.address
    if "://" in address or address == "auto":
        return None
    shown, found = redacted_uri(address), authentication(address)
    if found == "token":
        return Finding("ok", "ray", f"{shown} answers, and asks for its token")
    state: State = "fail" if place.require_auth else "warn"
    if found == "none":
        message = f"{shown} answers, and asks for no token: everyone who can reach it can run any code there"
        return Finding(state, "ray", message, OPEN_REMEDY)
    try:
        connect_once(address)
    except (OSError, ValueError):
        remedy = "start the cluster, or correct placement.ray_address or RAY_ADDRESS"
        return Finding("fail", "ray", f"nothing answers at {shown}", remedy)
    message = f"{shown} answers, but not whether it asks for a token"
    return Finding(state, "ray", message, "name Ray's own address (HEAD:6379)")


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
    if "://" in address or address == "auto":
        return []
    command = module_command("pia_batch.driver.probes.ray_nodes", address)
    try:
        done = subprocess.run(  # noqa: S603 - ours
            command, env=child_environment(), capture_output=True, text=True, timeout=_PROBE_S, check=True
        )
        nodes = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return []
    return [Node.of(resources) for resources in nodes]
