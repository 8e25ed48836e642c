"""Validation of a manifest's pieces in threads: the keys of the valid rows, and the errors of the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.config.model_limits import Limits
from pia_batch.manifest.pieces import Piece
from pia_batch.manifest.validation import Checked, check
from pia_batch.planning.statistics import WorkClasses
from pia_batch.planning.words import NO_WORDS, Words
from pia_batch.schema.columns import EFFECTIVE
from pia_batch.schema.keys import KEY_BYTES, Keys

CHECKED_ROWS = 16_384
"""Rows per call of `check`; their canonical JSON dominates the memory of a scan."""

READERS = 8
"""Number of pieces that are read at a time, within the limit of READ_BYTES."""

READ_BYTES = 16 * 2**20
"""Uncompressed bytes of the pieces that one process reads at a time; a larger piece is read alone. Decoding needs
several times as much memory."""

_CHECKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class ScanTask:
    """Inputs that all pieces of a scan share; picklable.

    Attributes:
        schema: Columns to read, with the types that they have over all files of the manifest.
        run: Config with the defaults, and with everything else that decides a key.
        engine_ids: Identity of each model's engine, by the model's name.
        words: Words of the textual inversions of each model.
        limits: Limits of the models that their files decide.
    """

    schema: pa.Schema
    run: RunConfig
    engine_ids: Mapping[str, str]
    words: Words = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)


@dataclass(frozen=True)
class ValidatedRows:
    """The part of `check`'s result that a scan keeps.

    Attributes:
        keys: Keys of the valid rows; shape (n,).
        id_hashes: `validation.hashes_of` the request ids of the valid rows; shape (n,).
        rejected: `Checked.rejected`.
        work_classes: Work classes of all rows.
    """

    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    rejected: pa.Table
    work_classes: WorkClasses

    @classmethod
    def of(cls, rows: pa.Table, checked: Checked, words: Words = NO_WORDS) -> ValidatedRows:
        """Keep a part of the result of checking `rows`, which are as they are in the manifest."""
        work_classes = WorkClasses.of(rows, checked.requests, words)
        return cls(checked.keys, checked.id_hashes, checked.rejected, work_classes)

    @classmethod
    def empty(cls) -> ValidatedRows:
        """Return the result for zero rows."""
        return cls.of(pa.table({}), _EMPTY)

    @property
    def num_rows(self) -> int:
        """Number of rows, valid and rejected ones."""
        return self.work_classes.num_rows


ValidatedPiece = tuple[ValidatedRows, ...]
"""Results for the rows of a piece, in order."""


class PieceValidator:
    """Validates pieces in several threads at a time, as many as fit in memory."""

    def __init__(self, task: ScanTask) -> None:
        self._task = task
        self._free_bytes = READ_BYTES
        self._freed = threading.Condition()
        self._checkers = threading.Semaphore(_CHECKERS)

    def validate(self, piece: Piece, tables: Iterable[pa.Table]) -> ValidatedPiece:
        """Validate a piece; `tables` are its rows in order, read as they are consumed."""
        with self._reserved(min(piece.num_bytes, READ_BYTES)):
            return tuple(self._validated(tables))

    @contextmanager
    def _reserved(self, num_bytes: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            with self._freed:
                self._free_bytes += num_bytes
                self._freed.notify_all()

    def _validated(self, tables: Iterable[pa.Table]) -> Iterator[ValidatedRows]:
        for table in tables:
            for start in range(0, len(table), CHECKED_ROWS):
                rows = table.slice(start, CHECKED_ROWS)
                with self._checkers:
                    checked = check(rows, self._task.run, self._task.engine_ids, self._task.limits)
                    validated = ValidatedRows.of(rows, checked, self._task.words)
                yield validated


def validate_in_threads(task: ScanTask, pieces: Iterable[tuple[Piece, Iterable[pa.Table]]]) -> Iterator[ValidatedPiece]:
    """Validate pieces, given with their tables, in order; the tables are read in threads of this process."""
    validator = PieceValidator(task)
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(lambda read: validator.validate(*read), pieces)


_EMPTY = Checked(
    EFFECTIVE.empty_table(),
    np.empty(0, np.int64),
    np.empty(0, f"V{KEY_BYTES}"),
    np.empty(0, np.uint64),
    pa.schema([("row", pa.int64()), ("error_kind", pa.string()), ("error", pa.string())]).empty_table(),
)
