"""The engine learns which batches fit, on devices with a fixed memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.engine.batch_limit import MAX_PATIENCE, PATIENCE, BatchLimit


def generate(limit: BatchLimit, loads: list[int], holds: Callable[[int], bool]) -> list[int]:
    """Generate rows of these loads on a device that `holds` a batch or not; return the loads that were tried."""
    left, tried = list(loads), []
    while left:
        taken = limit.batch_size(left)
        load = sum(left[:taken])
        tried.append(load)
        if holds(load):
            limit.record_success(left, taken)
            del left[:taken]
        else:
            limit.record_overflow(left, taken)
            if taken == 1:
                del left[0]
    return tried


def most(capacity: int) -> Callable[[int], bool]:
    return lambda load: load <= capacity


def test_without_an_overflow_a_batch_is_what_was_asked_for():
    assert generate(BatchLimit(), [3] * 10, most(30)) == [30]


def test_a_batch_never_exceeds_the_maximum_except_by_a_single_row():
    limit = BatchLimit(maximum=6)

    assert generate(limit, [2] * 10, most(30)) == [6, 6, 6, 2]
    assert generate(limit, [7, 3, 3, 1], most(30)) == [7, 6, 1]


def test_below_a_maximum_an_overflow_halves_batches_and_they_grow_back_to_it():
    limit = BatchLimit(maximum=8)
    limit.record_overflow([1] * 8, 8)

    tried = generate(limit, [1] * (4 * PATIENCE + 8 * 3 * PATIENCE), most(1000))

    assert tried == [4] * PATIENCE + [8] * 3 * PATIENCE


def test_a_batch_is_halved_until_it_fits_and_what_fits_is_remembered():
    limit = BatchLimit()

    assert generate(limit, [2] * 5, most(4)) == [10, 6, 4, 4, 2]
    assert generate(limit, [2] * 5, most(4)) == [4, 4, 2]


def test_one_bad_moment_halves_the_batches_for_a_while_only():
    limit = BatchLimit()
    limit.record_overflow([1] * 8, 8)
    limit.record_overflow([1] * 4, 4)

    tried = generate(limit, [1] * (6 * PATIENCE + 8), most(1000))

    assert tried == [2] * PATIENCE + [4] * PATIENCE + [8]
    assert generate(limit, [1] * 8, most(1000)) == [8]


def test_batches_grow_no_further_than_what_is_asked_for():
    limit = BatchLimit()
    limit.record_overflow([1] * 8, 8)
    for _ in range(PATIENCE):
        assert generate(limit, [1] * 8, most(8)) == [4, 4]

    for _ in range(3 * PATIENCE):
        assert generate(limit, [1] * 8, most(8)) == [8]


def test_a_lasting_limit_is_tried_ever_more_rarely():
    limit = BatchLimit()
    limit.record_overflow([1] * 8, 8)

    tried = generate(limit, [1] * 4 * 4_000, most(4))

    failures = [index for index, load in enumerate(tried) if load > 4]
    gaps = [later - earlier for earlier, later in itertools.pairwise(failures)]
    assert gaps[0] > PATIENCE
    assert gaps == sorted(gaps)
    assert max(gaps) <= MAX_PATIENCE + 1
    assert len(failures) / len(tried) < 0.01


def test_a_larger_batch_that_fails_costs_nothing_that_had_fitted():
    limit = BatchLimit()
    limit.record_overflow([1] * 8, 8)
    for _ in range(PATIENCE):
        assert generate(limit, [2] * 3, most(4)) == [4, 2]

    # The doubled limit of 8 is tried with the three rows that are there. 6 is too much, 4 was not.
    assert generate(limit, [2] * 3, most(4)) == [6, 4, 2]


def test_patience_is_short_again_once_more_has_fitted():
    limit = BatchLimit()
    limit.record_overflow([1] * 8, 8)
    generate(limit, [1] * 4 * 1000, most(4))  # long enough to lose patience
    generate(limit, [1] * 4 * 1000, most(1000))

    limit.record_overflow([1] * 2, 2)
    assert generate(limit, [1] * (PATIENCE + 2), most(1000)) == [1] * PATIENCE + [2]


def test_a_row_that_is_too_large_by_itself_does_not_shrink_the_others_for_good():
    limit = BatchLimit()
    generate(limit, [100], most(8))

    assert max(generate(limit, [1] * 8, most(8))) == 8


@given(
    loads=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    capacities=st.lists(st.integers(0, 120), min_size=1, max_size=40),
)
def test_every_row_is_tried_in_few_attempts_however_the_room_changes(loads, capacities):
    seen = []

    def holds(load: int) -> bool:
        seen.append(load)
        return load <= capacities[len(seen) % len(capacities)]

    tried = generate(BatchLimit(), loads, holds)

    assert all(load <= sum(loads) for load in tried)
    assert len(tried) <= len(loads) * (2 + sum(loads).bit_length())


@pytest.mark.parametrize("load", [1, 2, 3])
def test_a_limit_never_reaches_zero_from_which_it_could_not_grow(load):
    limit = BatchLimit()
    limit.record_overflow([load], 1)

    assert 8 in generate(limit, [1] * 100, most(8))
