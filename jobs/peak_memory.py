"""Peak of the memory of processes while a block runs, sampled from a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import psutil


class PeakMemory:
    """Largest value of `measure` while a block runs.

    Attributes:
        num_bytes: Peak, in bytes; 0 until the first sample.
    """

    def __init__(self, measure: Callable[[], int], seconds: float = 0.05) -> None:
        """Prepare to call `measure` every so many seconds. It returns bytes."""
        self.num_bytes = 0
        self._measure, self._seconds = measure, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        """Begin to sample."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(self._seconds):
            self.num_bytes = max(self.num_bytes, self._measure())


def of_children(measure: Callable[[psutil.Process], int]) -> list[int]:
    """Return `measure` of each process below this one, without those that end meanwhile."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found.append(measure(process))
        except psutil.Error:
            continue
    return found
