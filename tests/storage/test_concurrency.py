"""Several calls at a time: order, look-ahead, and what happens after an exception."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pia_batch.storage.concurrency import map_in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.002 * (10 - item))
        return item * item

    assert list(map_in_threads(slow_at_first, range(10), 4)) == [k * k for k in range(10)]
    assert list(map_in_threads(slow_at_first, [], 4)) == []


def test_items_are_taken_only_as_they_are_needed_and_results_are_not_held() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            taken.append(number)
            yield number
            number += 1

    results = map_in_threads(lambda item: item, endless(), 3)

    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) <= 5 + 3
    results.close()  # type: ignore[attr-defined]  # a generator


def test_calls_run_side_by_side() -> None:
    together = threading.Barrier(4, timeout=30)

    assert len(list(map_in_threads(lambda _: together.wait(), range(4), 4))) == 4


def test_after_an_exception_what_waits_is_not_called() -> None:
    called: list[int] = []
    first_failed = threading.Event()

    def fail(item: int) -> None:
        called.append(item)
        if item == 0:
            first_failed.set()
            raise OSError("disk full")
        first_failed.wait(30)
        time.sleep(0.05)

    with pytest.raises(OSError, match="disk full"):
        list(map_in_threads(fail, range(1000), 2))
    assert len(called) <= 4
