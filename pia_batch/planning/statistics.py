"""What a manifest's pending requests have in common: counts that stay small whatever its size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.manifest.validation import seeds_of
from pia_batch.planning.work_classes import WORK, Traits, summed

_HELD_TABLES = 64


class Survey:
    """Counts the rows of a manifest, some at a time."""

    def __init__(self) -> None:
        self._held: list[pa.Table] = []
        self.num_rows = 0
        """Of the manifest."""
        self.num_given: Counter[str] = Counter()
        """How many rows have a value of their own, by column."""
        self.num_pending = 0
        """Pending requests; copies of one count as often as they stand there."""
        self.num_truncated = 0
        """Pending requests whose prompt has certainly more than `tokens.MAX_TOKENS`."""
        self.gif_fps: Counter[float] = Counter()
        """Pending GIFs by their rate."""
        self._seeds: list[int] = []

    def add(self, traits: Traits, id_hashes: npt.NDArray[np.uint64], pending: npt.NDArray[np.bool_]) -> None:
        """Count some rows.

        Args:
            traits: of all of them.
            id_hashes: `validation.hashes_of` the ids of the good ones; shape (n,).
            pending: which of the good ones are to be drawn; shape (n,).
        """
        self.num_rows += traits.num_rows
        self.num_given += traits.num_given
        counts = np.bincount(traits.class_of[pending], minlength=len(traits.classes))
        if not counts.any():
            return
        counted = traits.classes.append_column("num_rows", pa.array(counts, pa.int64())).filter(pa.array(counts > 0))
        self.num_pending += int(counts.sum())
        self.num_truncated += pc.sum(counted.filter(counted["truncated"])["num_rows"]).as_py() or 0
        gifs = counted.filter(pc.is_valid(counted["gif_fps"])).select(["gif_fps", "num_rows"])
        for fps, count in zip(*gifs.to_pydict().values(), strict=True):
            self.gif_fps[fps] += count
        seeds = seeds_of(id_hashes) if traits.seeds is None else traits.seeds
        self._seeds += [int(seeds.min(where=pending, initial=_MOST)), int(seeds.max(where=pending, initial=0))]
        self._seeds = [min(self._seeds), max(self._seeds)]
        self._held.append(summed(counted, WORK.names))  # classes may be many more than what they cost
        if len(self._held) == _HELD_TABLES:
            self._held = [self.work]

    @property
    def work(self) -> pa.Table:
        """WORK and `num_rows`, how many pending requests have it in common; the most frequent first."""
        empty = WORK.append(pa.field("num_rows", pa.int64())).empty_table()
        counts = summed(pa.concat_tables([empty, *self._held]), WORK.names)
        return counts.sort_by([("num_rows", "descending"), *((name, "ascending") for name in WORK.names)])

    @property
    def only_seed(self) -> int | None:
        """The seed that all pending requests share; None: there is more than one, or no request."""
        return self._seeds[0] if self._seeds and self._seeds[0] == self._seeds[1] else None


_MOST = np.iinfo(np.int64).max
