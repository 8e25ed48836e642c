"""The verdicts on the rows of a manifest, piece by piece: keys of the good ones, what is wrong with the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.manifest.reader import Piece
from pia_batch.manifest.validation import Checked, check
from pia_batch.planning.work_classes import Traits
from pia_batch.schema.columns import EFFECTIVE
from pia_batch.schema.keys import KEY_BYTES, Keys

CHECKED_AT_ONCE = 16_384
"""Rows that `check` is given: their canonical JSON is what a scan needs of memory."""

READERS = 8
"""Pieces of a manifest that are asked for at a time, as far as READ_BYTES goes."""

READ_BYTES = 16 * 2**20
"""Unpacked, of the pieces that one process reads at a time; a larger one is read alone. Decoding takes several times as
much."""

_CHECKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Task:
    """What decides the verdicts, the same for all pieces; it can be pickled.

    Attributes:
        schema: the columns that are read, with the types that all files of the manifest give them.
        run: gives the defaults, and what else decides a key.
        engine_ids: the identity of each model's engine, by its name.
    """

    schema: pa.Schema
    run: RunConfig
    engine_ids: Mapping[str, str]


@dataclass(frozen=True)
class Judged:
    """What is kept of `check`'s verdict on some rows.

    Attributes:
        keys: of the good rows; shape (n,).
        id_hashes: `validation.hashes_of` their request ids; shape (n,).
        rejected: `Checked.rejected`.
        traits: of all of them.
    """

    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    rejected: pa.Table
    traits: Traits

    @classmethod
    def of(cls, rows: pa.Table, checked: Checked) -> Judged:
        """The part of a verdict on `rows`, as they stand in the manifest."""
        return cls(checked.keys, checked.id_hashes, checked.rejected, Traits.of(rows, checked.requests))

    @classmethod
    def nothing(cls) -> Judged:
        """The verdict on no rows."""
        return cls.of(pa.table({}), _NOTHING)

    @property
    def num_rows(self) -> int:
        """Good and bad ones."""
        return self.traits.num_rows


Verdict = tuple[Judged, ...]
"""On the rows of a piece, in order."""


class Judge:
    """Judges pieces, from several threads at once, as many at a time as fit in memory."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._free_bytes = READ_BYTES
        self._freed = threading.Condition()
        self._checkers = threading.Semaphore(_CHECKERS)

    def judge(self, piece: Piece, tables: Iterable[pa.Table]) -> Verdict:
        """The verdict on a piece; `tables` are its rows in order, read as they are asked for."""
        with self._room(min(piece.num_bytes, READ_BYTES)):
            return tuple(self._judged(tables))

    @contextmanager
    def _room(self, num_bytes: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            with self._freed:
                self._free_bytes += num_bytes
                self._freed.notify_all()

    def _judged(self, tables: Iterable[pa.Table]) -> Iterator[Judged]:
        for table in tables:
            for start in range(0, len(table), CHECKED_AT_ONCE):
                rows = table.slice(start, CHECKED_AT_ONCE)
                with self._checkers:
                    judged = Judged.of(rows, check(rows, self._task.run, self._task.engine_ids))
                yield judged


def in_threads(task: Task, pieces: Iterable[tuple[Piece, Iterable[pa.Table]]]) -> Iterator[Verdict]:
    """The verdict on each piece, in their order; their tables are read in several threads of this process."""
    judge = Judge(task)
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(lambda read: judge.judge(*read), pieces)


_NOTHING = Checked(
    EFFECTIVE.empty_table(),
    np.empty(0, np.int64),
    np.empty(0, f"V{KEY_BYTES}"),
    np.empty(0, np.uint64),
    pa.schema([("row", pa.int64()), ("error_kind", pa.string()), ("error", pa.string())]).empty_table(),
)
