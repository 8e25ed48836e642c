"""How the engine learns what fits, against devices that have room for so much and no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.engine.batch_limit import MAX_PATIENCE, PATIENCE, BatchLimit


def draw(room: BatchLimit, loads: list[int], holds: Callable[[int], bool]) -> list[int]:
    """Draw rows of these loads on a device that `holds` a batch or not. The loads that were tried."""
    left, tried = list(loads), []
    while left:
        taken = room.batch_size(left)
        load = sum(left[:taken])
        tried.append(load)
        if holds(load):
            room.record_success(left, taken)
            del left[:taken]
        else:
            room.record_overflow(left, taken)
            if taken == 1:
                del left[0]
    return tried


def most(capacity: int) -> Callable[[int], bool]:
    return lambda load: load <= capacity


def test_without_an_overflow_a_batch_is_what_was_asked_for():
    assert draw(BatchLimit(), [3] * 10, most(30)) == [30]


def test_a_batch_is_halved_until_it_fits_and_what_fits_is_remembered():
    room = BatchLimit()

    assert draw(room, [2] * 5, most(4)) == [10, 6, 4, 4, 2]
    assert draw(room, [2] * 5, most(4)) == [4, 4, 2]


def test_one_bad_moment_halves_the_batches_for_a_while_only():
    room = BatchLimit()
    room.record_overflow([1] * 8, 8)
    room.record_overflow([1] * 4, 4)

    tried = draw(room, [1] * (6 * PATIENCE + 8), most(1000))

    assert tried == [2] * PATIENCE + [4] * PATIENCE + [8]
    assert draw(room, [1] * 8, most(1000)) == [8]


def test_batches_grow_no_further_than_what_is_asked_for():
    room = BatchLimit()
    room.record_overflow([1] * 8, 8)
    for _ in range(PATIENCE):
        assert draw(room, [1] * 8, most(8)) == [4, 4]

    for _ in range(3 * PATIENCE):
        assert draw(room, [1] * 8, most(8)) == [8]


def test_a_lasting_limit_is_tried_ever_more_rarely():
    room = BatchLimit()
    room.record_overflow([1] * 8, 8)

    tried = draw(room, [1] * 4 * 4_000, most(4))

    failures = [index for index, load in enumerate(tried) if load > 4]
    gaps = [later - earlier for earlier, later in itertools.pairwise(failures)]
    assert gaps[0] > PATIENCE
    assert gaps == sorted(gaps)
    assert max(gaps) <= MAX_PATIENCE + 1
    assert len(failures) / len(tried) < 0.01


def test_a_larger_batch_that_fails_costs_nothing_that_had_fitted():
    room = BatchLimit()
    room.record_overflow([1] * 8, 8)
    for _ in range(PATIENCE):
        assert draw(room, [2] * 3, most(4)) == [4, 2]

    # The doubled limit of 8 is tried with the three rows that are there. 6 is too much, 4 was not.
    assert draw(room, [2] * 3, most(4)) == [6, 4, 2]


def test_patience_is_short_again_once_more_has_fitted():
    room = BatchLimit()
    room.record_overflow([1] * 8, 8)
    draw(room, [1] * 4 * 1000, most(4))  # long enough to lose patience
    draw(room, [1] * 4 * 1000, most(1000))

    room.record_overflow([1] * 2, 2)
    assert draw(room, [1] * (PATIENCE + 2), most(1000)) == [1] * PATIENCE + [2]


def test_a_row_that_is_too_large_by_itself_does_not_shrink_the_others_for_good():
    room = BatchLimit()
    draw(room, [100], most(8))

    assert max(draw(room, [1] * 8, most(8))) == 8


@given(
    loads=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    capacities=st.lists(st.integers(0, 120), min_size=1, max_size=40),
)
def test_every_row_is_tried_in_few_attempts_however_the_room_changes(loads, capacities):
    seen = []

    def holds(load: int) -> bool:
        seen.append(load)
        return load <= capacities[len(seen) % len(capacities)]

    tried = draw(BatchLimit(), loads, holds)

    assert all(load <= sum(loads) for load in tried)
    assert len(tried) <= len(loads) * (2 + sum(loads).bit_length())


@pytest.mark.parametrize("load", [1, 2, 3])
def test_a_limit_never_reaches_zero_from_which_it_could_not_grow(load):
    room = BatchLimit()
    room.record_overflow([load], 1)

    assert 8 in draw(room, [1] * 100, most(8))
