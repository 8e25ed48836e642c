"""How large a batch the device has memory for, learned from what fitted and what did not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile

import torch

_EXHAUSTED = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "was unable to find an engine to execute this computation",
)
"""What a plain RuntimeError says where memory ran out outside of torch's own allocator of the GPU.

The last is a convolution's: torch tries one algorithm of cuDNN after another, passes over those whose workspace finds
no memory, and in the end says only that none was left.
"""

PATIENCE = 8
"""Batches at the limit that must succeed before a larger one is tried."""

MAX_PATIENCE = 512
"""Where patience ends. It doubles with every larger batch that fails, so that a lasting limit costs little."""


class BatchLimit:
    """The largest load of one batch. A load is in any unit that memory grows with; the loads of its rows add up.

    There is no limit until a batch overflows. That halves its rows. After enough batches at the limit it is doubled
    again, for as long as more is asked for, so that one bad moment does not halve the throughput for ever.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._proven: int | None = None
        """The limit before it was doubled, until a batch beyond it has fitted."""
        self._patience = PATIENCE
        self._streak = 0

    def take(self, loads: Sequence[int]) -> int:
        """How many of the rows that are left to draw next: at least one, at most all.

        Args:
            loads: of those rows, in their order; at least one.
        """
        limit = self._limit
        if limit is None:
            return len(loads)
        return max(1, sum(1 for _ in takewhile(lambda total: total <= limit, accumulate(loads))))

    def fitted(self, loads: Sequence[int], taken: int) -> None:
        """A batch of the first `taken` of these rows was drawn."""
        if self._limit is None:
            return
        if self._proven is not None and sum(loads[:taken]) > self._proven:
            self._proven, self._patience = None, PATIENCE
        if taken == len(loads):
            return  # as much as was asked for: the limit held nothing back
        self._streak += 1
        if self._streak >= self._patience and self._proven is None:
            self._proven, self._limit, self._streak = self._limit, 2 * self._limit, 0

    def overflowed(self, loads: Sequence[int], taken: int) -> None:
        """A batch of the first `taken` of these rows did not fit. The next one has fewer rows, if it had several."""
        load = sum(loads[:taken])
        half = max(load // 2, sum(loads[: (taken + 1) // 2]) if taken > 1 else 1)
        self._streak = 0
        if self._proven is not None:
            self._limit, self._proven = self._proven, None
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        if self._limit is None or load <= self._limit:
            self._limit = half


def is_out_of_memory(err: Exception) -> bool:
    """Whether that is what this exception means, whoever raised it."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(err, RuntimeError) and any(sign in str(err) for sign in _EXHAUSTED)
