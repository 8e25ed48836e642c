from __future__ import annotations

import itertools
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.config import PlacementConfig
from pia_batch.planning import capacity
from pia_batch.planning.capacity import READ_CPUS, Node, find_shortage


def place(**settings: float) -> PlacementConfig:
    settings.setdefault("max_engines", settings.get("min_engines", 1))
    return PlacementConfig.model_validate({"fetch_num_cpus": 0.01} | settings)


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ({}, [Node(2)]),
        ({"min_engines": 3}, [Node(4)]),
        ({"min_engines": 4, "num_cpus": 0.75}, [Node(4)]),
        ({"min_engines": 1, "max_engines": 8}, [Node(2)]),  # those beyond the first come while there is work
        ({"min_engines": 9, "num_gpus": 1}, [Node(4, gpus=1)]),  # one is placed, and the others wait
        ({"min_engines": 4, "num_cpus": 1}, [Node(4), Node(1)]),
        ({"min_engines": 3, "num_cpus": 1 / 3}, [Node(2)]),
        ({"memory_mb": 1000}, [Node(2, memory_mb=1000)]),
    ],
)
def test_engines_and_reading_fit(settings: dict[str, float], nodes: list[Node]) -> None:
    assert find_shortage(place(**settings), nodes) is None


@pytest.mark.parametrize(
    ("settings", "nodes", "problem", "remedy"),
    [
        (
            {"min_engines": 4},
            [Node(4)],
            "4 engines of 1 CPUs",
            "set placement.min_engines to 3, set placement.num_cpus to 0.75",
        ),
        ({"min_engines": 7, "num_cpus": 0.5}, [Node(4)], "7 engines of 0.5 CPUs", "placement.min_engines to 6"),
        ({"min_engines": 9, "num_cpus": 1}, [Node(4)], "4 engines of 1 CPUs", "placement.min_engines to 3"),
        ({"num_cpus": 3.5}, [Node(4)], "1 engines of 3.5 CPUs", "placement.num_cpus to 3 or less, or add a CPU"),
        (
            {"min_engines": 2, "num_cpus": 3.5},
            [Node(4), Node(4)],
            "of 8 CPUs in all",
            "placement.min_engines to 1, or add",
        ),
        ({"num_cpus": 8}, [Node(4)], "no room for one engine: it needs 0 GPUs and 8 CPUs", "add a node"),
        ({"num_gpus": 1}, [Node(4)], "no node has more than 0 and 4", "lower placement.num_gpus"),
        ({"memory_mb": 9000}, [Node(4, memory_mb=8000)], "9000 MiB of memory (placement.memory_mb)", "memory_mb"),
        ({}, [], "no room for one engine", "add a node"),
    ],
)
def test_a_shortage_names_the_settings_to_change(
    settings: dict[str, float], nodes: list[Node], problem: str, remedy: str
) -> None:
    short = find_shortage(place(**settings), nodes)

    assert short is not None
    assert problem in short.problem
    assert remedy in short.remedy


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    st.sampled_from([0, 1]),
)
def test_a_run_is_short_of_cpus_if_no_placement_of_its_engines_leaves_one(
    sizes: list[tuple[int, int]], min_engines: int, num_cpus: float, num_gpus: int
) -> None:
    def fits(counts: tuple[int, ...]) -> bool:
        return all(n * num_cpus <= cpus and n * num_gpus <= gpus for n, (cpus, gpus) in zip(counts, sizes, strict=True))

    placements = [counts for counts in itertools.product(range(9), repeat=len(sizes)) if fits(counts)]
    placed = min(min_engines, max(map(sum, placements)))
    can_read = placed > 0 and any(
        sum(counts) >= placed
        and any(cpus - n * num_cpus >= READ_CPUS for n, (cpus, _) in zip(counts, sizes, strict=True))
        for counts in placements
    )

    found = find_shortage(
        place(min_engines=min_engines, num_cpus=num_cpus, num_gpus=num_gpus), [Node(cpus, gpus) for cpus, gpus in sizes]
    )

    assert (found is None) == can_read


@pytest.mark.parametrize(("min_engines", "num_cpus"), [(4, 1.0), (7, 0.5), (9, 1.0), (3, 1.1), (1, 3.5)])
def test_either_remedy_helps(min_engines: int, num_cpus: float) -> None:
    nodes = [Node(4)]
    short = find_shortage(place(min_engines=min_engines, num_cpus=num_cpus), nodes)

    assert short is not None
    found = dict(re.findall(r"set placement\.(\w+) to ([\d.]+)", short.remedy))
    assert found
    for name, value in found.items():
        remedied = {"min_engines": min_engines, "num_cpus": num_cpus} | {name: float(value)}
        assert find_shortage(place(**remedied), nodes) is None


def test_a_ray_of_our_own_has_room_for_the_default_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    assert find_shortage(PlacementConfig(), [Node(capacity.local_cpus())]) is None
