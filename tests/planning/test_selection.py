"""Selection of the requests that a run animates if its budget allows fewer than all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.pipeline import stages
from pia_batch.pipeline.request_rows import with_row_error
from pia_batch.planning import selection
from pia_batch.planning.plan import make_plan
from pia_batch.schema.keys import KeySet, keys_from_hex, keys_to_hex

MakeConfig = Callable[..., RunConfig]


def selected_rows(config: RunConfig) -> list[str]:
    """The request ids that the plan's run would animate, in the manifest's order."""
    plan = make_plan(config)
    manifest = pa.concat_tables([batch.table for batch in plan.manifest.batches()])
    requests = stages.Validate(config, plan.engine_ids)(manifest)
    keep = stages.DropFinished(plan.skipped, plan.selected)
    selected = pa.concat_tables([keep(requests), with_row_error(plan.repeats)])
    assert len(selected) == plan.num_selected
    return sorted(selected["request_id"].to_pylist())


def test_without_a_budget_all_pending_requests_are_chosen(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(requests_table(5)))

    assert (plan.selected, plan.num_selected) == (None, 5)


def test_a_limit_takes_the_first_rows_and_counts_copies_once(make_config: MakeConfig) -> None:
    rows = requests_table(6)
    table = pa.concat_tables([rows.slice(0, 2), rows.slice(1, 1), rows.slice(0, 1), rows.slice(2)])

    assert selected_rows(make_config(table, budget__limit=3)) == ["r000", "r001", "r002"]
    assert len(selected_rows(make_config(table, budget__limit=6))) == 6
    assert make_plan(make_config(table, budget__limit=7)).selected is None


def test_a_limit_takes_the_highest_priorities_and_of_equals_the_first(make_config: MakeConfig) -> None:
    table = requests_table(7, price=[1.0, None, 9.5, float("nan"), 9.5, 3.0, -2.0])

    assert selected_rows(make_config(table, budget__limit=3, budget__priority="price")) == ["r002", "r004", "r005"]
    assert selected_rows(make_config(table, budget__limit=1, budget__priority="price")) == ["r002"]
    assert "r001" not in selected_rows(make_config(table, budget__limit=5, budget__priority="price"))


def test_a_setting_can_be_the_priority_and_its_default_counts(make_config: MakeConfig) -> None:
    table = requests_table(3, num_frames=pa.array([4, None, 12]))
    config = make_config(table, budget__limit=2, budget__priority="num_frames", defaults__num_frames=8)

    assert selected_rows(config) == ["r001", "r002"]


@pytest.mark.parametrize("column", ["nowhere", "prompts", "tags"])
def test_a_priority_that_is_no_column_of_numbers_is_refused_with_those_that_are(
    make_config: MakeConfig, column: str
) -> None:
    table = requests_table(2, price=[1, 2], stock=[0.5, 1.5], tags=[["a"], ["b"]])

    with pytest.raises(ConfigError, match=f"no numeric column '{column}'; its numeric columns: price, stock"):
        make_plan(make_config(table, budget__priority=column))


def test_a_sample_is_the_same_whatever_the_settings_and_grows_with_its_size(make_config: MakeConfig) -> None:
    table = requests_table(400)
    tenth = selected_rows(make_config(table, budget__sample="10%"))
    again = selected_rows(make_config(table, budget__sample=0.1, defaults__num_frames=4, encoding__mp4_crf=30))
    fifth = selected_rows(make_config(table, budget__sample="20%"))

    assert tenth == again
    assert set(tenth) < set(fifth)
    assert 15 <= len(tenth) <= 75  # of 400 random hashes: 40, and six deviations
    assert make_plan(make_config(table, budget__sample="100%")).selected is None


def test_a_limit_holds_inside_of_a_sample(make_config: MakeConfig) -> None:
    table = requests_table(100)
    sample = selected_rows(make_config(table, budget__sample="50%"))

    assert selected_rows(make_config(table, budget__sample="50%", budget__limit=5)) == sample[:5]


FRACTIONS = st.floats(0, 1, exclude_min=True)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30, unique=True), FRACTIONS, FRACTIONS)
def test_a_larger_sample_contains_a_smaller_one(hashes: list[int], one: float, other: float) -> None:
    small, large = sorted([one, other])
    keys = keys_from_hex(pa.array([f"{number:032x}" for number in range(len(hashes))], pa.string()))

    def sampled(fraction: float) -> set[str]:
        config = RunConfig.load(None, {"manifest": "m", "output": "o", "budget.sample": fraction})
        ordinals: npt.NDArray[np.int64] = np.arange(len(hashes))
        found = selection.select(config, FakeManifest(), keys, np.array(hashes, np.uint64), ordinals)  # type: ignore[arg-type]
        return set(keys_to_hex(keys if found is None else keys[found.contains(keys)]).to_pylist())

    assert sampled(small) <= sampled(large)
    assert len(sampled(1.0)) == len(hashes)


class FakeManifest:
    """A manifest that is never read."""

    schema = pa.schema([])


NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-(2**53), 2**53).map(float))


@given(st.lists(NUMBERS, max_size=20))
def test_numbers_rank_as_themselves_also_where_they_are_texts(numbers: list[float | None]) -> None:
    expected = [-np.inf if number is None or np.isnan(number) else number for number in numbers]
    texts = [None if number is None else repr(number) for number in numbers]

    assert selection.ranks(pa.array(numbers, pa.float64())).tolist() == expected
    assert selection.ranks(pa.array(texts, pa.string())).tolist() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([3, None, -1]), [3.0, -np.inf, -1.0]),
        (pa.array([True, False, None]), [1.0, 0.0, -np.inf]),
        (pa.array([2**63 + 1], pa.uint64()), [2.0**63]),
        (pa.array(["1.5", "", "much", " 2 "]), [1.5, -np.inf, -np.inf, 2.0]),
        (pa.chunked_array([pa.array([1]), pa.array([], pa.int64()), pa.array([2])]), [1.0, 2.0]),
    ],
)
def test_every_kind_of_column_is_ranked(column: pa.Array, expected: list[float]) -> None:
    assert selection.ranks(column).tolist() == expected


def test_what_was_chosen_and_is_finished_is_dropped() -> None:
    keys = keys_from_hex(pa.array([f"{number:032x}" for number in range(4)]))
    requests = pa.table({"key": keys_to_hex(keys)})
    step = stages.DropFinished(KeySet.of(keys[1:2]), KeySet.of(keys[:3]))

    assert step(requests)["key"].to_pylist() == keys_to_hex(keys[[0, 2]]).to_pylist()
