"""Capacity of machines for a run: for its engines, and next to them for the tasks that read the manifest."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pia_batch.config import PlacementConfig

READ_CPUS = 1.0
"""CPUs of a task that reads the manifest, as for Ray's own readers. No other task next to engines needs more."""

_ROUNDING = 1e-6
"""Tolerance for Ray's unit, a ten-thousandth of a CPU: three engines with a third of a CPU each fit into one CPU."""


@dataclass(frozen=True)
class Node:
    """Resources of one machine that Ray may allocate.

    Attributes:
        cpus: Number of CPUs, as Ray counts them.
        gpus: Number of GPUs, as Ray counts them.
        memory_mb: Host memory in MiB; None if unknown, which counts as enough.
    """

    cpus: float
    gpus: float = 0.0
    memory_mb: float | None = None

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        """Return a node with Ray's own `resources`, in which memory is in bytes."""
        return cls(resources.get("CPU", 0), resources.get("GPU", 0), resources.get("memory", 0) / 2**20)


@dataclass(frozen=True)
class Shortage:
    """Resource of which the nodes have too little, and the remedy."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def local_cpus() -> int:
    """Return the CPUs of a Ray that a run starts here: this machine's, but at least one engine's and one reader's."""
    return max(2, os.cpu_count() or 2)


def find_shortage(place: PlacementConfig, nodes: Sequence[Node]) -> Shortage | None:
    """Return the resource shortage that would block the run on these nodes for ever, or None.

    Engines are placed first: `min_engines` of them, or as many as fit. They stay. If no placement of them leaves
    READ_CPUS on any node, the manifest is never read, and the engines wait for requests.

    Args:
        place: The run's placement.
        nodes: All nodes; a node that joins later may change the answer.
    """
    fitting = [_fitting_engines(place, node) for node in nodes]
    if not any(fitting):
        return _no_engine_fits(place, nodes)
    placed = min(place.min_engines, sum(fitting))
    with_reader = max(_engines_with_reader(place, nodes, fitting, at) for at in range(len(nodes)))
    return None if placed <= with_reader else _no_reader_fits(place, nodes, placed, with_reader)


def _no_engine_fits(place: PlacementConfig, nodes: Sequence[Node]) -> Shortage:
    memory = "" if place.memory_mb is None else f", and {place.memory_mb} MiB of memory (placement.memory_mb)"
    gpus = max((node.gpus for node in nodes), default=0)
    cpus = max((node.cpus for node in nodes), default=0)
    return Shortage(
        f"no room for one engine: it needs {place.num_gpus:g} GPUs and {place.num_cpus:g} CPUs{memory}, and no node "
        f"has more than {gpus:g} and {cpus:g}",
        "lower placement.num_gpus, placement.num_cpus or placement.memory_mb, or add a node that has as much",
    )


def _no_reader_fits(place: PlacementConfig, nodes: Sequence[Node], placed: int, with_reader: int) -> Shortage:
    remedies = [f"set placement.min_engines to {with_reader}"] if with_reader else []
    left = nodes[0].cpus - READ_CPUS
    if len(nodes) == 1 and left > 0 and placed == place.min_engines:
        remedies.append(f"set placement.num_cpus to {math.floor(100 * left / placed) / 100:g} or less")
    return Shortage(
        f"no CPU is left to read the manifest: {placed} engines of {place.num_cpus:g} CPUs (placement.min_engines, "
        f"placement.num_cpus) leave less than {READ_CPUS:g} on every node, of "
        f"{sum(node.cpus for node in nodes):g} CPUs in all",
        ", ".join([*remedies, "or add a CPU" if remedies else "add a CPU"]),
    )


def _fitting_engines(place: PlacementConfig, node: Node) -> int:
    """Return the number of engines that fit on a node."""
    fit = node.cpus / place.num_cpus
    if place.num_gpus:
        fit = min(fit, node.gpus / place.num_gpus)
    if place.memory_mb is not None and node.memory_mb is not None:
        fit = min(fit, node.memory_mb / place.memory_mb)
    return max(0, int(fit + _ROUNDING))


def _engines_with_reader(place: PlacementConfig, nodes: Sequence[Node], fitting: Sequence[int], at: int) -> int:
    """Return the number of engines that fit on all nodes while node `at` reads; 0 if it cannot read."""
    node = nodes[at]
    if node.cpus < READ_CPUS:
        return 0
    remaining = Node(node.cpus - READ_CPUS, node.gpus, node.memory_mb)
    return sum(fitting) - fitting[at] + _fitting_engines(place, remaining)
