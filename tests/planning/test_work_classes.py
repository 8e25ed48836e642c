from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import requests_table
from manifest_statistics import tables

from pia_batch.config import RunConfig
from pia_batch.manifest.validation import check
from pia_batch.planning.statistics import CLASS, WORK, WorkClasses, work_of
from pia_batch.schema.columns import GROUPED

CONFIG = RunConfig.load(None, {"manifest": "m", "output": "o"})


def checked(table: pa.Table) -> Any:
    return check(table, CONFIG, {"default": "e" * 32})


def classes_of(table: pa.Table) -> WorkClasses:
    return WorkClasses.of(table, checked(table).requests)


def by_row(work_classes: WorkClasses) -> list[dict[str, Any]]:
    """The class of each good row."""
    rows: list[dict[str, Any]] = work_classes.classes.take(pa.array(work_classes.class_of)).to_pylist()
    return rows


def assert_same(one: WorkClasses, other: WorkClasses) -> None:
    assert (one.num_rows, +one.num_given, by_row(one)) == (other.num_rows, +other.num_given, by_row(other))
    assert one.classes.schema == other.classes.schema == CLASS
    assert len(one.classes) == len(other.classes) == len(set(map(str, by_row(one))))
    assert (one.seeds is None) == (other.seeds is None)
    assert one.seeds is None or np.array_equal(one.seeds, other.seeds)


@pytest.mark.parametrize(
    ("columns", "steps"),
    [
        ({"num_inference_steps": [25]}, 25),
        ({"num_inference_steps": [25], "strength": [0.5]}, 12),
        ({"num_inference_steps": [20], "free_init_iters": [3]}, 60),
        ({"num_inference_steps": [20], "free_init_iters": [3], "free_init_fast": [True]}, 40),
        ({"num_inference_steps": [20], "free_init_iters": [0], "free_init_fast": [True]}, 20),
    ],
)
def test_computed_steps_are_counted_with_strength_and_passes(columns: dict[str, Any], steps: float) -> None:
    (work,) = work_of(checked(requests_table(1, **columns)).requests).to_pylist()

    assert work["steps"] == steps


def test_guidance_of_one_and_below_is_none() -> None:
    work = work_of(checked(requests_table(3, guidance_scale=[0.0, 1.0, 1.1])).requests)

    assert work["guided"].to_pylist() == [False, False, True]


def test_rows_that_differ_in_nothing_that_counts_are_one_class() -> None:
    work_classes = classes_of(
        requests_table(6, seed=[1, 2, 3, 4, 5, None], guidance_scale=[7.5, 8.0, None, 2.0, 3.0, 9.0])
    )

    assert (len(work_classes.classes), work_classes.class_of.tolist()) == (1, [0] * 6)
    assert work_classes.seeds is not None
    assert work_classes.seeds.tolist()[:5] == [1, 2, 3, 4, 5]
    assert classes_of(requests_table(2, seed=pa.array([None, None], pa.int64()))).seeds is None
    assert classes_of(requests_table(2)).seeds is None


def test_a_rejected_row_counts_as_given_and_has_no_class() -> None:
    work_classes = classes_of(requests_table(3, fps=[8.0, -1.0, None], format=["gif", "gif", "mp4"]))

    assert (work_classes.num_rows, work_classes.num_given["fps"], work_classes.num_given["prompt"]) == (3, 2, 3)
    assert [row["gif_fps"] for row in by_row(work_classes)] == [8.0, None]


def test_a_thousand_classes_and_more_can_be_distinguished() -> None:
    steps = [1 + k % 700 for k in range(1400)]
    work_classes = classes_of(requests_table(1400, num_inference_steps=steps))

    assert work_classes.class_of.dtype == np.uint16
    assert [row["num_inference_steps"] for row in by_row(work_classes)] == steps
    assert_same(WorkClasses.unpacked(work_classes.packed()), work_classes)


def test_a_class_for_each_row_is_no_larger_than_the_rows_themselves() -> None:
    fps = np.random.default_rng(0).uniform(1, 50, 20_000)
    table = requests_table(20_000, fps=fps, format=["gif"] * 20_000)

    work_classes = classes_of(table)

    assert len(work_classes.classes) == 20_000
    assert len(work_classes.packed()) < 20 * 20_000


def test_few_classes_take_less_than_a_byte_a_row() -> None:
    size = np.random.default_rng(0).choice([256, 512, 768], 20_000)

    assert len(classes_of(requests_table(20_000, width=size)).packed()) < 0.5 * 20_000
    assert len(classes_of(requests_table(20_000)).packed()) < 0.2 * 20_000


@settings(max_examples=25, deadline=None)
@given(tables(), st.lists(st.integers(0, 12), max_size=3))
def test_parts_put_together_and_packed_are_the_whole(table: pa.Table, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(table)) for cut in cuts), len(table)]
    slices = [table.slice(start, end - start) for start, end in pairwise(bounds)]
    whole = classes_of(table)

    joined = WorkClasses.joined([classes_of(part) for part in slices], [checked(part).id_hashes for part in slices])

    assert_same(joined, whole)
    assert_same(WorkClasses.unpacked(joined.packed()), whole)
    requests = checked(table).requests
    assert by_row(whole) == [
        work
        | {
            "gif_fps": request["fps"] if request["format"] == "gif" else None,
            "truncated": request["prompt"].startswith("a a "),
        }
        for work, request in zip(work_of(requests).to_pylist(), requests.to_pylist(), strict=True)
    ]
    counted = Counter(tuple(row[name] for name in GROUPED) for row in work_of(requests).to_pylist())
    assert {tuple(row.values())[:-1]: row["num_rows"] for row in whole.groups.to_pylist()} == counted


def test_what_shares_a_batch_is_part_of_a_class() -> None:
    assert set(GROUPED) <= set(WORK.names)
