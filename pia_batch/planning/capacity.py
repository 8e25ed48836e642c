"""Whether machines have room for a run: for its engines, and beside them for what reads the manifest."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pia_batch.config import PlacementConfig

READ_CPUS = 1.0
"""CPUs of a task that reads the manifest, as of Ray's own readers. Of what runs beside engines nothing takes more."""

_TINY = 1e-6
"""Ray counts in ten-thousandths of a CPU: three engines of a third of one fit into one."""


@dataclass(frozen=True)
class Node:
    """What Ray may give away of one machine.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs, as Ray counts them.
        memory_mb: host memory in MiB; None: not known, and taken for enough.
    """

    cpus: float
    gpus: float = 0.0
    memory_mb: float | None = None

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        """A node with Ray's own `resources`, memory in bytes."""
        return cls(resources.get("CPU", 0), resources.get("GPU", 0), resources.get("memory", 0) / 2**20)


@dataclass(frozen=True)
class Shortage:
    """What nodes have too little of, and what to do about it."""

    told: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.told}; {self.remedy}"


def cpus_here() -> int:
    """CPUs of a Ray that a run starts for itself: those of this machine, but at least one engine's and one reader's."""
    return max(2, os.cpu_count() or 2)


def shortage(place: PlacementConfig, nodes: Sequence[Node]) -> Shortage | None:
    """What a run would wait for without end on these nodes; None: nothing.

    Engines are placed first, `min_engines` of them or as many as there is room for, and they stay. If no placement of
    them leaves READ_CPUS on any node, the manifest is never read, and they have nothing to draw.

    Args:
        place: the run's.
        nodes: all that there are; nodes that join later may change the answer.
    """
    room = [_engines(place, node) for node in nodes]
    if not any(room):
        return _no_room(place, nodes)
    placed = min(place.min_engines, sum(room))
    beside = max(_beside_reading(place, nodes, room, at) for at in range(len(nodes)))
    return None if placed <= beside else _no_reading(place, nodes, placed, beside)


def _no_room(place: PlacementConfig, nodes: Sequence[Node]) -> Shortage:
    memory = "" if place.memory_mb is None else f", and {place.memory_mb} MiB of memory (placement.memory_mb)"
    gpus = max((node.gpus for node in nodes), default=0)
    cpus = max((node.cpus for node in nodes), default=0)
    return Shortage(
        f"no room for one engine: it needs {place.num_gpus:g} GPUs and {place.num_cpus:g} CPUs{memory}, and no node "
        f"has more than {gpus:g} and {cpus:g}",
        "lower placement.num_gpus, num_cpus or memory_mb, or add a node that has as much",
    )


def _no_reading(place: PlacementConfig, nodes: Sequence[Node], placed: int, beside: int) -> Shortage:
    remedies = [f"set placement.min_engines to {beside}"] if beside else []
    left = nodes[0].cpus - READ_CPUS
    if len(nodes) == 1 and left > 0 and placed == place.min_engines:
        remedies.append(f"set placement.num_cpus to {math.floor(100 * left / placed) / 100:g} or less")
    return Shortage(
        f"no CPU is left to read the manifest: {placed} engines of {place.num_cpus:g} CPUs (placement.min_engines, "
        f"num_cpus) leave less than {READ_CPUS:g} on every node, of {sum(node.cpus for node in nodes):g} CPUs in all",
        ", ".join([*remedies, "or add a CPU" if remedies else "add a CPU"]),
    )


def _engines(place: PlacementConfig, node: Node) -> int:
    """How many engines a node has room for."""
    fit = node.cpus / place.num_cpus
    if place.num_gpus:
        fit = min(fit, node.gpus / place.num_gpus)
    if place.memory_mb is not None and node.memory_mb is not None:
        fit = min(fit, node.memory_mb / place.memory_mb)
    return max(0, int(fit + _TINY))


def _beside_reading(place: PlacementConfig, nodes: Sequence[Node], room: Sequence[int], at: int) -> int:
    """How many engines all nodes have room for while node `at` reads; 0 where it cannot."""
    node = nodes[at]
    if node.cpus < READ_CPUS:
        return 0
    return sum(room) - room[at] + _engines(place, Node(node.cpus - READ_CPUS, node.gpus, node.memory_mb))
