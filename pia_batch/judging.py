"""The verdicts on the rows of a manifest, piece by piece: keys of the good ones, what is wrong with the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.manifest import Piece
from pia_batch.records import EFFECTIVE, GROUPED, KEY_BYTES, Keys, KeySet
from pia_batch.validation import Checked, check

CHECKED_AT_ONCE = 16_384
"""Rows that `check` is given: their canonical JSON is what a scan needs of memory."""

READERS = 8
"""Pieces of a manifest that are asked for at a time, as far as READ_BYTES goes."""

READ_BYTES = 16 * 2**20
"""Unpacked, of the pieces that one process reads at a time; a larger one is read alone. Decoding takes several times as
much."""

_CHECKERS = min(4, os.cpu_count() or 1)


class Survey(Protocol):
    """Is shown every row of a manifest once, and gathers counts."""

    def __call__(self, rows: pa.Table, pending: pa.Table) -> None:
        """Count some rows as they stand in the manifest, and those of their requests that are left to do.

        These are as `validation.check` gives them; copies of a request are among them.
        """

    def empty(self) -> Self:
        """One that has seen nothing; it can be pickled."""

    def add(self, other: Self) -> None:
        """Count what `other` has seen, which stands in the manifest after all that this has seen."""


@dataclass(frozen=True)
class Task:
    """What decides the verdicts, the same for all pieces; it can be pickled.

    Attributes:
        schema: the columns that are read, with the types that all files of the manifest give them.
        run: gives the defaults, and what else decides a key.
        engine_ids: the identity of each model's engine, by its name.
        survey: one that has seen nothing; None: there is none.
        done: what a survey is not shown as pending.
    """

    schema: pa.Schema
    run: RunConfig
    engine_ids: Mapping[str, str]
    survey: Survey | None
    done: KeySet


@dataclass(frozen=True)
class Judged:
    """What is kept of `check`'s verdict on some rows.

    Attributes:
        num_rows: good and bad ones.
        keys: of the good rows; shape (n,).
        id_hashes: `validation.hashes_of` their request ids; shape (n,).
        rejected: `Checked.rejected`.
        groups: GROUPED and `num_rows`.
    """

    num_rows: int
    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    rejected: pa.Table
    groups: pa.Table

    @classmethod
    def of(cls, checked: Checked, num_rows: int) -> Judged:
        """The part of a verdict on `num_rows` rows."""
        groups = checked.requests.group_by(list(GROUPED)).aggregate([([], "count_all")])
        groups = groups.rename_columns([*GROUPED, "num_rows"])
        return cls(num_rows, checked.keys, checked.id_hashes, checked.rejected, groups)

    @classmethod
    def nothing(cls) -> Judged:
        """The verdict on no rows."""
        return cls.of(_NOTHING, 0)


@dataclass(frozen=True)
class Verdict:
    """On the rows of a piece, in order, and what a survey saw in them."""

    judged: tuple[Judged, ...]
    survey: Survey | None


class Judge:
    """Judges pieces, from several threads at once, as many at a time as fit in memory."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._free_bytes = READ_BYTES
        self._freed = threading.Condition()
        self._checkers = threading.Semaphore(_CHECKERS)

    def judge(self, piece: Piece, tables: Iterable[pa.Table]) -> Verdict:
        """The verdict on a piece; `tables` are its rows in order, read as they are asked for."""
        survey = self._task.survey and self._task.survey.empty()
        with self._room(min(piece.num_bytes, READ_BYTES)):
            return Verdict(tuple(self._judged(tables, survey)), survey)

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

    def _judged(self, tables: Iterable[pa.Table], survey: Survey | None) -> Iterator[Judged]:
        for table in tables:
            for start in range(0, len(table), CHECKED_AT_ONCE):
                rows = table.slice(start, CHECKED_AT_ONCE)
                with self._checkers:
                    checked = check(rows, self._task.run, self._task.engine_ids)
                    if survey is not None:
                        survey(rows, checked.requests.filter(pa.array(~self._task.done.contains(checked.keys))))
                yield Judged.of(checked, len(rows))


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
