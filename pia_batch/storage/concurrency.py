"""Several calls at a time, in threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")


def map_in_threads(function: Callable[[V], T], items: Iterable[V], threads: int) -> Iterator[T]:
    """Yield what `function` returns for each item, in the order of the items.

    At most `threads` results are held ahead, and items are taken only as they are needed: there may be millions.

    Args:
        function: Called in several threads at a time.
        items: Arguments, taken in the caller's thread.
        threads: Number of threads.

    Raises:
        Exception: The first exception of `function`, in the order of the items.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an exception, or when the caller stops early
            for future in waiting:
                future.cancel()
