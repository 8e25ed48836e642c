"""Batch limit: the largest batch that fits into the device's memory, learned from successes and overflows.

On a CPU batches have a fixed maximum besides, because its caches end long before its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile

PATIENCE = 8
"""Number of batches at the limit that must succeed before a larger one is tried."""

MAX_PATIENCE = 512
"""Largest patience. It doubles with every larger batch that fails, so that a lasting limit costs little."""

CPU_BATCH_PIXELS = 4 * 2 * 8 * 64 * 64
"""Pixels of all UNet samples of a batch on a CPU: four guided or eight unguided rows of 8 frames of 64 x 64.

In larger batches products take longer, probably because activations do not stay in the caches (docs/engine-design.md
has the measurement).
"""


class BatchLimit:
    """Largest load of one batch. A load is in any unit that memory grows with; the loads of the rows add up.

    Except for the fixed maximum there is no limit until a batch overflows; an overflow halves the rows. After enough
    successful batches at the limit, the limit doubles, as long as more rows are requested. So one short shortage does
    not halve the throughput for ever.
    """

    def __init__(self, maximum: int | None = None) -> None:
        """Create a limit that has seen no batch.

        Args:
            maximum: Load that a batch of several rows never exceeds; None: only the memory limits batches.
        """
        self._maximum = maximum
        self._limit: int | None = None
        self._proven: int | None = None
        """Limit before it was doubled; None once a larger batch has fitted."""
        self._patience = PATIENCE
        self._streak = 0

    def batch_size(self, loads: Sequence[int]) -> int:
        """Return the number of rows for the next batch: at least one, at most all remaining rows.

        Args:
            loads: Loads of the remaining rows, in their order; at least one.
        """
        limits = [limit for limit in (self._limit, self._maximum) if limit is not None]
        if not limits:
            return len(loads)
        limit = min(limits)
        return max(1, sum(1 for _ in takewhile(lambda total: total <= limit, accumulate(loads))))

    def record_success(self, loads: Sequence[int], taken: int) -> None:
        """Record that a batch of the first `taken` of these rows fitted."""
        if self._limit is None:
            return
        if self._proven is not None and sum(loads[:taken]) > self._proven:
            self._proven, self._patience = None, PATIENCE
        if taken == len(loads):
            return  # all rows fitted: the limit did not restrict this batch
        self._streak += 1
        if self._streak >= self._patience and self._proven is None:
            self._proven, self._limit, self._streak = self._limit, 2 * self._limit, 0

    def record_overflow(self, loads: Sequence[int], taken: int) -> None:
        """Record that a batch of the first `taken` of these rows did not fit; a batch of several rows then shrinks."""
        load = sum(loads[:taken])
        half = max(load // 2, sum(loads[: (taken + 1) // 2]) if taken > 1 else 1)
        self._streak = 0
        if self._proven is not None:
            self._limit, self._proven = self._proven, None
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        if self._limit is None or load <= self._limit:
            self._limit = half
